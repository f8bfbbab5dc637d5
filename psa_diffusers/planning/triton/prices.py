"""Expected errors and the prices of the steps that lessen them, of all pairs in one pass.

What :func:`~..errors.pair_errors` and :func:`~..budget.step_prices` define, and the first half of the budget's
histogram: what the steps of each octave of prices cost.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...gpu.kernel_launch import KernelLaunch
from ...gpu.sizes import ceil_div
from ...gpu.target import padded_head_dim
from ..errors import COHERENCE
from .spending import FULL, LOG_BINS, OCTAVES, UNCOUNTED
from .statistics import Statistics
from .tiles import precision_of, prices_tile

DEPTH = 32  # channels of a product that are held at a time
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
FORBIDDEN = tl.constexpr(1e30)


@triton.jit
def _one_minus_exp(x):
    """1 - exp(-x) for x >= 0, also where x is small."""
    series = x * (1.0 - x * (0.5 - x * (1.0 / 6.0 - x * (1.0 / 24.0))))
    return tl.where(x < 0.05, series, 1.0 - tl.exp(-x))


@triton.jit
def _slice(base, row, inside, channel, HEAD_DIM: tl.constexpr):
    mask = inside[:, None] & (channel < HEAD_DIM)[None, :]
    return tl.load(base + row[:, None] * HEAD_DIM + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _products(
    left,
    row,
    is_row,
    right,
    column,
    is_column,
    channels,
    HEAD_DIM: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BM, BN]: rows of ``left`` times columns of ``right``, a few channels at a time, so that registers suffice."""
    total = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for start in range(0, channels, DEPTH):
        channel = start + tl.arange(0, DEPTH)
        rows = _slice(left, row, is_row, channel, HEAD_DIM)
        columns = _slice(right, column, is_column, channel, HEAD_DIM)
        total = tl.dot(rows, tl.trans(columns), total, input_precision=PRECISION)
    return total


