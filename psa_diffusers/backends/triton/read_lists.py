"""From a level mask to what the attention kernel follows: sorted block lists, counts, and the launch order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...gpu.eager import is_plain
from ...gpu.kernel_launch import KernelLaunch
from ...gpu.recipe import Recipes, Recording
from ...gpu.sizes import ceil_div, next_power_of_2
from ...planning.plan import LEVEL_TOTALS, Plan
from .tiles import LIST_CHUNK, ORDER_TILE


class ReadLists(NamedTuple):
    """What every row of query blocks reads. A row is one (batch, head, query block), counted in that order."""

    blocks: Tensor  # int16 or int32 [rows, kv_blocks]: kv blocks, by level and then by index; the rest is undefined
    counts: Tensor  # int32 [rows, num_levels + 1]: blocks read at level 1, ..., num_levels, as centroids
    launch_order: Tensor  # int32 [rows]: head by head, in each the rows with the most to read first
    read_by_all: Tensor  # uint8 [batch, heads, kv_blocks]: 1 where every query block of the head reads the block
    totals: Tensor  # int64 [batch, heads, num_levels + 2]: block pairs that are skipped, at level 1, ..., as centroids


# Blocks of a chunk are counted at FIELDS levels at once, in one number: a field of 12 bits for each.
FIELDS = 5


@triton.jit
def _fields_of(level_mask, block, kv_blocks, first, LEVELS: tl.constexpr, FIELDS: tl.constexpr):
    """The field that a block counts in, from 0, and int64 with 1 in that field; 0 where its level is in none."""
    level = tl.load(level_mask + block, mask=block < kv_blocks, other=0).to(tl.int32)
    field = level - first
    is_counted = (field >= 0) & (field < FIELDS) & (level <= LEVELS + 1)
    field = tl.where(is_counted, field, 0)
    return field, tl.where(is_counted, tl.full(field.shape, 1, tl.int64) << (field * 12).to(tl.int64), 0)


@triton.jit
def _field(fields, number):
    return ((fields >> (number * 12).to(tl.int64)) & 4095).to(tl.int32)


@triton.jit
def read_lists_kernel(
    level_mask,
    blocks,
    counts,
    lengths,
    kv_blocks,
    LEVELS: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    FIELDS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: one row of the level mask, compacted level by level. Skip (0) and unknown levels are in no list."""
    row = tl.program_id(0).to(tl.int64)
    level_mask += row * kv_blocks
    blocks += row * kv_blocks
    length = 0
    written = 0
    field = tl.arange(0, 8)
    for first in tl.static_range(1, LEVELS + 2, FIELDS):
        count = tl.zeros([8], tl.int32)
        for start in range(0, kv_blocks, CHUNK):
            _, ones = _fields_of(level_mask, start + tl.arange(0, CHUNK), kv_blocks, first, LEVELS, FIELDS)
            count += _field(tl.sum(ones, axis=0), tl.minimum(field, FIELDS - 1))
        level = first + field
        is_level = (field < FIELDS) & (level <= LEVELS + 1)
        count = tl.where(is_level, count, 0)
        tl.store(counts + row * (LEVELS + 1) + level - 1, count, mask=is_level)
        length += tl.sum(count * tl.where(level <= LEVELS, KV_BLOCK >> tl.minimum(level - 1, LEVELS), 1), axis=0)
        place = written + tl.cumsum(count, axis=0) - count  # where the next block of each level goes
        for start in range(0, kv_blocks, CHUNK):
            block = start + tl.arange(0, CHUNK)
            of_block, ones = _fields_of(level_mask, block, kv_blocks, first, LEVELS, FIELDS)
            slot = _field(tl.cumsum(ones, axis=0) - ones, of_block)
            for number in tl.static_range(FIELDS):
                slot += tl.where(of_block == number, tl.sum(tl.where(field == number, place, 0), axis=0), 0)
            tl.store(blocks + slot, block.to(blocks.dtype.element_ty), mask=ones > 0)
            place += tl.where(field < FIELDS, _field(tl.sum(ones, axis=0), tl.minimum(field, FIELDS - 1)), 0)
        written += tl.sum(count, axis=0)
    tl.store(lengths + row, length)


