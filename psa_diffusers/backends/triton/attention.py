"""The attention kernel: one flat loop over everything that a query block reads, whatever the levels."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...gpu.addressing import strided_pointers
from ...gpu.kernel_launch import KernelLaunch
from ...gpu.target import padded_head_dim
from .layout import PyramidLayout
from .pyramid import Pyramid
from .read_lists import ReadLists
from .tiles import attention_tile


@triton.jit
def _level_bounds(counts, KV_BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    """Where each level after the first starts, among the rows to read and in the block list; and how many rows."""
    row_starts = ()
    list_starts = ()
    flat_row = 0
    slot = 0
    for level in tl.static_range(1, LEVELS + 1):
        count = tl.load(counts + level - 1)
        flat_row += count * (KV_BLOCK >> (level - 1))
        slot += count
        row_starts += (flat_row,)
        list_starts += (slot,)
    return row_starts, list_starts, flat_row + tl.load(counts + LEVELS)


@triton.jit
def _packed_rows(
    flat_row,
    total,
    row_starts,
    list_starts,
    blocks,
    kv_blocks,
    empty_row,
    LOG_KV_BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Packed rows behind the flat rows [BN]: level, then block by the list, then row inside the block.

    Counting rows, not blocks, decouples a tile from the blocks: a tile of BN rows spans as many blocks as it needs, of
    several levels if need be, and only the last tile of a query block is partly empty. Lanes past ``total`` get the
    empty row.
    """
    row_start = tl.zeros_like(flat_row)
    list_start = tl.zeros_like(flat_row)
    section = tl.zeros_like(flat_row)  # first packed row of the level
    shift = tl.zeros_like(flat_row) + LOG_KV_BLOCK  # log2 of the level's rows a block
    for level in tl.static_range(2, LEVELS + 2):
        reached = flat_row >= row_starts[level - 2]
        row_start = tl.where(reached, row_starts[level - 2], row_start)
        list_start = tl.where(reached, list_starts[level - 2], list_start)
        section = tl.where(reached, kv_blocks * ((2 << LOG_KV_BLOCK) - (2 << LOG_KV_BLOCK >> (level - 1))), section)
        shift = tl.where(reached, LOG_KV_BLOCK - level + 1 if level <= LEVELS else 0, shift)
    local = flat_row - row_start
    live = flat_row < total
    block = tl.load(blocks + list_start + (local >> shift), mask=live, other=0).to(tl.int32)
    row = section + (block << shift) + (local & ((1 << shift) - 1))
    return tl.where(live, row, empty_row)


@triton.jit
def _load_packed(base, row, channel, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers = base + row.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :]  # [BN, BD]
    if BLOCK_D == HEAD_DIM:
        rows = tl.load(pointers)
    else:
        rows = tl.load(pointers, mask=(channel < HEAD_DIM)[None, :], other=0.0)
    return rows


@triton.jit
def _half_variance(query, variance, scale, cap, PRECISION: tl.constexpr):
    """min(scale^2 / 2 * sum_d(q_d^2 * var_d), ln n) in units of ln 2, [BM, BN]; ``cap`` [BN] is log2 n."""
    scaled = query.to(tl.float32) * scale
    squares = (scaled * scaled).to(variance.dtype)
    spread = tl.dot(squares, tl.trans(variance), input_precision=PRECISION)
    return tl.minimum(spread * (0.5 * 1.4426950408889634), cap[None, :])


