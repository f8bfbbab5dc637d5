"""How much each block of queries attends to each block of keys (paper section 3.2: block-wise importance)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..products import linear
from .blocks import block_rows, rows_per_chunk, unpadded_positions
from .sampling import Samples

STRIDE = 8  # of the antidiagonals, XAttention's (arXiv 2503.16428)
_Of = tuple[slice, slice]  # samples and heads
_NOTHING = -1e30  # logit of what is not there; finite, so that no inf - inf arises


@dataclass(frozen=True)
class Importance:
    """float32 [batch, heads, query_blocks, kv_blocks] each.

    Attributes:
        score: The estimated share of the queries' attention that goes to the block; what the paper's rules sort.
        energy: The mean over queries of that share's square; what the ``budget`` rule weighs errors with.
    """

    score: Tensor
    energy: Tensor

    def of_heads(self, heads: slice) -> Importance:
        return Importance(self.score[:, heads], self.energy[:, heads])


def sampled_importance(query: Samples, key: Samples, *, scale: float, reduction: str) -> Importance:
    """Softmax over the sampled keys of all blocks, weighted by the tokens that a sample stands for.

    ``reduction="sum"`` adds a block's samples and averages over its sampled queries; ``"max"`` takes the largest entry
    (the paper's). Works through the query blocks in chunks, so that the scores in memory stay a fraction of the keys.
    """
    batch, heads, samples, blocks, _ = query.rows.shape
    kv_samples, kv_blocks = key.rows.shape[2:4]
    queries, keys = query.rows * scale, key.rows
    bias = _sample_bias(key)
    if bias is not None:  # as one more feature: the product adds it at no cost
        queries = torch.nn.functional.pad(queries, (0, 1), value=1.0)
        keys = torch.cat([keys, bias[:, None, :, :, None].expand(batch, heads, -1, -1, 1)], dim=-1)
    keys = keys.reshape(batch, heads, kv_samples * kv_blocks, -1)
    score = queries.new_empty(batch, heads, blocks, kv_blocks)
    energy = torch.empty_like(score)
    for of, part in _parts(batch, heads, blocks, samples * kv_samples * kv_blocks, queries):
        rows = queries[of][:, :, :, part]
        logits = _products(rows.flatten(2, 3), keys[of])
        shares = torch.softmax(logits, dim=-1, out=logits)
        shares = shares.view(*rows.shape[:4], kv_samples, kv_blocks)
        valid = None if query.valid is None else query.valid[_samples_of(query.valid, of), None, :, part, None]
        _reduce(shares, valid, reduction, score[of][:, :, part], energy[of][:, :, part])
    return Importance(score, energy)


def _parts(batch: int, heads: int, blocks: int, per_block: int, like: Tensor) -> Iterator[tuple[_Of, slice]]:
    """Samples and heads, and blocks of queries, whose scores, ``per_block`` each, are in memory at once.

    On a CPU it is one head, and elsewhere all.
    """
    places: list[_Of] = [(slice(None), slice(None))]
    if like.device.type == "cpu":
        places = [(slice(n, n + 1), slice(h, h + 1)) for n in range(batch) for h in range(heads)]
    step = _score_chunk(like, per_block * batch * heads // len(places))
    for of, start in itertools.product(places, range(0, blocks, step)):
        yield of, slice(start, min(start + step, blocks))


def _score_chunk(rows: Tensor, numel_per_block: int) -> int:
    """Query blocks whose scores are in memory at once: what stays in a CPU's cache, an eighth of the rows elsewhere."""
    limit = 2**18 if rows.device.type == "cpu" else max(2**24, rows.numel())
    return max(1, limit // numel_per_block)


def _samples_of(mask: Tensor, of: _Of) -> slice:
    """Those samples of a mask [batch or 1, ...]."""
    return of[0] if mask.shape[0] > 1 else slice(None)


def _products(rows: Tensor, columns: Tensor) -> Tensor:
    """[batch, heads, n, m] from rows [batch, heads, n, k] and columns [batch, heads, m, k]."""
    if rows.shape[0] * rows.shape[1] == 1:
        return linear(rows[0, 0], columns[0, 0].contiguous())[None, None]
    return rows @ columns.transpose(2, 3)


def _reduce(shares: Tensor, valid: Tensor | None, reduction: str, score: Tensor, energy: Tensor) -> None:
    """shares [batch, heads, query samples, query blocks, key samples, kv blocks] to one number a pair."""
    if reduction == "max":
        peak = shares.amax(4)
        peak = peak if valid is None else peak * valid
        score.copy_(peak.amax(2))
        energy.copy_(score.square())
        return
    mass = shares.sum(4)
    if valid is None:
        score.copy_(mass.mean(2))
        energy.copy_(mass.square_().mean(2))
        return
    mass = mass * valid
    count = valid.sum(2).clamp(min=1)
    score.copy_(mass.sum(2) / count)
    energy.copy_(mass.square_().sum(2) / count)


def _sample_bias(key: Samples) -> Tensor | None:
    """ln(tokens a sample stands for) [batch or 1, samples, blocks]; None when all weigh the same."""
    if key.valid is None:
        return None
    weights = key.weights[:, None, :].expand_as(key.valid)
    return torch.where(key.valid, weights.clamp(min=1e-6).log(), _NOTHING)


def centroid_energy(
    query: Samples, key_mean: Tensor, key_spread: Tensor, key_counts: Tensor | None, block_size: int, *, scale: float
) -> Tensor:
    """A second estimate of :attr:`Importance.energy`, whose errors are not those of the sampled keys.

    A block's mass is taken as count x exp(mean logit + half the logits' variance), exact for normally distributed
    logits, with mean and variance from the block's statistics.

    Args:
        query: sampled queries; others than the first estimate's, for these would share its errors.
        key_mean, key_spread: float32 [batch, heads, kv_blocks, head_dim]: mean, and mean squared deviation from it.
        key_counts: int [batch or 1, kv_blocks], real keys of each block; None = all full.
    """
    batch, heads, samples, blocks, _ = query.rows.shape
    kv_blocks = key_mean.shape[2]
    half_spread = key_spread * 0.5
    energy = key_mean.new_empty(batch, heads, blocks, kv_blocks)
    bias = None if key_counts is None else _count_bias(key_counts)[:, None, None, :]
    for of, part in _parts(batch, heads, blocks, samples * kv_blocks, query.rows):
        rows = query.rows[of][:, :, :, part]
        scaled = rows.flatten(2, 3) * scale
        logits = _products(scaled.square(), half_spread[of])
        # The largest of n keys holds at most the mass of n: beyond it the logits are not normal.
        logits.clamp_(max=math.log(block_size)).add_(_products(scaled, key_mean[of]))
        if bias is not None:
            logits += bias[_samples_of(bias, of)]
        mass = torch.softmax(logits, dim=-1, out=logits).view(*rows.shape[:4], kv_blocks).square_()
        if query.valid is None:
            energy[of][:, :, part] = mass.mean(2)
        else:
            valid = query.valid[_samples_of(query.valid, of), None, :, part, None]
            energy[of][:, :, part] = (mass * valid).sum(2) / valid.sum(2).clamp(min=1)
    return energy


def _count_bias(counts: Tensor) -> Tensor:
    return torch.where(counts > 0, counts.clamp(min=1).to(torch.float32).log(), _NOTHING)


def pooled_importance(query_mean: Tensor, key_mean: Tensor, key_counts: Tensor, *, scale: float) -> Importance:
    """Softmax of mean query . mean key + ln(real keys of the block), as if every block were its centroid.

    Args:
        query_mean: float32 [batch, heads, query_blocks, head_dim]; key_mean: the same for key blocks.
        key_counts: int [batch or 1, kv_blocks], the real keys of each block.
    """
    logits = query_mean @ key_mean.transpose(2, 3) * scale + _count_bias(key_counts)[:, None, None, :]
    score = torch.softmax(logits, dim=-1)
    return Importance(score, score.square())


def block_means(tokens: Tensor, order: Tensor | None, real: Tensor) -> Tensor:
    """float32 [batch, heads, blocks, head_dim]: the mean of the real tokens of each block.

    Args:
        tokens: [batch, seq, heads, head_dim]; real: bool [batch or 1, blocks, block_size].
    """
    batch, _, heads, head_dim = tokens.shape
    blocks, block_size = real.shape[1:]
    step = rows_per_chunk(tokens, block_size)
    sums = [
        block_rows(tokens, order, real, start, min(start + step, blocks), block_size).sum(2)
        for start in range(0, blocks, step)
    ]
    means = torch.cat(sums, dim=1) / real.sum(2).clamp(min=1)[:, :, None]
    return means.view(batch, blocks, heads, head_dim).transpose(1, 2)


def antidiagonal_importance(
    query: Tensor,
    key: Tensor,
    *,
    order: Tensor | None,
    real: Tensor | None,
    query_block_size: int,
    kv_block_size: int,
    scale: float,
    reduction: str,
) -> Importance:
    """Strided sums along the antidiagonals of the attention map (XAttention, arXiv 2503.16428), stride 8.

    Groups of 8 consecutive queries meet groups of 8 consecutive keys: the mean of query i . key 7 - i is their logit.
    Tokens that a group lacks (tail, padding) are replaced by the mean of those it has; a group of keys weighs as many
    tokens as it holds.

    Args:
        query, key: [batch, seq, heads, head_dim].
        real: bool [batch, kv_blocks, kv_block_size] where keys are padded, else None.
    """
    batch, query_length, heads, _ = query.shape
    kv_real = unpadded_positions(key.shape[1], kv_block_size, key.device) if real is None else real
    stride = min(STRIDE, query_block_size, kv_block_size)
    keys, weights = _stride_groups(key, order, kv_real, stride, flip=True)
    query_real = unpadded_positions(query_length, query_block_size, query.device)
    query_blocks, kv_blocks = query_real.shape[1], kv_real.shape[1]
    kv_groups = keys.shape[2]
    keys = keys.transpose(2, 3)
    bias = _count_bias(weights)[:, None, None, :]
    score = keys.new_empty(batch, heads, query_blocks, kv_blocks)
    energy = torch.empty_like(score)
    per_block = query_block_size // stride
    step = _score_chunk(keys, batch * heads * per_block * kv_groups)
    for start in range(0, query_blocks, step):
        stop = min(start + step, query_blocks)
        rows, counts = _stride_groups(query, order, query_real, stride, start=start, stop=stop)
        logits = rows @ keys * (scale / stride) + bias
        shares = torch.softmax(logits, dim=-1).view(batch, heads, stop - start, per_block, kv_blocks, -1)
        shares = shares.permute(0, 1, 3, 2, 5, 4)
        valid = (counts > 0).view(1, 1, stop - start, per_block, 1).transpose(2, 3)
        _reduce(shares, valid, reduction, score[:, :, start:stop], energy[:, :, start:stop])
    return Importance(score, energy)


def _stride_groups(
    tokens: Tensor,
    order: Tensor | None,
    real: Tensor,
    stride: int,
    *,
    flip: bool = False,
    start: int = 0,
    stop: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Groups of consecutive tokens as one long row each [batch, heads, groups, stride * head_dim], and their counts."""
    batch, _, heads, head_dim = tokens.shape
    stop = real.shape[1] if stop is None else stop
    rows = block_rows(tokens, order, real, start, stop, real.shape[2])
    rows = rows.view(batch, -1, stride, heads, head_dim)
    inside = real[:, start:stop].reshape(real.shape[0], -1, stride)
    counts = inside.sum(2)
    mean = rows.sum(2, keepdim=True) / counts.clamp(min=1)[:, :, None, None, None]
    rows = torch.where(inside[:, :, :, None, None], rows, mean)
    rows = rows.flip(2) if flip else rows
    return rows.permute(0, 3, 1, 2, 4).reshape(batch, heads, -1, stride * head_dim), counts.to(torch.float32)
