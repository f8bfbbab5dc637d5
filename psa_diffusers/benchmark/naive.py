"""Naive PSA, a rival: one launch a level, results merged by their lse, and a tile that is one pooled block.

What a straightforward implementation of the paper does, with the inner loop and the tile of the Triton kernel for all
GPUs. It reads the same blocks at the same levels; what it lacks is that tiles are taken apart from blocks: a tile of
the coarsest level holds as many rows as one pooled block has, filled up to the 16 that a matrix unit takes. It
computes no value correction. Nothing but the benchmark uses it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends.triton.tiles import attention_tile
from ..gpu.addressing import strided_pointers
from ..gpu.kernel_launch import KernelLaunch
from ..gpu.target import padded_head_dim, target_of
from ..planning.plan import Plan

SMALLEST_TILE = 16  # rows that a matrix product takes at least


class NaiveLevel(NamedTuple):
    """Keys and values at one level, in block order, blocks side by side."""

    key: Tensor  # [batch, heads, kv_blocks * rows_per_block, head_dim]
    value: Tensor
    bias: Tensor  # float32 [batch, kv_blocks * rows_per_block]: log2 of the real tokens behind a row, -inf for none


class NaiveLists(NamedTuple):
    """The kv blocks that each row of query blocks reads. A row is one (batch, head, query block)."""

    blocks: Tensor  # int32 [rows, kv_blocks]: by level, then by index
    stops: Tensor  # int32 [rows, num_levels + 2]: where each level's blocks begin in the list, and the last ones end
    launch_order: Tensor  # int32 [rows]: head by head, in each the rows with the most to read first


@triton.jit
def _load_rows(base, row, live, channel, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, IS_WHOLE: tl.constexpr):
    pointers = base + row.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :]  # [BN, BD]
    if IS_WHOLE and BLOCK_D == HEAD_DIM:
        rows = tl.load(pointers)
    else:
        rows = tl.load(pointers, mask=live[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
    return rows


@triton.jit
def naive_level_kernel(
    query,
    key,
    value,
    bias,
    blocks,
    stops,
    launch_order,
    order,
    before,
    out,
    lse,
    query_strides,
    before_strides,
    out_strides,
    scale,
    heads,
    query_length,
    query_blocks,
    kv_blocks,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    LEVEL: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: a tile of queries over the blocks of one level, merged with what ``before`` and ``lse`` hold.

    ``lse`` [batch, heads, query_length] is in units of ln 2. ``before`` None: nothing has been read yet.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    QUERY_TILES: tl.constexpr = (QUERY_BLOCK + BLOCK_M - 1) // BLOCK_M
    BLOCK_TILES: tl.constexpr = (BLOCK_ROWS + BLOCK_N - 1) // BLOCK_N
    row = tl.load(launch_order + tl.program_id(0) // QUERY_TILES)
    batch = (row // query_blocks // heads).to(tl.int64)
    head = (row // query_blocks % heads).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    in_block = tl.program_id(0) % QUERY_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    position = row % query_blocks * QUERY_BLOCK + in_block
    is_query = (in_block < QUERY_BLOCK) & (position < query_length)
    token = position.to(tl.int64)
    if order is not None:
        token = tl.load(order + position, mask=is_query, other=0)
    query_mask = is_query[:, None] & (channel < HEAD_DIM)[None, :]
    query_tile = tl.load(
        strided_pointers(query, query_strides, batch, head, token, channel), mask=query_mask, other=0.0
    )  # [BM, BD]
    base = (row // query_blocks).to(tl.int64) * kv_blocks * BLOCK_ROWS * HEAD_DIM
    key += base
    value += base
    bias += batch * kv_blocks * BLOCK_ROWS
    blocks += row.to(tl.int64) * kv_blocks
    stops += row.to(tl.int64) * (LEVELS + 2) + LEVEL - 1
    start = tl.load(stops)
    tiles = (tl.load(stops + 1) - start) * BLOCK_TILES

    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in range(0, tiles):
        block = tl.load(blocks + start + tile // BLOCK_TILES)
        in_rows = tile % BLOCK_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
        live = in_rows < BLOCK_ROWS
        key_row = block * BLOCK_ROWS + in_rows
        key_tile = _load_rows(key, key_row, live, channel, HEAD_DIM, BLOCK_D, BLOCK_ROWS % BLOCK_N == 0)
        row_bias = tl.load(bias + key_row, mask=live, other=float("-inf"))
        logits = tl.dot(query_tile, tl.trans(key_tile), input_precision="ieee")  # [BM, BN]
        logits = logits * (scale * LOG2E) + row_bias[None, :]
        new_max = tl.maximum(running_max, tl.max(logits, axis=1))
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(logits - finite_max[:, None])
        rescale = tl.exp2(running_max - finite_max)
        running_sum = running_sum * rescale + tl.sum(weights, axis=1)
        running_max = new_max
        value_tile = _load_rows(value, key_row, live, channel, HEAD_DIM, BLOCK_D, BLOCK_ROWS % BLOCK_N == 0)
        accumulator = accumulator * rescale[:, None]
        accumulator = tl.dot(weights.to(value_tile.dtype), value_tile, accumulator, input_precision="ieee")

    sums = lse + (row // query_blocks).to(tl.int64) * query_length + token
    if before is not None:
        old = tl.load(sums, mask=is_query, other=float("-inf"))
        new_max = tl.maximum(old, running_max)
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        old_weight, weight = tl.exp2(old - finite_max), tl.exp2(running_max - finite_max)
        old_out = tl.load(
            strided_pointers(before, before_strides, batch, head, token, channel), mask=query_mask, other=0.0
        )
        accumulator = accumulator * weight[:, None] + old_out.to(tl.float32) * old_weight[:, None]
        running_sum = running_sum * weight + old_weight
        running_max = finite_max
    is_empty = running_sum == 0.0
    accumulator = accumulator / tl.where(is_empty, 1.0, running_sum)[:, None]
    outputs = strided_pointers(out, out_strides, batch, head, token, channel)
    tl.store(outputs, accumulator.to(out.dtype.element_ty), mask=query_mask)
    tl.store(sums, tl.where(is_empty, float("-inf"), running_max + tl.log2(running_sum)), mask=is_query)


def attend_naive(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, *, scale: float, return_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """What ``attend_triton`` computes without corrections: pyramid, lists, and one launch a level.

    Args:
        query, key, value: [batch, seq, heads, head_dim], any strides; fp32, fp16 or bf16.

    Returns:
        Output like ``query``, and lse float32 [batch, heads, query_length] or None.
    """
    out, lse = attend_levels(query, naive_pyramid(key, value, plan), naive_lists(plan), plan, scale)
    return out, lse * math.log(2) if return_lse else None


def naive_pyramid(key: Tensor, value: Tensor, plan: Plan) -> list[NaiveLevel]:
    """Every level, mean-pooled over real tokens by torch operators."""
    batch, length, heads, head_dim = key.shape
    padded = plan.kv_blocks * plan.kv_block_size
    real = plan.real_keys()
    real = key.new_ones(1, length, dtype=torch.bool) if real is None else real
    counts = torch.nn.functional.pad(real.float(), (0, padded - length)).expand(batch, -1)
    packed = []
    for tensor in (key, value):
        ordered = tensor if plan.order is None else tensor.index_select(1, plan.order.to(tensor.device))
        rows = key.new_zeros(batch, heads, padded, head_dim)
        rows[:, :, :length] = ordered.transpose(1, 2)
        if plan.key_lengths is not None:
            rows[:, :, :length].masked_fill_(~real[:, None, :, None], 0.0)
        packed.append(rows)
    sizes = [2 ** (level - 1) for level in range(1, plan.num_levels + 1)] + [plan.kv_block_size]
    return [NaiveLevel(*(_pooled(rows, counts, size) for rows in packed), _bias(counts, size)) for size in sizes]


def _pooled(rows: Tensor, counts: Tensor, size: int) -> Tensor:
    if size == 1:
        return rows
    total = rows.unflatten(2, (-1, size)).sum(3, dtype=torch.float32)
    return (total / counts.unflatten(1, (-1, size)).sum(2).clamp(min=1)[:, None, :, None]).to(rows.dtype)


def _bias(counts: Tensor, size: int) -> Tensor:
    return counts.unflatten(1, (-1, size)).sum(2).log2()


def naive_lists(plan: Plan) -> NaiveLists:
    """The plan's blocks, sorted by level; what is skipped comes last and is not read."""
    levels = plan.level_mask.flatten(0, 2)
    is_read = (levels > 0) & (levels <= plan.num_levels + 1)
    keys = torch.where(is_read, levels, plan.num_levels + 2)
    blocks = keys.argsort(dim=1, stable=True).to(torch.int32)
    counts = [(keys == level).sum(1) for level in range(1, plan.num_levels + 2)]
    stops = torch.stack([torch.zeros_like(counts[0]), *counts], dim=1).cumsum(1).to(torch.int32)
    lengths = plan.level_costs().float()[torch.where(is_read, levels, 0).long()].sum(1)
    rows = torch.arange(len(levels), device=levels.device).view(-1, plan.query_blocks)
    longest = lengths.view(rows.shape).argsort(dim=1, descending=True, stable=True)
    return NaiveLists(blocks, stops, rows.gather(1, longest).flatten().to(torch.int32))


