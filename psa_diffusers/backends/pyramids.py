"""One head's keys and values at every level in one table, for the torch backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..planning.plan import Plan


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
    """One head's keys, values and, when asked for, variances of the keys (a channel at a time)."""

    key: Tensor  # [rows, head_dim] means over real tokens; 0 without any
    value: Tensor  # [rows, head_dim]
    variance: Tensor | None  # [rows, head_dim]
    log_count: Tensor  # [rows] ln(real tokens); -inf without any
    block_has_real: Tensor | None  # bool [blocks]; None: all have


def build_head_pyramid(
    key: Tensor,
    value: Tensor,
    layout: Layout,
    precise: torch.dtype,
    *,
    order: Tensor | None,
    real: Tensor | None,
    with_variance: bool,
) -> HeadPyramid:
    """The pyramid of key and value [key_length, head_dim].

    Args:
        key, value: In raster order, any floating dtype and strides.
        precise: dtype of the pyramid.
        order: int64 [key_length], the token at each position; None = raster.
        real: bool [key_length] in block order; None = all are real.
        with_variance: Also measure the variances.
    """
    rows, length = layout.empty_row + 1, len(key)
    tables = [_fine_table(tokens, rows, precise, order, real) for tokens in (key, value)]
    if with_variance:
        tables.append(key.new_zeros(rows, key.shape[1], dtype=precise))
    count = key.new_zeros(rows, dtype=precise)
    count[:length] = 1 if real is None else real
    for table in (*tables, count):
        table[length : layout.starts[1]] = 0
        table[layout.empty_row] = 0
    even = real is None and length == layout.starts[1]
    for level in range(1, layout.num_levels + 1):
        fine, coarse = (slice(layout.starts[item], layout.starts[item + 1]) for item in (level - 1, level))
        parts, part_count = [table[fine] for table in tables], count[fine]
        while len(part_count) > coarse.stop - coarse.start:
            parts, part_count = _halve(parts, part_count, even)
        for table, part in zip((*tables, count), (*parts, part_count), strict=True):
            table[coarse] = part
    has_real = None if even else count[layout.starts[-2] : layout.empty_row] > 0
    return HeadPyramid(tables[0], tables[1], tables[2] if with_variance else None, count.log(), has_real)


def _fine_table(tokens: Tensor, rows: int, precise: torch.dtype, order: Tensor | None, real: Tensor | None) -> Tensor:
    """A table [rows, head_dim] whose first rows are the tokens in block order, 0 where they are not real."""
    table = tokens.new_empty(rows, tokens.shape[1], dtype=precise)
    fine = table[: len(tokens)]
    if order is None:
        fine.copy_(tokens)
    elif tokens.dtype == precise:
        torch.index_select(tokens, 0, order, out=fine)
    else:
        fine.copy_(tokens.index_select(0, order))
    return table if real is None else table.index_fill_(0, (~real).nonzero()[:, 0], 0)


def _halve(tables: list[Tensor], count: Tensor, even: bool) -> tuple[list[Tensor], Tensor]:
    """Merge rows two by two: means, variances and counts of pairs, from tables [n, head_dim] and count [n]."""
    pairs = [table.unflatten(0, (-1, 2)) for table in tables]
    first, second = count.unflatten(0, (-1, 2)).unbind(1)
    total = first + second
    # The share of the first row's tokens; 1/2 but at the end of the sequence and beside padding.
    share = 0.5 if even else (first / total.clamp(min=1))[:, None]
    merged = [torch.lerp(pair[:, 1], pair[:, 0], share) for pair in pairs]
    if len(tables) == 3:
        merged[2] += share * (1 - share) * (pairs[0][:, 0] - pairs[0][:, 1]) ** 2
    return merged, total
