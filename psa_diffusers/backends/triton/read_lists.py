"""From a level mask to what the attention kernel follows: sorted block lists, their counts, and the launch order."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...gpu.kernel_launch import KernelLaunch
from ...planning.plan import Plan
from .tiles import LIST_CHUNK, ORDER_TILE


class ReadLists(NamedTuple):
    """What every row of query blocks reads. A row is one (batch, head, query block), counted in that order."""

    blocks: Tensor  # int16 or int32 [rows, kv_blocks]: kv blocks, by level and then by index; the rest is undefined
    counts: Tensor  # int32 [rows, num_levels + 1]: blocks read at level 1, ..., num_levels, as centroids
    launch_order: Tensor  # int32 [rows]: head by head, in each the rows with the most to read first


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
def launch_order_kernel(lengths, launch_order, query_blocks, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """One program: the places of ROWS rows of one head among its rows, longest first, ties by index.

    A row's place is the number of rows before it: counted, not sorted, so that places are independent of each other.
    """
    head = tl.program_id(1) * query_blocks
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    length = tl.load(lengths + head + row, mask=row < query_blocks, other=0)
    place = tl.zeros([ROWS], tl.int32)
    for start in range(0, query_blocks, CHUNK):
        other = start + tl.arange(0, CHUNK)
        other_length = tl.load(lengths + head + other, mask=other < query_blocks, other=-1)
        is_tied = (other_length[None, :] == length[:, None]) & (other[None, :] < row[:, None])
        is_before = (other_length[None, :] > length[:, None]) | is_tied
        place += tl.sum(is_before.to(tl.int32), axis=1)
    tl.store(launch_order + head + place, head + row, mask=row < query_blocks)


def read_lists(plan: Plan, device: torch.device) -> ReadLists:
    """The plan's lists on a device, made there without synchronisation and kept in the plan's cache.

    Rows of one head are neighbours in the launch order, so that its keys and values stay in the L2 cache; the longest
    come first, so that the last to run are short and no processor is left alone with a long one.
    """
    lists = plan.cache.get(("triton", device))
    if lists is None:
        lists = ReadLists(*make_read_lists(plan.level_mask.to(device), plan.num_levels, plan.kv_block_size))
        plan.cache[("triton", device)] = lists
    return lists


@torch.library.custom_op("psa_diffusers::make_read_lists", mutates_args=())
def make_read_lists(level_mask: Tensor, num_levels: int, kv_block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of :class:`ReadLists`, from an int8 level mask [batch, heads, query_blocks, kv_blocks]."""
    query_blocks = level_mask.shape[2]
    lists, lengths = empty_read_lists(level_mask, num_levels)
    read_lists_launch(level_mask.contiguous(), lists, lengths, kv_block_size).run()
    launch_order_launch(lengths, lists, query_blocks).run()
    return tuple(lists)


@make_read_lists.register_fake
def _(level_mask: Tensor, num_levels: int, kv_block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(empty_read_lists(level_mask, num_levels)[0])


def empty_read_lists(level_mask: Tensor, num_levels: int) -> tuple[ReadLists, Tensor]:
    """Buffers for the lists of a level mask, and for int32 [rows], how many packed rows each row reads."""
    rows, kv_blocks = level_mask.shape[:3].numel(), level_mask.shape[3]
    index_dtype = torch.int16 if kv_blocks <= torch.iinfo(torch.int16).max else torch.int32
    blocks = level_mask.new_empty(rows, kv_blocks, dtype=index_dtype)
    counts = level_mask.new_empty(rows, num_levels + 1, dtype=torch.int32)
    launch_order = level_mask.new_empty(rows, dtype=torch.int32)
    lengths = torch.empty_like(launch_order)
    return ReadLists(blocks, counts, launch_order), lengths


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
        "CHUNK": min(LIST_CHUNK, triton.next_power_of_2(kv_blocks)),
    }
    return KernelLaunch(read_lists_kernel, (rows,), arguments, num_warps=1)


def launch_order_launch(lengths: Tensor, lists: ReadLists, query_blocks: int) -> KernelLaunch:
    """The launch that fills the launch order of ``lists`` from what :func:`read_lists_launch` left in ``lengths``."""
    arguments = {
        "lengths": lengths,
        "launch_order": lists.launch_order,
        "query_blocks": query_blocks,
        "ROWS": ORDER_TILE[0],
        "CHUNK": ORDER_TILE[1],
    }
    grid = (triton.cdiv(query_blocks, ORDER_TILE[0]), len(lengths) // query_blocks)
    return KernelLaunch(launch_order_kernel, grid, arguments, num_warps=4)
