"""How much of the value correction each head wants, measured on a few of its queries.

The value correction (:mod:`~psa_diffusers.backends.covariance`) gives back ``c = scale * lost mass * C q``. It is exact
for small logits inside a group and wrong for large ones, where a few keys take all: there it can do harm. So a few
queries of every head are computed in full and by the plan, and the gain is what fits best,
``g = sum <dense - sparse, c> / sum <c, c>``, in [0, GAIN_LIMIT].

Nothing is pooled for it. The logit of a pooled key is the mean of its group's logits, since it is linear in the key;
and ``C q`` is the mean over tokens of ``value x (logit - mean logit of its group)``. So one product with the keys and
one with the values make all of it: for ROWS queries, (num_levels + 3) x ROWS / 2 / tokens of dense attention's work.
The logit correction is left out of the fit, since that would be a pass over all keys a level.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.logit_variance import logit_correction

ROWS = 16
GAIN_LIMIT = 1.5


def measure_value_gain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    order: Tensor | None,
    real: Tensor | None,
    *,
    query_block_size: int,
    kv_block_size: int,
    num_levels: int,
    scale: float,
    seed: int,
) -> Tensor:
    """The gain of every head, float32 [batch, heads].

    Args:
        query, key, value: [batch, seq, heads, head_dim].
        levels: int8 [batch, heads, query_blocks, kv_blocks], all above 0 where a block has real keys.
        order: int64 [seq], the token at each position of the block order; None = raster.
        real: bool [batch, kv_blocks, kv_block_size] where keys are padded, else None.
    """
    parts = rows_by_plan(
        *(query, key, value, levels, order, real, seed, ROWS),
        query_block_size=query_block_size,
        kv_block_size=kv_block_size,
        num_levels=num_levels,
        scale=scale,
    )
    return torch.cat([_gain(rows).view(len(query), -1) for rows in parts], 1)


class Rows(NamedTuple):
    """Some rows of some heads, [batch * heads, rows, head_dim] each: the dense output, what the plan's lacks of it, and
    the value correction."""

    dense: Tensor
    lost: Tensor
    correction: Tensor


def rows_by_plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    order: Tensor | None,
    real: Tensor | None,
    seed: int,
    count: int,
    *,
    query_block_size: int,
    kv_block_size: int,
    num_levels: int,
    scale: float,
    power: Tensor | None = None,
) -> Iterator[Rows]:
    """``count`` rows, computed in full and by the plan, a few heads at a time in their order; arguments as above.

    ``power`` [batch, heads, head_dim] is that of the queries, for the logit correction; None = without.
    """
    batch, heads, _, kv_blocks = levels.shape
    positions = _rows_on(query.shape[1], seed, str(query.device), count)
    rows, block = positions if order is None else order[positions], positions // query_block_size
    queries = query.index_select(1, rows).float() * scale
    inside = _in_blocks(key.shape[1], kv_blocks, kv_block_size, key.device) if real is None else real
    # Some heads at a time: their logits, and what is made of them, are a few times rows x tokens in float32.
    limit = 2**18 if query.device.type == "cpu" else 2**25
    step = max(1, limit // (batch * len(rows) * key.shape[1]))
    for part in torch.arange(heads).split(step):
        some = slice(int(part[0]), int(part[-1]) + 1)
        keys, values = (_blocks(_heads_first(x[:, :, some]), order, inside, len(part)) for x in (key, value))
        logits = torch.bmm(_heads_first(queries[:, :, some]), keys.flatten(1, 2).mT).unflatten(2, keys.shape[1:3])
        some_levels = levels[:, some].index_select(2, block).flatten(0, 1)
        head_inside, corrections = _of_heads(inside, len(part)), None
        if power is not None:
            corrections = _corrections(keys, head_inside, power[:, some].flatten(0, 1), num_levels, scale)
        yield _both_ways(logits, values, head_inside, some_levels, num_levels, corrections)


def sampled_rows(length: int, seed: int, count: int | None = None) -> Tensor:
    """int64 [rows] on the CPU: positions, one in each of as many equal parts of the sequence; ROWS of them."""
    rows = min(ROWS if count is None else count, length)
    jitter = torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((torch.arange(rows) + jitter) * (length / rows)).long().clamp(max=length - 1)


@lru_cache(maxsize=64)
def _rows_on(length: int, seed: int, device: str, count: int) -> Tensor:
    """The same on the device, copied there once."""
    return sampled_rows(length, seed, count).to(device)


def _heads_first(tokens: Tensor) -> Tensor:
    """[batch * heads, seq, head_dim] of [batch, seq, heads, head_dim]."""
    return tokens.transpose(1, 2).flatten(0, 1)


def _of_heads(inside: Tensor, heads: int) -> Tensor:
    """bool [batch * heads or 1, blocks, block size] of [batch or 1, blocks, block size]."""
    return inside if len(inside) == 1 else inside.repeat_interleave(heads, 0)


def _gain(rows: Rows) -> Tensor:
    """[batch * heads]: how much of the correction fits best."""
    power = rows.correction.square().sum((1, 2))
    fitted = (rows.lost * rows.correction).sum((1, 2)) / power
    return torch.where(power > 0, fitted, 0.0).clamp_(0.0, GAIN_LIMIT)


def _group_sizes(block_size: int, num_levels: int) -> list[int]:
    """Of levels 2 .. num_levels and the centroid."""
    return [2**level for level in range(1, num_levels)] + [block_size]


def _corrections(keys: Tensor, inside: Tensor, power: Tensor, num_levels: int, scale: float) -> list[Tensor]:
    """For each level from 2 on the logit correction of every token's group, [batch, 1, blocks, block size].

    keys [batch, blocks, block size, head_dim], inside bool [batch or 1, blocks, block size], power [batch, head_dim].
    """
    found = []
    for size in _group_sizes(keys.shape[2], num_levels):
        groups, real = keys.unflatten(2, (-1, size)), inside.unflatten(2, (-1, size))[..., None]
        count = real.sum(3, keepdim=True)
        gaps = (groups - groups.sum(3, keepdim=True) / count.clamp(min=1)).square_().mul_(real)
        squares = (gaps.flatten(1, 3) @ power[:, :, None]).view(*gaps.shape[:4]).sum(3)
        count = count[..., 0, 0]
        each = logit_correction(squares / count.clamp(min=1), count.log(), scale)
        found.append(each.repeat_interleave(size, 2)[:, None])
    return found


def _both_ways(
    logits: Tensor,
    values: Tensor,
    inside: Tensor,
    levels: Tensor,
    num_levels: int,
    corrections: list[Tensor] | None,
) -> Rows:
    """Of a head: logits [batch, rows, blocks, block size], values [batch, blocks, block size, head_dim],
    inside bool [batch or 1, blocks, block size], levels int8 [batch, rows, blocks]."""
    inside = inside[:, None]
    logits = torch.where(inside, logits, 0.0)
    coarse, gaps = logits, []
    for level, size in enumerate(_group_sizes(logits.shape[3], num_levels), start=2):
        pooled = _group_means(logits, inside, size)
        gaps.append(logits - pooled)
        if corrections is not None:
            pooled = pooled + corrections[level - 2]
        coarse = torch.where((levels == level)[..., None], pooled, coarse)
    dense, sparse = (
        torch.softmax(x.masked_fill(~inside, -torch.inf).flatten(2), -1).view_as(x) for x in (logits, coarse)
    )
    tokens = inside.sum((2, 3), keepdim=True).clamp(min=1)
    flat = torch.stack([dense, dense - sparse, *(gap * inside / tokens for gap in gaps)]).flatten(3)
    exact, error, *shifts = torch.einsum("xbrn,bnd->xbrd", flat, values.flatten(1, 2))  # [batch, rows, head_dim] each
    mass, whole = sparse.sum(3), shifts[-1]
    lost = sum(
        (mass * (levels == level)).sum(2) * _share(shift, whole)[:, None] for level, shift in enumerate(shifts, start=2)
    )
    return Rows(exact, error, lost[..., None] * whole)


def _share(shift: Tensor, whole: Tensor) -> Tensor:
    """[batch]: how much of the whole correction a level loses, as these rows [batch, rows, head_dim] have it."""
    power = whole.square().sum((1, 2))
    return torch.where(power > 0, (shift * whole).sum((1, 2)) / power, 0.0).clamp(0.0, 1.0)


def _group_means(logits: Tensor, inside: Tensor, size: int) -> Tensor:
    """Like logits: every token's is the mean over the real tokens of its group of ``size``."""
    groups, real = logits.unflatten(3, (-1, size)), inside.unflatten(3, (-1, size))
    means = groups.sum(4, keepdim=True) / real.sum(4, keepdim=True).clamp(min=1)
    return means.expand_as(groups).flatten(3)


