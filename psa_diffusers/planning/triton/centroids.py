"""The second estimate of attention^2, from the mean and the spread of each block of keys.

What :func:`~..importance.centroid_energy` defines, and :func:`~..errors.query_power` on the way.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...gpu.kernel_launch import KernelLaunch
from ...gpu.sizes import ceil_div, next_power_of_2
from ...gpu.target import padded_head_dim
from . import hopper
from .samples import add_to_softmax, averages, log_of_sum, sampled_rows
from .statistics import Statistics
from .tiles import centroid_tile, precision_of


@triton.jit
def _centroid_logits(
    query_tile,
    squares,
    key_mean,
    key_spread,
    count_bias,
    start,
    kv_blocks,
    channel,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOG_KV_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """log2(count x exp(mean logit + half the logits' variance)) of a tile of kv blocks, [ROWS, BN]."""
    LOG2E: tl.constexpr = 1.4426950408889634
    block = start + tl.arange(0, BLOCK_N)
    inside = block < kv_blocks
    offsets = block[:, None] * HEAD_DIM + channel[None, :]
    mask = inside[:, None] & (channel < HEAD_DIM)[None, :]
    mean = tl.load(key_mean + offsets, mask=mask, other=0.0)
    spread = tl.load(key_spread + offsets, mask=mask, other=0.0)
    bias = tl.load(count_bias + block, mask=inside, other=float("-inf"))
    half_variance = tl.dot(squares, tl.trans(spread), input_precision=PRECISION)
    logits = tl.dot(query_tile, tl.trans(mean), input_precision=PRECISION) * (scale * LOG2E)
    # The largest of n keys holds at most the mass of n: beyond it the logits are not normal.
    return logits + tl.minimum(half_variance, LOG_KV_BLOCK) + bias[None, :]


@triton.jit
def centroids_kernel(
    query,
    positions,
    order,
    key_mean,
    key_spread,
    count_bias,
    energy,
    features,
    query_strides,
    scale,
    heads,
    query_blocks,
    kv_blocks,
    blocks_of_all_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LEVELS: tl.constexpr,
    SAMPLES: tl.constexpr,
    PADDED: tl.constexpr,
    AVERAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOG_KV_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M sampled queries (BLOCK_M / PADDED query blocks) of one head against all its kv blocks.

    Two passes over the blocks: the softmax's denominator, then the squares of the masses, averaged a query block.
    """
    BLOCKS: tl.constexpr = BLOCK_M // PADDED
    first_block = tl.program_id(0) * BLOCKS
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    query_tile, valid = sampled_rows(
        query,
        query_strides,
        positions,
        order,
        batch,
        head,
        first_block,
        query_blocks,
        channel,
        SAMPLES,
        PADDED,
        BLOCK_M,
        HEAD_DIM,
    )
    kind = features.dtype.element_ty
    of_block, per_sample = averages(valid, PADDED, AVERAGES, kind)
    query_block = first_block + tl.arange(0, AVERAGES)
    is_block = (tl.arange(0, AVERAGES) < BLOCKS) & (query_block < query_blocks)
    row = (batch * heads + head) * query_blocks + query_block

    LOG2E: tl.constexpr = 1.4426950408889634
    scaled = query_tile.to(tl.float32) * scale
    scaled = scaled * scaled
    power = tl.dot(of_block, scaled.to(kind), input_precision=PRECISION) * per_sample[:, None]
    mask = is_block[:, None] & (channel < HEAD_DIM)[None, :]
    tl.store(features + row[:, None] * HEAD_DIM + channel[None, :], power.to(kind), mask=mask)
    squares = (scaled * (0.5 * LOG2E)).to(key_spread.dtype.element_ty)

    base = (batch * heads + head) * kv_blocks * HEAD_DIM
    key_mean += base
    key_spread += base + (LEVELS - 1) * blocks_of_all_heads * HEAD_DIM  # the last level is the centroid
    count_bias += batch * kv_blocks
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, kv_blocks, BLOCK_N):
        logits = _centroid_logits(
            query_tile,
            squares,
            key_mean,
            key_spread,
            count_bias,
            start,
            kv_blocks,
            channel,
            scale,
            HEAD_DIM,
            BLOCK_N,
            LOG_KV_BLOCK,
            PRECISION,
        )
        running_max, running_sum = add_to_softmax(running_max, running_sum, logits)
    denominator = log_of_sum(running_max, running_sum, valid)
    for start in range(0, kv_blocks, BLOCK_N):
        logits = _centroid_logits(
            query_tile,
            squares,
            key_mean,
            key_spread,
            count_bias,
            start,
            kv_blocks,
            channel,
            scale,
            HEAD_DIM,
            BLOCK_N,
            LOG_KV_BLOCK,
            PRECISION,
        )
        squared_mass = tl.exp2(2.0 * (logits - denominator[:, None]))
        mean_square = tl.dot(of_block, squared_mass.to(kind), input_precision=PRECISION) * per_sample[:, None]
        block = start + tl.arange(0, BLOCK_N)
        pairs = energy + row[:, None] * kv_blocks + block[None, :]
        tl.store(pairs, mean_square, mask=is_block[:, None] & (block < kv_blocks)[None, :])


def centroid_launch(
    query: Tensor,
    positions: Tensor,
    order: Tensor | None,
    statistics: Statistics,
    energy: Tensor,
    features: Tensor,
    *,
    scale: float,
    kv_block_size: int,
    full_blocks: int,
    target: str,
) -> KernelLaunch:
    """The launch that fills ``energy`` and ``features``.

    Args:
        query: [batch, query_length, heads, head_dim], any strides.
        positions: int32 [query_blocks, samples], see :func:`~.samples.query_positions`.
        energy: float32 [batch, heads, query_blocks, kv_blocks], mean square of the blocks' shares of attention.
        full_blocks: so many kv blocks, from the first, have no key missing in any sample of the batch.
        features: [batch, heads, query_blocks, head_dim], scale^2 x mean square of each feature over the samples.
    """
    batch, _, heads, head_dim = query.shape
    query_blocks, samples = positions.shape
    kv_blocks = energy.shape[3]
    padded = next_power_of_2(samples)
    tile = hopper.centroid_tile()
    is_hopper = padded == hopper.QUERY_SAMPLES
    is_hopper = is_hopper and hopper.fits_hopper(query, query_blocks * padded, tile.block_m, scale, target)
    if not is_hopper:
        tile = centroid_tile(target, head_dim, query.dtype)
    block_m = max(tile.block_m, padded)
    arguments = {
        "query": query,
        "positions": positions,
        "order": order,
        "key_mean": statistics.key_mean,
        "key_spread": statistics.key_spread,
        "count_bias": statistics.count_bias,
        "energy": energy,
        "features": features,
        "query_strides": query.stride(),
        "scale": scale,
        "heads": heads,
        "query_blocks": query_blocks,
        "kv_blocks": kv_blocks,
        "blocks_of_all_heads": batch * heads * kv_blocks,
        "HEAD_DIM": head_dim,
        "LEVELS": statistics.key_spread.shape[0],
        "SAMPLES": samples,
        "BLOCK_M": block_m,
        "BLOCK_N": tile.block_n,
        "LOG_KV_BLOCK": kv_block_size.bit_length() - 1,
    }
    grid = (ceil_div(query_blocks, block_m // padded), heads, batch)
    if is_hopper:
        arguments |= {"regular_blocks": full_blocks, "STAGES": tile.num_stages}
        return KernelLaunch(hopper.hopper_centroids_kernel, grid, arguments, tile.num_warps)
    arguments |= {
        "BLOCK_D": padded_head_dim(head_dim),
        "PADDED": padded,
        "AVERAGES": max(16, block_m // padded),
        "PRECISION": precision_of(target, query.dtype),
    }
    return KernelLaunch(centroids_kernel, grid, arguments, tile.num_warps, tile.num_stages)