def attend_levels(
    query: Tensor,
    pyramid: list[NaiveLevel],
    lists: NaiveLists,
    plan: Plan,
    scale: float,
    levels: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """One launch a level, each merging its result with those before it in float32; lse in units of ln 2.

    ``levels`` are the only ones that are read; None = all.
    """
    levels = range(1, plan.num_levels + 2) if levels is None else levels
    order = None if plan.order is None else plan.order.to(query.device)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    so_far = out if len(levels) == 1 else torch.empty_like(out, dtype=torch.float32)
    lse = out.new_empty(query.shape[0], query.shape[2], query.shape[1], dtype=torch.float32)
    for number, level in enumerate(levels):
        before = None if number == 0 else so_far
        target = out if number == len(levels) - 1 else so_far
        naive_launch(query, pyramid[level - 1], lists, plan, level, before, target, lse, order, scale).run()
    return out, lse


def naive_launch(
    query: Tensor,
    rows: NaiveLevel,
    lists: NaiveLists,
    plan: Plan,
    level: int,
    before: Tensor | None,
    out: Tensor,
    lse: Tensor,
    order: Tensor | None,
    scale: float,
    target: str | None = None,
) -> KernelLaunch:
    """The launch that reads one level."""
    batch, query_length, heads, head_dim = query.shape
    tile = attention_tile(target or target_of(query.device), head_dim, query.dtype, plan.query_block_size)
    block_rows = 1 if level > plan.num_levels else plan.kv_block_size >> (level - 1)
    arguments = {
        "query": query,
        "key": rows.key,
        "value": rows.value,
        "bias": rows.bias,
        "blocks": lists.blocks,
        "stops": lists.stops,
        "launch_order": lists.launch_order,
        "order": order,
        "before": before,
        "out": out,
        "lse": lse,
        "query_strides": query.stride(),
        "before_strides": out.stride() if before is None else before.stride(),
        "out_strides": out.stride(),
        "scale": scale,
        "heads": heads,
        "query_length": query_length,
        "query_blocks": plan.query_blocks,
        "kv_blocks": plan.kv_blocks,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "QUERY_BLOCK": plan.query_block_size,
        "LEVEL": level,
        "LEVELS": plan.num_levels,
        "BLOCK_ROWS": block_rows,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": min(tile.block_n, max(SMALLEST_TILE, block_rows)),
    }
    grid = (batch * heads * plan.query_blocks * triton.cdiv(plan.query_block_size, tile.block_m),)
    return KernelLaunch(naive_level_kernel, grid, arguments, tile.num_warps, tile.num_stages)
