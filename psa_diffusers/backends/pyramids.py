"""The table of one head's keys and values at every level, for the torch backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..planning.plan import Plan


@dataclass(frozen=True)
class Layout:
    """Where the levels of a block lie in the table.

    A block has its level 1 rows, then its level 2 rows, and so on. All levels are whole numbers of granules, runs of as
    many rows as the coarsest level has in a block, so that lists of granules say what is read, whatever the levels.
    """

    blocks: int
    block_size: int
    levels: int

    @classmethod
    def of(cls, plan: Plan) -> Layout:
        return cls(plan.kv_blocks, plan.kv_block_size, plan.num_levels)

    @property
    def granule(self) -> int:
        return self.block_size >> (self.levels - 1)

    @property
    def sizes(self) -> list[int]:
        """Rows a block at each level."""
        return [self.block_size >> level for level in range(self.levels)]

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    def granules_of_level(self, device: torch.device) -> Tensor:
        """bool [levels + 2, granules a block]: which granules a level mask entry reads; none for skip and centroid."""
        table = torch.zeros(self.levels + 2, self.rows // self.granule, dtype=torch.bool)
        start = 0
        for level, size in enumerate(self.sizes, 1):
            table[level, start : start + size // self.granule] = True
            start += size // self.granule
        return table.to(device)


@dataclass(frozen=True)
class HeadPyramid:
    """Keys and values (and, when asked for, the variances of the keys) side by side in rows; head_dim wide each."""

    rows: Tensor  # [blocks * rows a block, 2 or 3 * head_dim]
    count: Tensor  # [blocks * rows a block] real tokens behind each row
    centroids: Tensor  # [blocks + 1, 2 or 3 * head_dim]; the last one is empty, to fill reads up with
    centroid_count: Tensor  # [blocks + 1]


def build_head_pyramid(
    key: Tensor, value: Tensor, real: Tensor | None, layout: Layout, precise: torch.dtype, *, with_variance: bool
) -> HeadPyramid:
    """The pyramid of key and value [key_length, head_dim], given in block order; real: bool [key_length] or None."""
    length, head_dim = key.shape
    blocks, size, capacity = layout.blocks, layout.block_size, layout.blocks * layout.block_size
    width = (3 if with_variance else 2) * head_dim
    rows = key.new_empty(blocks, layout.rows, width, dtype=precise)
    count = key.new_ones(blocks, layout.rows, dtype=precise)
    for column, tokens in enumerate((key, value)):
        _fill(rows[:, :size, column * head_dim : (column + 1) * head_dim], tokens, real)
    rows[:, :size, 2 * head_dim :] = 0
    even = length == capacity and real is None
    if not even:
        is_real = key.new_ones(length, dtype=torch.bool) if real is None else real
        count[:, :size] = torch.nn.functional.pad(is_real, (0, capacity - length)).view(blocks, size)
    start = 0
    for half in layout.sizes[1:]:
        fine = slice(start, start + 2 * half)
        start += 2 * half
        coarse = slice(start, start + half)
        _halve(rows[:, fine], count[:, fine], rows[:, coarse], count[:, coarse], head_dim, even)
    centroids, centroid_count = rows[:, start:], count[:, start:]
    while centroids.shape[1] > 1:
        half = centroids.shape[1] // 2
        coarse, coarse_count = centroids.new_empty(blocks, half, width), count.new_empty(blocks, half)
        _halve(centroids, centroid_count, coarse, coarse_count, head_dim, even)
        centroids, centroid_count = coarse, coarse_count
    filler = centroids.new_zeros(1, width)
    return HeadPyramid(
        rows.flatten(0, 1),
        count.flatten(),
        torch.cat([centroids[:, 0], filler]),
        torch.cat([centroid_count[:, 0], filler[0, :1]]),
    )


def _fill(target: Tensor, tokens: Tensor, real: Tensor | None) -> None:
    """Level 1: target [blocks, block_size, head_dim] from tokens [key_length, head_dim], 0 where there is no real one."""
    whole, size, head_dim = len(tokens) // target.shape[1], *target.shape[1:]
    if real is not None:
        tokens = tokens.where(real[:, None], 0)
    target[:whole] = tokens[: whole * size].unflatten(0, (whole, size)) if whole else target[:0]
    if whole < len(target):
        tail = tokens[whole * size :]
        target[whole, : len(tail)] = tail
        target[whole, len(tail) :] = 0


def _halve(fine: Tensor, fine_count: Tensor, coarse: Tensor, count: Tensor, head_dim: int, even: bool) -> None:
    """Merge rows two by two: coarse [blocks, n, width] and count [blocks, n] from fine [blocks, 2n, width]."""
    first, second = fine[:, 0::2], fine[:, 1::2]
    torch.add(fine_count[:, 0::2], fine_count[:, 1::2], out=count)
    # The share of the first row's tokens; 1/2 but at the end of the sequence and beside padding.
    share = 0.5 if even else (fine_count[:, 0::2] / count.clamp(min=1))[..., None]
    coarse.copy_(torch.lerp(second, first, share))
    if fine.shape[2] > 2 * head_dim:
        between = first[..., :head_dim] - second[..., :head_dim]
        coarse[..., 2 * head_dim :] += share * (1 - share) * between**2