@triton.jit
def attention_kernel(
    query,
    packed_key,
    packed_value,
    bias,
    variance,
    blocks,
    counts,
    launch_order,
    order,
    out,
    lse,
    query_strides,
    out_strides,
    scale,
    heads,
    query_length,
    query_blocks,
    kv_blocks,
    empty_row,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    LOG_KV_BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one tile of queries of one head. Logits, maximum and bias are in units of ln 2 (exp2, not exp)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    TILES: tl.constexpr = (QUERY_BLOCK + BLOCK_M - 1) // BLOCK_M
    row = tl.load(launch_order + tl.program_id(0) // TILES)
    batch = (row // (heads * query_blocks)).to(tl.int64)
    head = (row // query_blocks % heads).to(tl.int64)
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

    base = (batch * heads + head) * (empty_row + 1) * HEAD_DIM
    packed_key += base
    packed_value += base
    if variance is not None:
        variance += base
    bias += batch * (empty_row + 1)
    blocks += row.to(tl.int64) * kv_blocks
    row_starts, list_starts, total = _level_bounds(counts + row.to(tl.int64) * (LEVELS + 1), 1 << LOG_KV_BLOCK, LEVELS)

    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, total, BLOCK_N):
        packed_row = _packed_rows(
            start + tl.arange(0, BLOCK_N),
            total,
            row_starts,
            list_starts,
            blocks,
            kv_blocks,
            empty_row,
            LOG_KV_BLOCK,
            LEVELS,
        )  # [BN]
        key_tile = _load_packed(packed_key, packed_row, channel, HEAD_DIM, BLOCK_D)
        row_bias = tl.load(bias + packed_row)
        logits = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)  # [BM, BN]
        logits = logits * (scale * LOG2E) + row_bias[None, :]
        if variance is not None:
            variance_tile = _load_packed(variance, packed_row, channel, HEAD_DIM, BLOCK_D)
            logits += _half_variance(query_tile, variance_tile, scale, row_bias, PRECISION)

        new_max = tl.maximum(running_max, tl.max(logits, axis=1))
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)  # rows that have read nothing real yet
        weights = tl.exp2(logits - finite_max[:, None])
        rescale = tl.exp2(running_max - finite_max)
        running_sum = running_sum * rescale + tl.sum(weights, axis=1)
        running_max = new_max
        value_tile = _load_packed(packed_value, packed_row, channel, HEAD_DIM, BLOCK_D)
        accumulator = accumulator * rescale[:, None]
        accumulator = tl.dot(weights.to(value_tile.dtype), value_tile, accumulator, input_precision=PRECISION)

    is_empty = running_sum == 0.0
    accumulator = accumulator / tl.where(is_empty, 1.0, running_sum)[:, None]
    outputs = strided_pointers(out, out_strides, batch, head, token, channel)
    tl.store(outputs, accumulator.to(out.dtype.element_ty), mask=query_mask)
    if lse is not None:
        row_lse = tl.where(is_empty, float("-inf"), (running_max + tl.log2(running_sum)) / LOG2E)
        tl.store(lse + (batch * heads + head) * query_length + token, row_lse, mask=is_query)


def attention_launch(
    query: Tensor,
    out: Tensor,
    lse: Tensor | None,
    pyramid: Pyramid,
    lists: ReadLists,
    layout: PyramidLayout,
    *,
    query_block_size: int,
    order: Tensor | None,
    scale: float,
    target: str,
) -> KernelLaunch:
    """The launch that fills ``out`` [batch, query_length, heads, head_dim] and ``lse`` [batch, heads, query_length]."""
    batch, query_length, heads, head_dim = query.shape
    query_blocks = triton.cdiv(query_length, query_block_size)
    tile = attention_tile(target, head_dim, query.dtype, query_block_size, pyramid.variance is not None)
    arguments = {
        "query": query,
        "packed_key": pyramid.key,
        "packed_value": pyramid.value,
        "bias": pyramid.bias,
        "variance": pyramid.variance,
        "blocks": lists.blocks,
        "counts": lists.counts,
        "launch_order": lists.launch_order,
        "order": order,
        "out": out,
        "lse": lse,
        "query_strides": query.stride(),
        "out_strides": out.stride(),
        "scale": scale,
        "heads": heads,
        "query_length": query_length,
        "query_blocks": query_blocks,
        "kv_blocks": layout.kv_blocks,
        "empty_row": layout.empty_row,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "QUERY_BLOCK": query_block_size,
        "LOG_KV_BLOCK": layout.kv_block_size.bit_length() - 1,
        "LEVELS": layout.num_levels,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "PRECISION": "ieee",
    }
    grid = (batch * heads * query_blocks * triton.cdiv(query_block_size, tile.block_m),)
    return KernelLaunch(attention_kernel, grid, arguments, tile.num_warps, tile.num_stages)
