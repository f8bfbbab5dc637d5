"""From masses to shares of attention, the second half of :func:`~..importance.sampled_importance`.

Divides the masses by the softmax's denominators, averages them over a block's queries, and joins the second estimate.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...gpu.kernel_launch import KernelLaunch
from ...gpu.sizes import ceil_div
from ...gpu.target import padded_head_dim
from ..errors import SHRINKAGE
from .mass_buffers import Masses
from .sources import MassSource
from .statistics import Statistics
from .tiles import precision_of, shares_tile

RUN = 8  # kv blocks whose masses one thread reads at a time
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
SAMPLES_AT_A_TIME = 8  # whose masses are under way together: as many as registers hold for two programs a processor


@triton.jit
def real_samples(
    positions,
    query_block,
    query_blocks,
    QUERY_SAMPLES: tl.constexpr,
    PADDED: tl.constexpr,
):
    """float32 [QB]: how many sampled queries there are of each block."""
    sample = tl.arange(0, PADDED)
    mask = (query_block < query_blocks)[:, None] & (sample < QUERY_SAMPLES)[None, :]
    position = tl.load(positions + query_block[:, None] * QUERY_SAMPLES + sample[None, :], mask=mask, other=-1)
    return tl.sum((position >= 0).to(tl.float32), axis=1)


@triton.jit
def _sums(
    masses,
    maxima,
    denominators,
    first_row,
    is_block,
    start,
    kv_blocks,
    width,
    tiles,
    PADDED: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS_N: tl.constexpr,
    RUN: tl.constexpr,
    IS_MAX: tl.constexpr,
):
    """The masses of a tile of kv blocks, and their squares, summed over the samples of a query block, [BM, BN] each.

    With IS_MAX the largest mass, and its square.
    Each thread has runs of RUN kv blocks and goes through the samples: nothing crosses threads. A sample that is not
    there has an infinite denominator and counts as 0.
    """
    RUNS: tl.constexpr = BLOCK_N // RUN
    share = tl.zeros([BLOCK_M, RUNS, RUN], tl.float32)
    energy = tl.zeros([BLOCK_M, RUNS, RUN], tl.float32)
    run = start + tl.arange(0, RUNS) * RUN
    block = run[:, None] + tl.arange(0, RUN)[None, :]
    mask = is_block[:, None, None] & (run < kv_blocks)[None, :, None]
    for step in range(0, PADDED, STEP):
        for sample in tl.static_range(STEP):
            row = first_row + step + sample
            mass = tl.load(masses + row[:, None, None] * width + block[None, :, :], mask=mask, other=0.0)
            inside = is_block[:, None] & (run < kv_blocks)[None, :]
            largest = tl.load(maxima + row[:, None] * tiles + (run // BLOCKS_N)[None, :], mask=inside, other=0.0)
            denominator = tl.load(denominators + row, mask=is_block, other=float("inf"))
            factor = tl.exp2(largest - denominator[:, None])
            mass = mass.to(tl.float32) * factor[:, :, None]
            if IS_MAX:
                share = tl.maximum(share, mass)
            else:
                share += mass
                energy += mass * mass
    if IS_MAX:
        energy = share * share
    return tl.reshape(share, (BLOCK_M, BLOCK_N)), tl.reshape(energy, (BLOCK_M, BLOCK_N))


@triton.jit
def shares_kernel(
    masses,
    maxima,
    denominators,
    positions,
    value_mean,
    attention,
    output,
    output_power,
    heads,
    first_head,
    heads_here,
    query_blocks,
    kv_blocks,
    rows_of_head,
    width,
    tiles,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUERY_SAMPLES: tl.constexpr,
    PADDED: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS_N: tl.constexpr,
    RUN: tl.constexpr,
    IS_MAX: tl.constexpr,
    SHRINKAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M query blocks of one head, against all kv blocks.

    ``attention`` holds the second estimate of the energy on entry, and attention^2 as the errors need it on return.
    """
    head = (first_head + tl.program_id(1)).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    query_block = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_block = query_block < query_blocks
    per_sample = tl.full([BLOCK_M], 1.0, tl.float32)
    if not IS_MAX:
        per_sample /= tl.maximum(real_samples(positions, query_block, query_blocks, QUERY_SAMPLES, PADDED), 1.0)
    pair_row = (batch * heads + head) * query_blocks + query_block
    first_row = (batch * heads_here + tl.program_id(1)) * rows_of_head + query_block * PADDED
    value_mean += (batch * heads + head) * kv_blocks * HEAD_DIM

    mean_output = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, kv_blocks, BLOCK_N):
        share, energy = _sums(
            masses,
            maxima,
            denominators,
            first_row,
            is_block,
            start,
            kv_blocks,
            width,
            tiles,
            PADDED,
            STEP,
            BLOCK_M,
            BLOCK_N,
            BLOCKS_N,
            RUN,
            IS_MAX,
        )
        block = start + tl.arange(0, BLOCK_N)
        inside = block < kv_blocks
        share = tl.where(inside[None, :], share * per_sample[:, None], 0.0)
        if IS_MAX:
            total += tl.sum(share, axis=1)
        values = tl.load(
            value_mean + block[:, None] * HEAD_DIM + channel[None, :],
            mask=inside[:, None] & (channel < HEAD_DIM)[None, :],
            other=0.0,
        )
        mean_output = tl.dot(share.to(values.dtype), values, mean_output, input_precision=PRECISION)
        pair = pair_row[:, None] * kv_blocks + block[None, :]
        mask = is_block[:, None] & inside[None, :]
        second = tl.load(attention + pair, mask=mask, other=0.0)
        energy = energy * per_sample[:, None] * second
        tl.store(attention + pair, tl.exp2(tl.log2(energy) * (0.5 * SHRINKAGE)), mask=mask)

    if IS_MAX:  # sums of shares are 1 as they are
        mean_output /= tl.maximum(total, TINY)[:, None]
    mask = is_block[:, None] & (channel < HEAD_DIM)[None, :]
    stored = mean_output.to(output.dtype.element_ty)
    tl.store(output + pair_row[:, None] * HEAD_DIM + channel[None, :], stored, mask=mask)
    rounded = stored.to(tl.float32)
    tl.store(output_power + pair_row, tl.sum(rounded * rounded, axis=1), mask=is_block)


