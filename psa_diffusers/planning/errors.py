"""The error that reading a block pair at a coarser level is expected to cause: what the ``budget`` rule minimises."""

from __future__ import annotations

import torch
from torch import Tensor

from .importance import Importance
from .sampling import Samples
from .spread import Spread


def pair_errors(
    importance: Importance, query: Samples, spread: Spread, *, scale: float, coherence: float = 1.0, mode: str = "full"
) -> Tensor:
    """Expected squared output error of each pair at levels 2 .. num_levels and the centroid.

    Returns:
        float32 [levels, batch, heads, query_blocks, kv_blocks].
    """
    power = query_power(query) * scale**2
    # Variance over a group of the logits that a query of the block gives its keys.
    variance = power[None] @ spread.key.transpose(3, 4)
    block = 64
    value = spread.value[:, :, :, None, :]
    score = importance.score / importance.score.sum(-1, keepdim=True).clamp(min=1e-20)
    output = score @ spread.value_mean
    distance = (
        spread.value_mean.square().sum(-1)[:, :, None, :]
        + output.square().sum(-1, keepdim=True)
        - 2 * output @ spread.value_mean.transpose(2, 3)
    ).clamp_(min=0)
    lost = -torch.expm1(-variance / 2)
    return importance.energy * (coherence * variance.clamp(max=1.0) * value + lost.square() * distance)


def query_power(query: Samples) -> Tensor:
    """float32 [batch, heads, query_blocks, head_dim]: mean square of each feature over a block's sampled queries."""
    squares = query.rows.square().sum(2)
    if query.valid is None:
        return squares / query.rows.shape[2]
    return squares / query.valid.sum(1).clamp(min=1)[:, None, :, None]
