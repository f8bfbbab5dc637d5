"""The attention kernel: one loop over everything that a query block reads, tiles of one level after another."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...gpu.addressing import strided_pointers
from ...gpu.kernel_launch import KernelLaunch
from ...gpu.target import padded_head_dim
from .covariance import Covariance
from .layout import PyramidLayout
from .pyramid import Pyramid
from .read_lists import ReadLists
from .tiles import attention_tile


@triton.jit
def _level_tiles(counts, LOG_KV_BLOCK: tl.constexpr, LEVELS: tl.constexpr, BLOCK_N: tl.constexpr):
    """For each level: its blocks, the first tile after it, and where its blocks start in the list."""
    blocks = ()
    tile_stops = ()
    list_starts = ()
    tiles = 0
    slot = 0
    for level in tl.static_range(1, LEVELS + 2):
        count = tl.load(counts + level - 1)
        rows = count << (LOG_KV_BLOCK - level + 1) if level <= LEVELS else count
        tiles += (rows + BLOCK_N - 1) // BLOCK_N
        blocks += (count,)
        tile_stops += (tiles,)
        list_starts += (slot,)
        slot += count
    return blocks, tile_stops, list_starts


@triton.jit
def _packed_rows(
    tile,
    level_blocks,
    tile_stops,
    list_starts,
    blocks,
    kv_blocks,
    empty_row,
    LOG_KV_BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Packed rows of a tile [BN], and its level (from 0): which block, by the list, then which row inside the block.

    All rows of a tile are of one level, so that level and address arithmetic is done once a tile, and the blocks of a
    level are one sequence of rows, however few each has. Lanes past the level's last row get the empty row.
    """
    level = 0
    first_tile = 0
    list_start = 0
    count = level_blocks[0]
    for coarser in tl.static_range(1, LEVELS + 1):
        reached = tile >= tile_stops[coarser - 1]
        level = tl.where(reached, coarser, level)
        first_tile = tl.where(reached, tile_stops[coarser - 1], first_tile)
        list_start = tl.where(reached, list_starts[coarser], list_start)
        count = tl.where(reached, level_blocks[coarser], count)
    shift = tl.where(level < LEVELS, LOG_KV_BLOCK - level, 0)  # log2 of the level's rows a block
    section = kv_blocks * ((2 << LOG_KV_BLOCK) - (2 << LOG_KV_BLOCK >> level))  # first packed row of the level
    local = (tile - first_tile) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = local < (count << shift)
    block = tl.load(blocks + list_start + (local >> shift), mask=live, other=0).to(tl.int32)
    row = section + (block << shift) + (local & ((1 << shift) - 1))
    return tl.where(live, row, empty_row), level


@triton.jit
def _load_packed(base, row, channel, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers = base + row.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :]  # [BN, BD]
    if BLOCK_D == HEAD_DIM:
        rows = tl.load(pointers)
    else:
        rows = tl.load(pointers, mask=(channel < HEAD_DIM)[None, :], other=0.0)
    return rows