@triton.jit
def _squared_distances(
    output,
    row,
    is_row,
    values,
    column,
    is_column,
    channels,
    HEAD_DIM: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BM, BN]: squared distance of each output from each value, of the numbers as they are stored."""
    total = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    row_norm = tl.zeros([row.shape[0]], tl.float32)
    column_norm = tl.zeros([column.shape[0]], tl.float32)
    for start in range(0, channels, DEPTH):
        channel = start + tl.arange(0, DEPTH)
        rows = _slice(output, row, is_row, channel, HEAD_DIM)
        columns = _slice(values, column, is_column, channel, HEAD_DIM)
        total = tl.dot(rows, tl.trans(columns), total, input_precision=PRECISION)
        row_norm += tl.sum(rows.to(tl.float32) * rows.to(tl.float32), axis=1)
        column_norm += tl.sum(columns.to(tl.float32) * columns.to(tl.float32), axis=1)
    return tl.maximum(row_norm[:, None] + column_norm[None, :] - 2.0 * total, 0.0)


@triton.jit
def _mean_power(output_power, full_query, query_blocks, CHUNK: tl.constexpr):
    """Mean over a head's rows that are not full anyway: those may be text that is padding, which has no say."""
    total = tl.zeros([CHUNK], tl.float32)
    rows = tl.zeros([CHUNK], tl.float32)
    for start in range(0, query_blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        is_free = block < query_blocks
        power = tl.load(output_power + block, mask=is_free, other=0.0)
        if full_query is not None:
            is_free = is_free & (tl.load(full_query + block, mask=is_free, other=0) == 0)
        total += tl.where(is_free, power, 0.0)
        rows += is_free.to(tl.float32)
    return tl.sum(total, axis=0) / tl.maximum(tl.sum(rows, axis=0), 1.0)


@triton.jit
def _price(rungs, step: tl.constexpr, COSTS: tl.constexpr, LEVELS: tl.constexpr):
    """The lambda, as a bin, below which step ``step`` of the ladder is taken; ``rungs`` is a tuple of errors."""
    best = tl.zeros_like(rungs[0])
    for upper in tl.static_range(step, LEVELS + 1):
        slope = tl.full(rungs[0].shape, float("inf"), tl.float32)
        for lower in tl.static_range(0, step):
            slope = tl.minimum(slope, (rungs[lower] - rungs[upper]) * (1.0 / (COSTS[upper] - COSTS[lower])))
        best = tl.maximum(best, slope)
    return (best.to(tl.int32, bitcast=True) >> 16) & 0x7FFF  # without the sign of -0.0


@triton.jit
def prices_kernel(
    attention,
    output,
    output_power,
    features,
    key_spread,
    value_spread,
    value_mean,
    counts,
    full_query,
    full_kv,
    cap,
    prices,
    spent,
    heads,
    query_blocks,
    kv_blocks,
    blocks_of_all_heads,
    pairs_of_all_heads,
    channels,
    HEAD_DIM: tl.constexpr,
    LEVELS: tl.constexpr,
    COSTS: tl.constexpr,
    COHERENCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr,
    OCTAVES: tl.constexpr,
    COUNTERS: tl.constexpr,
    FULL: tl.constexpr,
    UNCOUNTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M query blocks x BLOCK_N kv blocks of one head."""
    first_query = tl.program_id(1) * BLOCK_M
    head = (tl.program_id(2) % heads).to(tl.int64)
    batch = (tl.program_id(2) // heads).to(tl.int64)
    both = batch * heads + head
    query_block = first_query + tl.arange(0, BLOCK_M)
    block = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = query_block < query_blocks
    is_column = block < kv_blocks
    row = both * query_blocks + query_block
    column = both * kv_blocks + block
    pair = row[:, None] * kv_blocks + block[None, :]
    is_pair = is_row[:, None] & is_column[None, :]

    weight = 1.0 / tl.maximum(_mean_power(output_power + both * query_blocks, full_query, query_blocks, 1024), TINY)
    distance = _squared_distances(
        output, row, is_row, value_mean, column, is_column, channels, HEAD_DIM, DEPTH, PRECISION
    )
    pair_attention = tl.load(attention + pair, mask=is_pair, other=0.0)
    rungs = ()
    for rung in tl.static_range(LEVELS):  # the centroid first, then the coarsest level, ..., level 2
        place = (LEVELS - 1 - rung) * blocks_of_all_heads + column
        variance = _products(features, row, is_row, key_spread, place, is_column, channels, HEAD_DIM, DEPTH, PRECISION)
        lost = _one_minus_exp(0.5 * variance)
        covariance = variance * tl.load(value_spread + place, mask=is_column, other=0.0)[None, :]
        error = (COHERENCE * covariance + lost * lost * distance) * pair_attention
        error *= weight
        error = tl.where(error != error, 0.0, tl.minimum(error, FORBIDDEN))
        if cap is not None and rung > 0:
            coarsest = tl.load(cap + column, mask=is_column, other=0)
            error = tl.where((LEVELS + 1 - rung > coarsest)[None, :], FORBIDDEN, error)
        rungs += (error,)
    rungs += (tl.zeros_like(distance),)

    sentinel = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    if full_kv is not None:
        is_full = (tl.load(full_kv + block, mask=is_column, other=0) != 0)[None, :]
        if full_query is not None:
            is_full = is_full | (tl.load(full_query + query_block, mask=is_row, other=0) != 0)[:, None]
        sentinel = tl.where(is_full, FULL, sentinel)
    if counts is not None:
        count = tl.load(counts + batch * kv_blocks + block, mask=is_column, other=1)
        sentinel = tl.where((count == 0)[None, :], UNCOUNTED, sentinel)
    for step in tl.static_range(1, LEVELS + 1):
        price = tl.where(sentinel == 0, _price(rungs, step, COSTS, LEVELS), sentinel)
        tl.store(prices + (step - 1) * pairs_of_all_heads + pair, price.to(tl.int16), mask=is_pair)

    # Counted from memory: there a pair is one thread's, while a matrix unit's tile may be held by several.
    tl.debug_barrier()
    place = tl.arange(0, BLOCK_M * BLOCK_N)
    query_block = first_query + place // BLOCK_N
    block = tl.program_id(0) * BLOCK_N + place % BLOCK_N
    is_pair = (query_block < query_blocks) & (block < kv_blocks)
    pair = (both * query_blocks + query_block) * kv_blocks + block
    paid = tl.zeros([OCTAVES], tl.int32)
    for step in tl.static_range(1, LEVELS + 1):
        price = tl.load(prices + (step - 1) * pairs_of_all_heads + pair, mask=is_pair, other=FULL).to(tl.int32)
        octave = tl.where(price >= 0, price >> LOG_BINS, OCTAVES - 1)  # no price is in the last octave
        paid += tl.histogram(octave, OCTAVES).to(tl.int32) * (COSTS[step] - COSTS[step - 1])
    octave = tl.arange(0, OCTAVES)
    counter = spent + batch * COUNTERS + octave
    tl.atomic_add(counter, paid.to(tl.int64), mask=(paid > 0) & (octave < OCTAVES - 1), sem="relaxed")


def prices_launch(
    attention: Tensor,
    features: Tensor,
    output: Tensor,
    output_power: Tensor,
    statistics: Statistics,
    full: tuple[Tensor | None, Tensor | None],
    cap: Tensor | None,
    prices: Tensor,
    *,
    costs: tuple[int, ...],
    is_padded: bool,
    target: str,
) -> KernelLaunch:
    """The launch that fills ``prices`` and adds to the octaves of ``statistics.spent``.

    Args:
        attention: float32 [batch, heads, query_blocks, kv_blocks], attention^2.
        output, output_power, features: what the estimates left, see :mod:`.shares` and :mod:`.centroids`.
        full: bool [query_blocks] and [kv_blocks], blocks that hold a full token; None = none.
        cap: int8 [batch, heads, kv_blocks], the coarsest levels allowed beside the centroid; None = any.
        prices: int16 [num_levels, batch, heads, query_blocks, kv_blocks]; FULL or UNCOUNTED where there is no choice.
        costs: of the rungs, see :func:`~..budget.rung_costs`.
        is_padded: some blocks may hold no real key.
    """
    batch, heads, query_blocks, kv_blocks = attention.shape
    head_dim = output.shape[3]
    tile = prices_tile(target, head_dim, output.dtype)
    arguments = {
        "attention": attention,
        "output": output,
        "output_power": output_power,
        "features": features,
        "key_spread": statistics.key_spread,
        "value_spread": statistics.value_spread,
        "value_mean": statistics.value_mean,
        "counts": statistics.counts if is_padded else None,
        "full_query": full[0],
        "full_kv": full[1],
        "cap": cap,
        "prices": prices,
        "spent": statistics.spent,
        "heads": heads,
        "query_blocks": query_blocks,
        "kv_blocks": kv_blocks,
        "blocks_of_all_heads": batch * heads * kv_blocks,
        "pairs_of_all_heads": attention.numel(),
        "channels": head_dim,  # beside HEAD_DIM: a loop of known length would be unrolled, and its loads all come first
        "HEAD_DIM": head_dim,
        "LEVELS": prices.shape[0],
        "COSTS": costs,
        "COHERENCE": COHERENCE,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "DEPTH": min(DEPTH, padded_head_dim(head_dim)),
        "OCTAVES": OCTAVES,
        "COUNTERS": statistics.spent.shape[1],
        "FULL": FULL,
        "UNCOUNTED": UNCOUNTED,
        "PRECISION": precision_of(target, output.dtype),
    }
    grid = (ceil_div(kv_blocks, tile.block_n), ceil_div(query_blocks, tile.block_m), batch * heads)
    return KernelLaunch(prices_kernel, grid, arguments, tile.num_warps, tile.num_stages)
