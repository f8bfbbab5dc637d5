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
    """One head's keys, values and, when asked for, variances of the keys (a channel at a time), in a table each."""

    tables: tuple[Tensor, ...]  # [blocks * rows a block, head_dim] each
    count: Tensor  # [blocks * rows a block] real tokens behind each row
    centroids: tuple[Tensor, ...]  # [blocks + 1, head_dim] each; the last one is empty, to fill reads up with
    centroid_count: Tensor  # [blocks + 1]


def build_head_pyramid(
    key: Tensor, value: Tensor, real: Tensor | None, layout: Layout, precise: torch.dtype, *, with_variance: bool
) -> HeadPyramid:
    """The pyramid of key and value [key_length, head_dim], given in block order; real: bool [key_length] or None."""
    length, head_dim = key.shape
    blocks, size, capacity = layout.blocks, layout.block_size, layout.blocks * layout.block_size
    tables = [key.new_empty(blocks, layout.rows, head_dim, dtype=precise) for _ in range(3 if with_variance else 2)]
    count = key.new_ones(blocks, layout.rows, dtype=precise)
    for table, tokens in zip(tables, (key, value), strict=False):
        _fill(table[:, :size], tokens, real)
    if with_variance:
        tables[2][:, :size] = 0
    even = length == capacity and real is None
    if not even:
        is_real = key.new_ones(length, dtype=torch.bool) if real is None else real
        count[:, :size] = torch.nn.functional.pad(is_real, (0, capacity - length)).view(blocks, size)
    start = 0
    for half in layout.sizes[1:]:
        fine, coarse = slice(start, start + 2 * half), slice(start + 2 * half, start + 3 * half)
        _halve(*(([*(table[:, part] for table in tables)], count[:, part]) for part in (fine, coarse)), even=even)
        start += 2 * half
    last, last_count = [table[:, start:] for table in tables], count[:, start:]
    for half in (size >> level for level in range(layout.levels, size.bit_length())):
        coarse = [table.new_empty(blocks, half, head_dim) for table in tables]
        coarse_count = count.new_empty(blocks, half)
        _halve((last, last_count), (coarse, coarse_count), even=even)
        last, last_count = coarse, coarse_count
    pad = torch.nn.functional.pad
    return HeadPyramid(
        tuple(table.flatten(0, 1) for table in tables),
        count.flatten(),
        tuple(pad(table[:, 0], (0, 0, 0, 1)) for table in last),
        pad(last_count[:, 0], (0, 1)),
    )


def _fill(target: Tensor, tokens: Tensor, real: Tensor | None) -> None:
    """Level 1: target [blocks, block_size, head_dim] from tokens [key_length, head_dim]; 0 for what is not real."""
    size = target.shape[1]
    whole = len(tokens) // size
    if real is not None:
        tokens = tokens.where(real[:, None], 0)
    if whole:
        target[:whole] = tokens[: whole * size].unflatten(0, (whole, size))
    if whole < len(target):
        tail = tokens[whole * size :]
        target[whole, : len(tail)] = tail
        target[whole, len(tail) :] = 0


def _halve(fine: tuple[list[Tensor], Tensor], coarse: tuple[list[Tensor], Tensor], *, even: bool) -> None:
    """Merge rows two by two: tables [blocks, n, head_dim] and count [blocks, n] from twice as many rows."""
    (fine_tables, fine_count), (coarse_tables, coarse_count) = fine, coarse
    torch.add(fine_count[:, 0::2], fine_count[:, 1::2], out=coarse_count)
    # The share of the first row's tokens; 1/2 but at the end of the sequence and beside padding.
    share = 0.5 if even else (fine_count[:, 0::2] / coarse_count.clamp(min=1))[..., None]
    for source, target in zip(fine_tables, coarse_tables, strict=True):
        target.copy_(torch.lerp(source[:, 1::2], source[:, 0::2], share))
    if len(fine_tables) == 3:
        between = fine_tables[0][:, 0::2] - fine_tables[0][:, 1::2]
        coarse_tables[2] += share * (1 - share) * between**2