def _in_blocks(length: int, blocks: int, size: int, device: torch.device) -> Tensor:
    return (torch.arange(blocks * size, device=device) < length).view(1, blocks, size)


def _blocks(tokens: Tensor, order: Tensor | None, inside: Tensor, heads: int) -> Tensor:
    """float32 [batch * heads, blocks, block size, head_dim] of [batch * heads, seq, head_dim]; 0 beyond the end."""
    rows = (tokens if order is None else tokens.index_select(1, order)).float()
    missing = inside.shape[1] * inside.shape[2] - rows.shape[1]
    rows = torch.nn.functional.pad(rows, (0, 0, 0, missing)).unflatten(1, inside.shape[1:])
    return torch.where(_of_heads(inside, heads)[..., None], rows, 0.0)


def measure_row_errors(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    order: Tensor | None,
    real: Tensor | None,
    *,
    power: Tensor | None,
    value_correction: str,
    seed: int,
    count: int,
    **sizes: float,
) -> Tensor:
    """Relative squared error [batch, heads] of the plan's output, on ``count`` rows; arguments as above."""
    found = []
    for rows in rows_by_plan(query, key, value, levels, order, real, seed, count, power=power, **sizes):
        share = {"none": 0.0, "covariance": 1.0}.get(value_correction)
        gain = _gain(rows)[:, None, None] if share is None else share
        lost = (rows.lost - gain * rows.correction).square().sum((1, 2))
        power = rows.dense.square().sum((1, 2)).clamp(min=torch.finfo(torch.float32).tiny)
        found.append((lost / power).view(len(query), -1))
    return torch.cat(found, 1)
