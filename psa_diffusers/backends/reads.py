"""Which rows of a head's pyramid each block of queries reads, for the torch backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .pyramids import HeadPyramid, Layout

# Blocks of queries that read little go together, up to this many rows: alone they take less time than their operators.
MOST_ROWS_TOGETHER = 1024


class Reads(NamedTuple):
    """What some blocks of queries read, each of them as many rows."""

    blocks: int  # of queries
    queries: int  # in them
    rows: Tensor  # int32 [blocks * rows each] of the pyramid's table; lists are filled up with the empty row


def list_reads(
    levels: Tensor, pyramid: HeadPyramid, layout: Layout, query_block_size: int, query_length: int
) -> tuple[Tensor, list[Reads]]:
    """The reads of a head, the longest first.

    Args:
        levels: int8 [query_blocks, kv_blocks].
        pyramid, layout: Whose rows are read.
        query_block_size: Queries a block; the last block has what is left of ``query_length``.

    Returns:
        int64 [query_blocks], the blocks of queries in the order of the reads, and the reads.
    """
    device = levels.device
    if pyramid.block_has_real is not None:
        levels = levels * pyramid.block_has_real
    sizes, starts = (torch.tensor([0, *items], device=device) for items in (layout.sizes, layout.starts[:-1]))
    totals, order = sizes[levels.long()].sum(1).sort(descending=True, stable=True)
    blocks, last = order.tolist(), query_length - (len(levels) - 1) * query_block_size
    queries = [last if block == len(levels) - 1 else query_block_size for block in blocks]
    groups = _together(queries, _filled_up(totals).tolist())
    filled = torch.tensor([rows for members, rows in groups for _ in members], device=device)
    levels = levels[order].long()
    # A last, empty block fills each list up with the empty row.
    lengths = torch.cat([sizes[levels], (filled - totals)[:, None]], 1).flatten()
    first = starts[levels] + sizes[levels] * torch.arange(layout.blocks, device=device)
    first = torch.nn.functional.pad(first, (0, 1), value=layout.empty_row).flatten()
    before = lengths.cumsum(0) - lengths
    counts = [len(members) * rows for members, rows in groups]
    rows = torch.repeat_interleave((first - before).int(), lengths, output_size=sum(counts))
    rows += torch.arange(len(rows), device=device, dtype=torch.int32)
    parts = rows.clamp_(max=layout.empty_row).split(counts)
    return order, [Reads(len(members), sum(members), part) for (members, _), part in zip(groups, parts, strict=True)]


def _together(queries: list[int], rows: list[int]) -> list[tuple[list[int], int]]:
    """Runs of blocks of equally many queries, from what each block has and reads (falling).

    Returns the queries of each member, and the rows that the first of them reads.
    """
    groups: list[tuple[list[int], int]] = []
    for number, length in zip(queries, rows, strict=True):
        members, longest = groups[-1] if groups else ([], 0)
        fits = (len(members) + 1) * longest <= MOST_ROWS_TOGETHER
        # One that reads nothing at all has no softmax: not with others, which would fill its list up.
        if members and members[0] == number and fits and bool(length) == bool(longest):
            members.append(number)
        else:
            groups.append(([number], length))
    return groups


def _filled_up(rows: Tensor) -> Tensor:
    """Numbers of rows, rounded up by less than 1/32 (or to 16), so that there are few of them.

    oneDNN makes a kernel for every shape, which takes longer than to run it, and keeps the last thousand.
    """
    step = 2 ** (rows.clamp(min=1).double().log2().floor() - 5).clamp(min=4).to(rows.dtype)
    return (rows + step - 1) // step * step