@triton.jit
def _add_covariance(
    accumulator,
    lost,
    query,
    query_strides,
    batch,
    head,
    token,
    is_query,
    matrix,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """accumulator [BM, BD] + scale * lost * (matrix q): ``lost`` [BM], ``matrix`` [values, keys] of one head."""
    value_channel = tl.arange(0, BLOCK_D)
    accumulator = accumulator / scale
    for start in tl.range(0, HEAD_DIM, CHUNK, num_stages=1):
        channel = start + tl.arange(0, CHUNK)
        inside = channel < HEAD_DIM
        rows = tl.load(
            strided_pointers(query, query_strides, batch, head, token, channel),
            mask=is_query[:, None] & inside[None, :],
            other=0.0,
        )  # [BM, CHUNK]
        columns = tl.load(
            matrix + value_channel[:, None] * HEAD_DIM + channel[None, :],
            mask=(value_channel < HEAD_DIM)[:, None] & inside[None, :],
            other=0.0,
        )  # [BD, CHUNK]
        rows = (rows * lost[:, None]).to(columns.dtype)
        accumulator = tl.dot(rows, tl.trans(columns), accumulator, input_precision=PRECISION)
    return accumulator * scale


@triton.jit(do_not_specialize=["first_head"])
def attention_kernel(
    query,
    packed_key,
    packed_value,
    bias,
    covariance,
    covariance_factors,
    blocks,
    counts,
    launch_order,
    order,
    out,
    lse,
    query_strides,
    out_strides,
    scale,
    first_head,
    heads,
    query_length,
    query_blocks,
    kv_blocks,
    packed_rows,
    empty_row,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    LOG_KV_BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK_D: tl.constexpr,
    BIAS_OF_HEADS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one tile of queries of one head. Logits, maximum and bias are in units of ln 2 (exp2, not exp).

    The tensors hold ``heads`` heads a sample; the first is number ``first_head`` of those in the lists and the lse.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    TILES: tl.constexpr = (QUERY_BLOCK + BLOCK_M - 1) // BLOCK_M
    row = tl.load(launch_order + first_head * query_blocks + tl.program_id(0) // TILES)
    local_head = row // query_blocks - first_head
    batch = (local_head // heads).to(tl.int64)
    head = (local_head % heads).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)

    in_block = tl.program_id(0) % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    position = row % query_blocks * QUERY_BLOCK + in_block
    is_query = (in_block < QUERY_BLOCK) & (position < query_length)
    token = position.to(tl.int64)
    if order is not None:
        token = tl.load(order + position, mask=is_query, other=0)
    query_mask = is_query[:, None] & (channel < HEAD_DIM)[None, :]
    query_tile = tl.load(
        strided_pointers(query, query_strides, batch, head, token, channel), mask=query_mask, other=0.0
    )  # [BM, BD]

    base = local_head.to(tl.int64) * packed_rows * HEAD_DIM
    packed_key += base
    packed_value += base
    bias += (batch * heads + head if BIAS_OF_HEADS else batch) * packed_rows
    blocks += row.to(tl.int64) * kv_blocks
    counts += row.to(tl.int64) * (LEVELS + 1)
    level_blocks, tile_stops, list_starts = _level_tiles(counts, LOG_KV_BLOCK, LEVELS, BLOCK_N)

    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    running_lost = tl.zeros([BLOCK_M], tl.float32)  # weights times the share of the covariance that their level lost
    if covariance is not None:
        covariance += local_head * HEAD_DIM * HEAD_DIM
        covariance_factors += local_head * (LEVELS + 1)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for tile in range(0, tile_stops[LEVELS]):
        packed_row, level = _packed_rows(
            tile,
            level_blocks,
            tile_stops,
            list_starts,
            blocks,
            kv_blocks,
            empty_row,
            LOG_KV_BLOCK,
            LEVELS,
            BLOCK_N,
        )  # [BN]
        key_tile = _load_packed(packed_key, packed_row, channel, HEAD_DIM, BLOCK_D)
        row_bias = tl.load(bias + packed_row)
        logits = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)  # [BM, BN]
        logits = logits * (scale * LOG2E) + row_bias[None, :]

        new_max = tl.maximum(running_max, tl.max(logits, axis=1))
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # rows that have read nothing real yet
        weights = tl.exp2(logits - finite_max[:, None])
        rescale = tl.exp2(running_max - finite_max)
        tile_sum = tl.sum(weights, axis=1)
        running_sum = running_sum * rescale + tile_sum
        if covariance is not None:
            running_lost = running_lost * rescale + tile_sum * tl.load(covariance_factors + level)
        running_max = new_max
        value_tile = _load_packed(packed_value, packed_row, channel, HEAD_DIM, BLOCK_D)
        accumulator = accumulator * rescale[:, None]
        accumulator = tl.dot(weights.to(value_tile.dtype), value_tile, accumulator, input_precision=PRECISION)

    is_empty = running_sum == 0.0
    divisor = tl.where(is_empty, 1.0, running_sum)
    accumulator = accumulator / divisor[:, None]
    if covariance is not None:
        # Of the factors only the shares go into the queries' dtype: the largest, the centroid's, stays in float32.
        largest = tl.load(covariance_factors + LEVELS)
        divisor *= tl.where(largest > 0.0, largest, 1.0)
        accumulator = _add_covariance(
            accumulator,
            running_lost / divisor,
            query,
            query_strides,
            batch,
            head,
            token,
            is_query,
            covariance,
            scale * tl.where(largest > 0.0, largest, 1.0),
            HEAD_DIM,
            BLOCK_D,
            CHUNK_D,
            PRECISION,
        )
    outputs = strided_pointers(out, out_strides, batch, head, token, channel)
    tl.store(outputs, accumulator.to(out.dtype.element_ty), mask=query_mask)
    if lse is not None:
        row_lse = tl.where(is_empty, float("-inf"), (running_max + tl.log2(running_sum)) / LOG2E)
        tl.store(lse + (row // query_blocks).to(tl.int64) * query_length + token, row_lse, mask=is_query)


def attention_launch(
    query: Tensor,
    out: Tensor,
    lse: Tensor | None,
    pyramid: Pyramid,
    lists: ReadLists,
    layout: PyramidLayout,
    covariance: Covariance | None = None,
    head_bias: Tensor | None = None,
    *,
    query_block_size: int,
    order: Tensor | None,
    scale: float,
    target: str,
    first_head: int = 0,
) -> KernelLaunch:
    """The launch that fills ``out`` [batch, query_length, heads, head_dim] and ``lse`` [batch, heads, query_length].

    ``head_bias`` is the bias with the logit correction, by :mod:`~.logit_variance`; None = without. For some heads of
    one sample, ``lists`` and ``lse`` are still of all samples and heads; the first in the other tensors is number
    ``first_head`` of them, sample after sample.
    """
    batch, query_length, heads, head_dim = query.shape
    query_blocks = triton.cdiv(query_length, query_block_size)
    tile = attention_tile(target, head_dim, query.dtype, query_block_size, covariance is not None)
    arguments = {
        "query": query,
        "packed_key": pyramid.key,
        "packed_value": pyramid.value,
        "bias": pyramid.bias if head_bias is None else head_bias,
        "covariance": covariance and covariance.matrix,
        "covariance_factors": covariance and covariance.factors,
        "blocks": lists.blocks,
        "counts": lists.counts,
        "launch_order": lists.launch_order,
        "order": order,
        "out": out,
        "lse": lse,
        "query_strides": query.stride(),
        "out_strides": out.stride(),
        "scale": scale,
        "first_head": first_head,
        "heads": heads,
        "query_length": query_length,
        "query_blocks": query_blocks,
        "kv_blocks": layout.kv_blocks,
        "packed_rows": layout.rows,
        "empty_row": layout.empty_row,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "QUERY_BLOCK": query_block_size,
        "LOG_KV_BLOCK": layout.kv_block_size.bit_length() - 1,
        "LEVELS": layout.num_levels,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "CHUNK_D": min(16, padded_head_dim(head_dim)),
        "BIAS_OF_HEADS": head_bias is not None,
        "PRECISION": "ieee",
    }
    grid = (batch * heads * query_blocks * triton.cdiv(query_block_size, tile.block_m),)
    return KernelLaunch(attention_kernel, grid, arguments, tile.num_warps, tile.num_stages)