def shares_launch(
    masses: Masses,
    source: MassSource,
    statistics: Statistics,
    attention: Tensor,
    output: Tensor,
    output_power: Tensor,
    heads: range,
    *,
    target: str,
) -> KernelLaunch:
    """The launch that turns the second estimate in ``attention`` into attention^2, and fills what is beside it.

    Args:
        masses: of ``heads``, made by ``source``.
        attention: float32 [batch, all heads, query_blocks, kv_blocks]; in and out.
        output: [batch, all heads, query_blocks, head_dim], the mean output that the shares of the blocks' means give.
        output_power: float32 [batch, all heads, query_blocks], its squared norm.
    """
    batch, all_heads, query_blocks, kv_blocks = attention.shape
    head_dim = output.shape[3]
    tile, layout, positions = shares_tile(target, output.dtype), source.layout, source.positions
    arguments = {
        "masses": masses.mass,
        "maxima": masses.maximum,
        "denominators": masses.denominator,
        "positions": positions,
        "value_mean": statistics.value_mean,
        "attention": attention,
        "output": output,
        "output_power": output_power,
        "heads": all_heads,
        "first_head": heads.start,
        "heads_here": len(heads),
        "query_blocks": query_blocks,
        "kv_blocks": kv_blocks,
        "rows_of_head": layout.rows,
        "width": masses.mass.shape[1],
        "tiles": layout.tiles,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "QUERY_SAMPLES": positions.shape[1],
        "PADDED": layout.padded,
        "STEP": min(layout.padded, SAMPLES_AT_A_TIME),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCKS_N": layout.blocks_n,
        "RUN": min(RUN, layout.blocks_n),
        "IS_MAX": source.is_max,
        "SHRINKAGE": SHRINKAGE,
        "PRECISION": precision_of(target, output.dtype),
    }
    grid = (ceil_div(query_blocks, tile.block_m), len(heads), batch)
    return KernelLaunch(shares_kernel, grid, arguments, tile.num_warps, tile.num_stages)
