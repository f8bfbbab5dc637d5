"""Attention between sampled queries and sampled keys: what :func:`~..importance.sampled_importance` defines.

Every product and every exponential is made once: each query's masses over the kv blocks are written before the
softmax's denominator is known; :mod:`.shares` reads them and divides.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...gpu.kernel_launch import KernelLaunch
from ...gpu.target import padded_head_dim
from . import hopper
from .key_samples import KeySamples
from .mass_buffers import Masses, MassesLayout
from .samples import log_of_sum, sampled_rows
from .tiles import precision_of


@triton.jit
def _sampled_logits(
    query_tile,
    samples,
    sample_bias,
    start,
    kv_blocks,
    channel,
    scale,
    HEAD_DIM: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS_N: tl.constexpr,
    IS_REGULAR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products [ROWS, BN]: as they are where all samples weigh the same (IS_REGULAR), else logits in units of ln 2.

    Column c is sample c // BLOCKS_N of block start + c % BLOCKS_N: a block's samples lie BLOCKS_N columns apart, where
    they belong to one thread of a matrix unit's result.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    column = tl.arange(0, BLOCK_N)
    block = start + column % BLOCKS_N
    slot = column // BLOCKS_N
    pointers = samples + (slot * kv_blocks + block)[:, None] * HEAD_DIM + channel[None, :]
    if IS_REGULAR and channel.shape[0] == HEAD_DIM:
        rows = tl.load(pointers)
    else:
        inside = (block < kv_blocks) & (slot < SAMPLES)
        rows = tl.load(pointers, mask=inside[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
    logits = tl.dot(query_tile, tl.trans(rows), input_precision=PRECISION)
    if not IS_REGULAR:
        inside = (block < kv_blocks) & (slot < SAMPLES)
        bias = tl.load(sample_bias + slot * kv_blocks + block, mask=inside, other=float("-inf"))
        logits = logits * (scale * LOG2E) + bias[None, :]
    return logits


@triton.jit
def store_masses(
    weights, largest, masses, maxima, row, start, width, tiles, BLOCKS_N: tl.constexpr, IS_MAX: tl.constexpr
):
    """Writes a tile's masses, or the largest sample of each, and their reference; returns the masses' sum [ROWS]."""
    BLOCK_M: tl.constexpr = weights.shape[0]
    BLOCK_N: tl.constexpr = weights.shape[1]
    samples = tl.reshape(weights, (BLOCK_M, BLOCK_N // BLOCKS_N, BLOCKS_N))
    mass = tl.sum(samples, axis=1)
    kept = tl.max(samples, axis=1) if IS_MAX else mass
    block = start + tl.arange(0, BLOCKS_N)
    tl.store(masses + row[:, None] * width + block[None, :], kept.to(masses.dtype.element_ty))
    tl.store(maxima + row * tiles + start // BLOCKS_N, largest)
    return tl.sum(mass, axis=1)


@triton.jit
def masses_kernel(
    query,
    samples,
    sample_bias,
    positions,
    order,
    masses,
    maxima,
    denominators,
    query_strides,
    scale,
    heads,
    first_head,
    heads_here,
    query_blocks,
    kv_blocks,
    regular_blocks,
    rows_of_head,
    width,
    tiles,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERY_SAMPLES: tl.constexpr,
    PADDED: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS_N: tl.constexpr,
    IS_MAX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M sampled queries of one head against all sampled keys of the head.

    The first ``regular_blocks`` kv blocks have all their samples, these weigh the same, and fill their tiles.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    BLOCKS: tl.constexpr = BLOCK_M // PADDED
    head = (first_head + tl.program_id(1)).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    query_tile, valid = sampled_rows(
        query,
        query_strides,
        positions,
        order,
        batch,
        head,
        tl.program_id(0) * BLOCKS,
        query_blocks,
        channel,
        QUERY_SAMPLES,
        PADDED,
        BLOCK_M,
        HEAD_DIM,
    )
    samples += (batch * heads + head) * SAMPLES * kv_blocks * HEAD_DIM
    sample_bias += batch * SAMPLES * kv_blocks
    row = (batch * heads_here + tl.program_id(1)) * rows_of_head + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)

    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    factor = scale * LOG2E
    for start in range(0, regular_blocks, BLOCKS_N):
        products = _sampled_logits(
            query_tile,
            samples,
            sample_bias,
            start,
            kv_blocks,
            channel,
            scale,
            HEAD_DIM,
            SAMPLES,
            BLOCK_N,
            BLOCKS_N,
            True,
            PRECISION,
        )
        largest = tl.maximum(running_max, tl.max(products, axis=1) * factor)
        weights = tl.exp2(products * factor - largest[:, None])
        total = store_masses(weights, largest, masses, maxima, row, start, width, tiles, BLOCKS_N, IS_MAX)
        running_sum = running_sum * tl.exp2(running_max - largest) + total
        running_max = largest
    for start in range(regular_blocks, kv_blocks, BLOCKS_N):
        logits = _sampled_logits(
            query_tile,
            samples,
            sample_bias,
            start,
            kv_blocks,
            channel,
            scale,
            HEAD_DIM,
            SAMPLES,
            BLOCK_N,
            BLOCKS_N,
            False,
            PRECISION,
        )
        new_max = tl.maximum(running_max, tl.max(logits, axis=1))
        largest = tl.where(new_max == float("-inf"), 0.0, new_max)  # rows that have met no key yet
        weights = tl.exp2(logits - largest[:, None])
        total = store_masses(weights, largest, masses, maxima, row, start, width, tiles, BLOCKS_N, IS_MAX)
        running_sum = running_sum * tl.exp2(running_max - largest) + total
        running_max = new_max
    tl.store(denominators + row, log_of_sum(running_max, running_sum, valid))


def masses_launch(
    query: Tensor,
    positions: Tensor,
    order: Tensor | None,
    keys: KeySamples,
    masses: Masses,
    layout: MassesLayout,
    heads: range,
    *,
    scale: float,
    full_blocks: int,
    is_max: bool,
    target: str,
) -> KernelLaunch:
    """The launch that fills ``masses`` for some heads.

    Args:
        query: [batch, seq, heads, head_dim], any strides.
        positions: int32 [query_blocks, samples], see :func:`~.samples.query_positions`.
        full_blocks: so many kv blocks, from the first, have no key missing in any sample of the batch.
        is_max: a block's mass is that of its largest sample, not of all.
    """
    head_dim, query_blocks = query.shape[3], len(positions)
    # With a negative scale the largest product is the smallest logit; and a tile's columns that are no sample, where
    # samples are no power of two, need their bias.
    is_regular = scale > 0 and layout.block_n == layout.blocks_n * keys.samples.shape[2]
    regular_blocks = full_blocks // layout.blocks_n * layout.blocks_n if is_regular else 0
    arguments = {
        "query": query,
        "samples": keys.samples,
        "sample_bias": keys.sample_bias,
        "positions": positions,
        "order": order,
        "masses": masses.mass,
        "maxima": masses.maximum,
        "denominators": masses.denominator,
        "query_strides": query.stride(),
        "scale": scale,
        "heads": query.shape[2],
        "first_head": heads.start,
        "heads_here": len(heads),
        "query_blocks": query_blocks,
        "kv_blocks": keys.counts.shape[1],
        "regular_blocks": regular_blocks,
        "rows_of_head": layout.rows,
        "width": masses.mass.shape[1],
        "tiles": layout.tiles,
        "HEAD_DIM": head_dim,
        "QUERY_SAMPLES": positions.shape[1],
        "PADDED": layout.padded,
        "SAMPLES": keys.samples.shape[2],
        "BLOCK_M": layout.block_m,
        "IS_MAX": is_max,
    }
    grid = (layout.rows // layout.block_m, len(heads), query.shape[0])
    if layout.is_hopper:
        arguments["STAGES"] = layout.num_stages
        return KernelLaunch(hopper.hopper_masses_kernel, grid, arguments, layout.num_warps)
    arguments |= {
        "BLOCK_D": padded_head_dim(head_dim),
        "BLOCK_N": layout.block_n,
        "BLOCKS_N": layout.blocks_n,
        "PRECISION": precision_of(target, query.dtype),
    }
    return KernelLaunch(masses_kernel, grid, arguments, layout.num_warps, layout.num_stages)
