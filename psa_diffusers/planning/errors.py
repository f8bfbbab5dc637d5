"""The error that reading a block pair at a coarser level is expected to cause: what the ``budget`` rule minimises.

Write the logits of a pooled group as their mean plus deviations of variance s. To first order, pooling the group

* loses the mass exp(s / 2) - 1 that the deviations add (Jensen), which moves the output along (block's value - output),
* and loses the covariance of the weights with the values, of size sqrt(s) x spread of the values.

Both are weighed with the attention that the block gets. The errors of different blocks are about independent, hence
squares add up: a pair's error is attention^2 x ((1 - exp(-s / 2))^2 |value - output|^2 + c s |value spread|^2).

What keys and values lose together, their covariance, is not independent between blocks, and would add up over them
(:mod:`~psa_diffusers.backends.covariance`); the attention gives it back, so that it does not count here.

How well that does is decided by the estimate of attention^2, since the mean over a block's queries rests on the few
that attend most: with the true values the error model comes within a tenth of the exact first-order errors, with those
of the sampled softmax alone it loses up to half. So a second, independent estimate joins it (see
:func:`~.importance.centroid_energy`), and their geometric mean is shrunk by a power below 1, which is what the
logarithm of a noisy estimate needs. ``scripts/compare_rules.py`` measures the choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .importance import Importance
from .sampling import Samples
from .spread import Spread

# How far the parts of the covariance term add up over a block: 1 = all alike, 1 / tokens = independent.
COHERENCE = 0.1
# Power on attention^2.
SHRINKAGE = 0.75


def pair_errors(
    importance: Importance,
    second: Tensor,
    query: Samples,
    spread: Spread,
    full_query_blocks: Tensor | None = None,
    *,
    scale: float,
) -> Tensor:
    """Expected squared output error of each pair at levels 2 .. num_levels and the centroid; level 1 has none.

    In units of the head's mean squared output, so that heads of small values count like others.

    Args:
        importance: of all pairs; second: float32 [batch, heads, query_blocks, kv_blocks], the second estimate of
            ``importance.energy``.
        query: sampled queries; scale: factor on the logits.
        full_query_blocks: bool [query_blocks], rows that are level 1 anyway, with text that may be padding: they have
            no say in the unit. None = there are none.

    Returns:
        float32 [num_levels, batch, heads, query_blocks, kv_blocks].
    """
    tiny = torch.finfo(torch.float32).tiny
    attention = (importance.energy * second).pow_(SHRINKAGE / 2)
    shares = importance.score / importance.score.sum(-1, keepdim=True).clamp(min=tiny)
    output = shares @ spread.value_mean
    distance = _value_distance(output, spread.value_mean)
    features = (query_power(query) * scale**2).contiguous()
    weight = 1.0 / _mean_power(output, full_query_blocks).clamp(min=tiny)[:, :, None, None]
    errors = []
    for key_spread, value_spread in zip(spread.key, spread.value, strict=True):
        variance = features @ key_spread.transpose(2, 3)
        lost = torch.expm1(variance * -0.5).square_().mul_(distance)
        variance.mul_(value_spread[:, :, None, :])
        errors.append(variance.mul_(COHERENCE).add_(lost).mul_(attention).mul_(weight))
    return torch.stack(errors)


def _mean_power(output: Tensor, full_query_blocks: Tensor | None) -> Tensor:
    """[batch, heads]: mean over the rows that are not full of the squared length of output."""
    power = output.square().sum(-1)
    if full_query_blocks is None:
        return power.mean(-1)
    free = ~full_query_blocks
    return torch.where(free, power, 0.0).sum(-1) / free.sum().clamp(min=1)


def query_power(query: Samples) -> Tensor:
    """float32 [batch, heads, query_blocks, head_dim]: mean square of each feature over a block's sampled queries."""
    squares = query.rows.square().sum(2)
    if query.valid is None:
        return squares / query.rows.shape[2]
    return squares / query.valid.sum(1).clamp(min=1)[:, None, :, None]


def _value_distance(output: Tensor, value_mean: Tensor) -> Tensor:
    """[batch, heads, query_blocks, kv_blocks]: squared distance of a block's mean value from the expected output."""
    distance = (output @ value_mean.transpose(2, 3)).mul_(-2.0)
    distance += value_mean.square().sum(-1)[:, :, None, :]
    distance += output.square().sum(-1, keepdim=True)
    return distance.clamp_(min=0.0)
