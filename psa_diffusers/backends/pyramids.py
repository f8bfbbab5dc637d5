"""One head's keys and values at every level in one table, for the torch backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..planning.plan import Plan
from .covariance import CovarianceSum
from .logit_variance import logit_correction

_MOST_NUMBERS = 2**16  # in a copy of keys at a time: what a cache holds, and little beside keys and values


@dataclass(frozen=True)
class Layout:
    """Where the rows of each level lie: all of level 1, block after block, then all of level 2, ..., the centroids, and
    one empty row."""

    blocks: int
    block_size: int
    num_levels: int

    @classmethod
    def of(cls, plan: Plan) -> Layout:
        return cls(plan.kv_blocks, plan.kv_block_size, plan.num_levels)

    @property
    def sizes(self) -> list[int]:
        """Rows a block at level 1 .. num_levels, and as a centroid."""
        return [self.block_size >> level for level in range(self.num_levels)] + [1]

    @property
    def starts(self) -> list[int]:
        """First row of each level, and of the empty row."""
        starts = [0]
        for size in self.sizes:
            starts.append(starts[-1] + self.blocks * size)
        return starts

    @property
    def empty_row(self) -> int:
        return self.starts[-1]


@dataclass(frozen=True)
class HeadPyramid:
    """One head's keys and values and, when asked for, covariance of the two."""

    tables: tuple[Tensor, Tensor]  # [rows, head_dim] each: means over real tokens (keys scaled); 0 without any
    bias: Tensor  # [rows] ln(real tokens), and the logit correction if it was asked for; -inf without any token
    block_has_real: Tensor | None  # bool [blocks]; None: all have
    covariance: Tensor | None  # [head_dim (of values), head_dim (of scaled keys)]; None unless asked for
    row_shares: Tensor | None  # [rows] how much of the covariance each row's level loses


def build_head_pyramid(
    key: Tensor,
    value: Tensor,
    layout: Layout,
    tables: tuple[Tensor, Tensor],
    scale: float,
    *,
    order: Tensor | None,
    real: Tensor | None,
    counted: Tensor | None = None,
    power: Tensor | None = None,
) -> HeadPyramid:
    """The pyramid of key and value [key_length, head_dim].

    Args:
        key, value: In raster order, any floating dtype and strides.
        tables: [empty_row + 1, head_dim] each, to be written: keys and values.
        scale: Factor of the keys.
        order: int64 [key_length], the token at each position; None = raster.
        real: bool [key_length] in block order; None = all are real.
        counted: bool [blocks], those that count in the covariance; None = no covariance.
        power: [head_dim], of the head's queries, for the logit correction; None = no correction.
    """
    length, capacity = len(key), layout.starts[1]
    for table, tokens in zip(tables, (key, value), strict=False):
        take(tokens, order, out=table[:length])
        if real is not None:
            table.index_fill_(0, (~real).nonzero()[:, 0], 0)
    tables[0][:length] *= scale
    count = tables[0].new_zeros(len(tables[0]))
    count[:length] = 1 if real is None else real
    for table in tables:
        table[length:capacity] = 0
        table[layout.empty_row] = 0
    variance = None if power is None else torch.zeros_like(count)
    even = real is None and length == capacity
    products = None if counted is None else CovarianceSum(tables[0], counted, capacity if even else None)
    for level in range(1, layout.num_levels + 1):
        fine, coarse = (slice(layout.starts[item], layout.starts[item + 1]) for item in (level - 1, level))
        rows, pooled = ([table[part] for table in tables] for part in (fine, coarse))
        _merge(rows, count[fine], pooled, count[coarse], even, products)
        if variance is not None:
            variance[coarse] = _merged_variance(rows[0], count[fine], variance[fine], pooled[0], count[coarse], power)
        if products is not None:
            products.finish_level()
    bias = count.log()
    if variance is not None:
        bias += logit_correction(variance, bias, 1.0)  # the keys are scaled
    centroids = count[layout.starts[-2] : layout.empty_row]
    has_real = None if even else centroids > 0
    if products is None:
        return HeadPyramid(tables, bias, has_real, None, None)
    covariance, shares = products.covariance(centroids)
    rows = torch.tensor([size * layout.blocks for size in layout.sizes] + [1], device=key.device)
    shares = torch.cat([shares[1:], shares[:1]]).repeat_interleave(rows)  # the empty row is a skipped one
    return HeadPyramid(tables, bias, has_real, covariance, shares)


def take(tokens: Tensor, order: Tensor | None, *, out: Tensor) -> None:
    """Tokens [length, ...], in the order, converted to the dtype of ``out`` and written there."""
    # Into strided memory index_select goes row by row.
    if order is not None and tokens.dtype == out.dtype and out.is_contiguous():
        torch.index_select(tokens, 0, order, out=out)
    else:
        out.copy_(tokens if order is None else tokens.index_select(0, order))


def _merge(
    fine: list[Tensor],
    fine_count: Tensor,
    coarse: list[Tensor],
    count: Tensor,
    even: bool,
    products: CovarianceSum | None,
) -> None:
    """Merge rows by twos until there are as many as in ``coarse`` and ``count``, and write them there."""
    while len(fine_count) > 2 * len(count):
        half = len(fine_count) // 2
        between = [table.new_empty(half, table.shape[1]) for table in fine]
        between_count = fine_count.new_empty(half)
        _halve(fine, fine_count, between, between_count, even, products)
        fine, fine_count = between, between_count
    _halve(fine, fine_count, coarse, count, even, products)


def _halve(
    fine: list[Tensor],
    fine_count: Tensor,
    coarse: list[Tensor],
    count: Tensor,
    even: bool,
    products: CovarianceSum | None,
) -> None:
    """Means and counts of pairs of rows: coarse [n, head_dim] and count [n] from twice as many rows."""
    first, second = fine_count.unflatten(0, (-1, 2)).unbind(1)
    torch.add(first, second, out=count)
    if products is not None:
        products.add(fine[0], fine[1], first, second)
    # The share of the first row's tokens; 1/2 but at the end of the sequence and beside padding.
    share = 0.5 if even else (first / count.clamp(min=1))[:, None]
    for source, target in zip(fine, coarse, strict=True):
        pair = source.unflatten(0, (-1, 2))
        torch.lerp(pair[:, 1], pair[:, 0], share, out=target)


def _merged_variance(
    means: Tensor, counts: Tensor, variance: Tensor, coarse: Tensor, count: Tensor, power: Tensor
) -> Tensor:
    """[n]: the variance of merged groups, weighed by ``power`` [head_dim], from their means ``coarse`` [n, head_dim]
    and tokens ``count`` [n], and from the means, counts and variances [m * n] of their parts."""
    groups = (len(count), -1)
    parts = means.unflatten(0, groups)
    step = max(1, _MOST_NUMBERS // parts[0].numel())
    pairs = zip(parts.split(step), coarse.split(step), strict=True)
    between = torch.cat([(part - mean[:, None]).square_() @ power for part, mean in pairs])
    shares = counts.view(groups) / count.clamp(min=1)[:, None]
    return (shares * (variance.view(groups) + between)).sum(1)