@triton.jit
def _order_rows(lengths, launch_order, head, first, query_blocks, ROWS: tl.constexpr, COMPARED: tl.constexpr):
    """The places of ROWS rows of one head among its rows, longest first, ties by index.

    A row's place is the number of rows before it: counted, not sorted, so that places are independent of each other.
    """
    row = first + tl.arange(0, ROWS)
    length = tl.load(lengths + head * query_blocks + row, mask=row < query_blocks, other=0)
    place = tl.zeros([ROWS], tl.int32)
    for start in range(0, query_blocks, COMPARED):
        other = start + tl.arange(0, COMPARED)
        other_length = tl.load(lengths + head * query_blocks + other, mask=other < query_blocks, other=-1)
        is_tied = (other_length[None, :] == length[:, None]) & (other[None, :] < row[:, None])
        is_before = (other_length[None, :] > length[:, None]) | is_tied
        place += tl.sum(is_before.to(tl.int32), axis=1)
    tl.store(launch_order + head * query_blocks + place, head * query_blocks + row, mask=row < query_blocks)


@triton.jit
def _find_read_by_all(
    level_mask, read_by_all, head, first, query_blocks, kv_blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Which of COLUMNS kv blocks every row of the head reads."""
    column = first + tl.arange(0, COLUMNS)
    level_mask += head.to(tl.int64) * query_blocks * kv_blocks
    least = tl.full([COLUMNS], 1, tl.int32)
    for start in range(0, query_blocks, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < query_blocks)[:, None] & (column < kv_blocks)[None, :]
        levels = tl.load(level_mask + row.to(tl.int64)[:, None] * kv_blocks + column[None, :], mask=inside, other=1)
        least = tl.minimum(least, tl.min(levels.to(tl.int32), axis=0))
    tl.store(read_by_all + head * kv_blocks + column, (least > 0).to(tl.uint8), mask=column < kv_blocks)


@triton.jit
def _add_up(
    counts, totals, head, query_blocks, kv_blocks, LEVELS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr
):
    """How many block pairs of a head there are at each level."""
    level = tl.arange(0, LANES)  # less one; centroids come last
    total = tl.zeros([LANES], tl.int32)
    for start in range(0, query_blocks, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < query_blocks)[:, None] & (level <= LEVELS)[None, :]
        place = (head * query_blocks + row)[:, None] * (LEVELS + 1) + level[None, :]
        total += tl.sum(tl.load(counts + place, mask=inside, other=0), axis=0)
    totals += head * (LEVELS + 2)
    tl.store(totals + 1 + level, total.to(tl.int64), mask=level <= LEVELS)
    tl.store(totals, (query_blocks * kv_blocks - tl.sum(total, axis=0)).to(tl.int64))


@triton.jit
def launch_order_kernel(
    level_mask,
    counts,
    lengths,
    launch_order,
    read_by_all,
    totals,
    query_blocks,
    kv_blocks,
    LEVELS: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: what is to be known of one head, for ROWS of its rows and CHUNK of its kv blocks.

    Three small things in one kernel, since a launch takes the host longer than they take the GPU.
    """
    part = tl.program_id(0)
    head = tl.program_id(1)
    if part * ROWS < query_blocks:
        _order_rows(lengths, launch_order, head, part * ROWS, query_blocks, ROWS, CHUNK)
    if part * CHUNK < kv_blocks:
        _find_read_by_all(level_mask, read_by_all, head, part * CHUNK, query_blocks, kv_blocks, ROWS, CHUNK)
    if part == 0:
        _add_up(counts, totals, head, query_blocks, kv_blocks, LEVELS, LANES, CHUNK)


_RECIPES = Recipes()  # of :func:`make_read_lists`


def read_lists(plan: Plan, device: torch.device) -> ReadLists:
    """The plan's lists on a device, made there without synchronisation and kept in the plan's cache.

    Rows of one head are neighbours in the launch order, so that its keys and values stay in the L2 cache; the longest
    come first, so that the last to run are short and no processor is left alone with a long one.
    """
    lists = plan.cache.get(("triton", device))
    if lists is None:
        level_mask = plan.level_mask.to(device)
        make = fill_read_lists if is_plain(level_mask) else make_read_lists
        lists = ReadLists(*make(level_mask, plan.num_levels, plan.kv_block_size))
        plan.cache[("triton", device)] = lists
        if lists.totals.device == plan.level_mask.device:
            plan.cache[LEVEL_TOTALS] = lists.totals
    return lists


def fill_read_lists(
    level_mask: Tensor, num_levels: int, kv_block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of :class:`ReadLists`, from an int8 level mask [batch, heads, query_blocks, kv_blocks]."""

    def record(inputs: Sequence[Tensor]) -> Recording:
        lists, lengths = empty_read_lists(*inputs, num_levels)
        launches = [
            read_lists_launch(*inputs, lists, lengths, kv_block_size),
            launch_order_launch(*inputs, lists, lengths),
        ]
        return Recording([(launch, launch.run()) for launch in launches], lists)

    return tuple(_RECIPES.run((num_levels, kv_block_size), (level_mask.contiguous(),), record))


# The same as one operation of a compiled graph.
make_read_lists = torch.library.custom_op("psa_diffusers::make_read_lists", fill_read_lists, mutates_args=())


@make_read_lists.register_fake
def _(level_mask: Tensor, num_levels: int, kv_block_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(empty_read_lists(level_mask, num_levels)[0])


def empty_read_lists(level_mask: Tensor, num_levels: int) -> tuple[ReadLists, Tensor]:
    """Buffers for the lists of a level mask, and for int32 [rows], how many packed rows each row reads."""
    batch, heads, query_blocks, kv_blocks = level_mask.shape
    rows = batch * heads * query_blocks
    index_dtype = torch.int16 if kv_blocks <= torch.iinfo(torch.int16).max else torch.int32
    blocks = level_mask.new_empty(rows, kv_blocks, dtype=index_dtype)
    counts = level_mask.new_empty(rows, num_levels + 1, dtype=torch.int32)
    launch_order = level_mask.new_empty(rows, dtype=torch.int32)
    read_by_all = level_mask.new_empty(batch, heads, kv_blocks, dtype=torch.uint8)
    totals = level_mask.new_empty(batch, heads, num_levels + 2, dtype=torch.int64)
    return ReadLists(blocks, counts, launch_order, read_by_all, totals), torch.empty_like(launch_order)


def read_lists_launch(level_mask: Tensor, lists: ReadLists, lengths: Tensor, kv_block_size: int) -> KernelLaunch:
    """The launch that fills the blocks and counts of ``lists``, and ``lengths``, from a contiguous level mask."""
    rows, kv_blocks = lists.blocks.shape
    arguments = {
        "level_mask": level_mask,
        "blocks": lists.blocks,
        "counts": lists.counts,
        "lengths": lengths,
        "kv_blocks": kv_blocks,
        "LEVELS": lists.counts.shape[1] - 1,
        "KV_BLOCK": kv_block_size,
        "FIELDS": FIELDS,
        "CHUNK": min(LIST_CHUNK, next_power_of_2(kv_blocks)),
    }
    return KernelLaunch(read_lists_kernel, (rows,), arguments, num_warps=1)


def launch_order_launch(level_mask: Tensor, lists: ReadLists, lengths: Tensor) -> KernelLaunch:
    """The launch that fills the rest of ``lists``, from what :func:`read_lists_launch` left in them and ``lengths``."""
    batch, heads, query_blocks, kv_blocks = level_mask.shape
    rows, chunk = ORDER_TILE
    num_levels = lists.counts.shape[1] - 1
    arguments = {
        "level_mask": level_mask,
        "counts": lists.counts,
        "lengths": lengths,
        "launch_order": lists.launch_order,
        "read_by_all": lists.read_by_all,
        "totals": lists.totals,
        "query_blocks": query_blocks,
        "kv_blocks": kv_blocks,
        "LEVELS": num_levels,
        "LANES": next_power_of_2(num_levels + 1),
        "ROWS": rows,
        "CHUNK": chunk,
    }
    parts = max(ceil_div(query_blocks, rows), ceil_div(kv_blocks, chunk))
    return KernelLaunch(launch_order_kernel, (parts, batch * heads), arguments, num_warps=8)
