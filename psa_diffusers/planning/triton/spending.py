"""Spending the budget: from prices to levels, as :func:`~..budget.spend` defines it.

The price at which the budget is spent is found in two steps: the octave by a histogram that the prices' kernel makes,
the bin in it by one that every chunk of pairs makes for itself. So each chunk knows what the chunks before it spend in
that bin, and fills it in index order without a third pass. All counts are whole numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...gpu.kernel_launch import KernelLaunch
from ...gpu.sizes import ceil_div, next_power_of_2

# A price is the leading 16 bits of a float32: 8 of exponent (an octave) and 7 of mantissa (a bin in it).
OCTAVES = 256
BINS = 128
BIN_COUNTERS = OCTAVES + BINS
# In place of prices, where there is nothing to choose: pairs that are level 1 anyway, and blocks without a real key.
FULL = -1
UNCOUNTED = -2
FULL_PRICE = tl.constexpr(FULL)
UNCOUNTED_PRICE = tl.constexpr(UNCOUNTED)
LOG_BINS = tl.constexpr(7)
TILE = 2048  # pairs that a program handles at a time
MAX_CHUNKS = 2048  # of pairs, a sample


@triton.jit
def _last_affordable(spent, room, BINS: tl.constexpr):
    """The lowest bin that the budget touches when it pays from the top down, and what the bins above it cost.

    Args:
        spent: pointer to int64 [BINS]; room: what may be spent.
    """
    place = tl.arange(0, BINS)
    cost = tl.load(spent + place)
    above = tl.sum(cost, axis=0) - tl.cumsum(cost, axis=0)
    last = tl.minimum(tl.sum((above > room).to(tl.int32), axis=0), BINS - 1)
    return last, tl.sum(tl.where(place == last, above, 0), axis=0)


@triton.jit
def _room(
    counts,
    full_query,
    full_kv,
    batch,
    heads,
    query_blocks,
    kv_blocks,
    allowance,
    KV_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """int64: what is left for steps, in 1 / KV_BLOCK, after the centroids and the full pairs.

    ``allowance`` is the budget of a pair, in 2^-20 / KV_BLOCK.
    """
    counted = tl.zeros([CHUNK], tl.int64)
    full_columns = tl.zeros([CHUNK], tl.int64)
    for start in range(0, kv_blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        is_counted = block < kv_blocks
        if counts is not None:
            is_counted = tl.load(counts + batch * kv_blocks + block, mask=is_counted, other=0) > 0
        counted += is_counted.to(tl.int64)
        if full_kv is not None:
            full_columns += (tl.load(full_kv + block, mask=is_counted, other=0) != 0).to(tl.int64)
    full_rows = tl.zeros([CHUNK], tl.int64)
    if full_query is not None:
        for start in range(0, query_blocks, CHUNK):
            block = start + tl.arange(0, CHUNK)
            full_rows += (tl.load(full_query + block, mask=block < query_blocks, other=0) != 0).to(tl.int64)
    columns = tl.sum(counted, axis=0)
    rows = tl.sum(full_rows, axis=0)
    full = (rows * columns + (query_blocks - rows) * tl.sum(full_columns, axis=0)) * heads
    pairs = columns * query_blocks * heads
    return ((pairs * allowance) >> 20) - full * KV_BLOCK - (pairs - full)


@triton.jit
def bins_kernel(
    prices,
    counts,
    full_query,
    full_kv,
    spent,
    spent_by_chunk,
    allowance,
    heads,
    query_blocks,
    kv_blocks,
    pairs,
    pairs_of_all,
    chunk_tiles,
    LEVELS: tl.constexpr,
    COSTS: tl.constexpr,
    TILE: tl.constexpr,
    OCTAVES: tl.constexpr,
    BINS: tl.constexpr,
    COUNTERS: tl.constexpr,
):
    """One program: one chunk of a sample's pairs; counts what the steps in the last octave cost, bin by bin."""
    chunk = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    room = _room(
        counts, full_query, full_kv, batch, heads, query_blocks, kv_blocks, allowance, COSTS[LEVELS], CHUNK=1024
    )
    octave, _ = _last_affordable(spent + batch * COUNTERS, room, OCTAVES)
    paid = tl.zeros([BINS], tl.int32)
    for tile in range(chunk_tiles):
        pair = (chunk * chunk_tiles + tile) * TILE + tl.arange(0, TILE)
        step_prices = prices + batch * pairs
        for step in tl.static_range(1, LEVELS + 1):
            price = tl.load(step_prices + pair, mask=pair < pairs, other=FULL_PRICE).to(tl.int32)
            step_prices += pairs_of_all
            count = tl.histogram(price & (BINS - 1), BINS, mask=price >> LOG_BINS == octave)
            paid += count.to(tl.int32) * (COSTS[step] - COSTS[step - 1])
    bin_ = tl.arange(0, BINS)
    chunks = tl.num_programs(0)
    tl.store(spent_by_chunk + (batch * BINS + bin_) * chunks + chunk, paid)
    counter = spent + batch * COUNTERS + OCTAVES + bin_
    tl.atomic_add(counter, paid.to(tl.int64), mask=paid > 0, sem="relaxed")


@triton.jit
def levels_kernel(
    prices,
    counts,
    full_query,
    full_kv,
    spent,
    spent_by_chunk,
    cap,
    levels,
    allowance,
    heads,
    query_blocks,
    kv_blocks,
    pairs,
    pairs_of_all,
    chunk_tiles,
    LEVELS: tl.constexpr,
    COSTS: tl.constexpr,
    TILE: tl.constexpr,
    OCTAVES: tl.constexpr,
    BINS: tl.constexpr,
    COUNTERS: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """One program: the levels of one chunk of a sample's pairs."""
    chunk = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    room = _room(
        counts, full_query, full_kv, batch, heads, query_blocks, kv_blocks, allowance, COSTS[LEVELS], CHUNK=1024
    )
    octave, above = _last_affordable(spent + batch * COUNTERS, room, OCTAVES)
    bin_, above_in_octave = _last_affordable(spent + batch * COUNTERS + OCTAVES, room - above, BINS)
    last = octave * BINS + bin_
    chunks = tl.num_programs(0)
    earlier = tl.arange(0, CHUNKS)
    in_earlier = tl.load(spent_by_chunk + (batch * BINS + bin_) * chunks + earlier, mask=earlier < chunk, other=0)
    # What is left for this chunk, as far as it can matter to it: it fits 32 bits.
    left = room - above - above_in_octave - tl.sum(in_earlier.to(tl.int64), axis=0)
    limit = 1 << 29
    left = tl.minimum(tl.maximum(left, -limit), limit).to(tl.int32)
    for tile in range(chunk_tiles):
        pair = (chunk * chunk_tiles + tile) * TILE + tl.arange(0, TILE)
        step_prices = prices + batch * pairs
        found = ()
        in_last = tl.zeros([TILE], tl.int32)
        for step in tl.static_range(1, LEVELS + 1):
            price = tl.load(step_prices + pair, mask=pair < pairs, other=FULL_PRICE).to(tl.int32)
            step_prices += pairs_of_all
            found += (price,)
            in_last += tl.where(price == last, COSTS[step] - COSTS[step - 1], 0)
        before = tl.cumsum(in_last, axis=0) - in_last
        level = tl.full([TILE], LEVELS + 1, tl.int32)
        if cap is not None:
            column = pair // (query_blocks * kv_blocks) * kv_blocks + pair % kv_blocks
            coarsest = tl.load(cap + batch * heads * kv_blocks + column, mask=pair < pairs, other=0).to(tl.int32)
            unpaid = tl.zeros([TILE], tl.int32)
        for step in tl.static_range(1, LEVELS + 1):
            cost = COSTS[step] - COSTS[step - 1]
            is_last = found[step - 1] == last
            is_allowed = is_last
            if cap is not None:  # the next step that is allowed has the same price, and pays for both
                is_allowed = LEVELS + 1 - step <= coarsest
                cost += unpaid
                unpaid = tl.where(is_allowed, 0, cost)
                is_allowed &= is_last
            before += tl.where(is_allowed, cost, 0)
            # Half a step may be overdrawn: so the plan is as close to the budget from either side as steps allow.
            taken = (found[step - 1] > last) | (is_allowed & (2 * before - cost <= 2 * left))
            level = tl.where(taken, LEVELS + 1 - step, level)
        level = tl.where(found[0] == FULL_PRICE, 1, level)
        level = tl.where(found[0] == UNCOUNTED_PRICE, 0, level)
        tl.store(levels + batch * pairs + pair, level.to(tl.int8), mask=pair < pairs)
        left -= tl.sum(in_last, axis=0)


def chunks_of(pairs: int) -> tuple[int, int]:
    """How many chunks a sample's pairs are cut into, and how many tiles each one has."""
    tiles = ceil_div(pairs, TILE)
    chunk_tiles = ceil_div(tiles, MAX_CHUNKS)
    return ceil_div(tiles, chunk_tiles), chunk_tiles


def bins_launch(
    prices: Tensor,
    counts: Tensor | None,
    full: tuple[Tensor | None, Tensor | None],
    spent: Tensor,
    spent_by_chunk: Tensor,
    *,
    costs: tuple[int, ...],
    compute_budget: float,
) -> KernelLaunch:
    """The launch that fills ``spent_by_chunk`` and the bins of ``spent``.

    Args:
        prices: int16 [num_levels, batch, heads, query_blocks, kv_blocks], see :mod:`.prices`.
        counts: int32 [batch, kv_blocks], real keys; None = none is missing a block.
        full: as for :func:`~.prices.prices_launch`.
        spent: int64 [batch, BIN_COUNTERS], its octaves counted.
        spent_by_chunk: int32 [batch, BINS, chunks], see :func:`chunks_of`.
    """
    arguments = _arguments(prices, counts, full, spent, spent_by_chunk, costs, compute_budget)
    return KernelLaunch(bins_kernel, _grid(spent_by_chunk), arguments, num_warps=4)


def levels_launch(
    prices: Tensor,
    counts: Tensor | None,
    full: tuple[Tensor | None, Tensor | None],
    spent: Tensor,
    spent_by_chunk: Tensor,
    levels: Tensor,
    *,
    costs: tuple[int, ...],
    compute_budget: float,
    cap: Tensor | None = None,
) -> KernelLaunch:
    """The launch that fills ``levels`` int8 [batch, heads, query_blocks, kv_blocks]; after that of the bins.

    ``cap``: int8 [batch, heads, kv_blocks], the coarsest levels allowed beside the centroid, which the prices heed too.
    """
    arguments = _arguments(prices, counts, full, spent, spent_by_chunk, costs, compute_budget)
    arguments |= {"cap": cap, "levels": levels, "CHUNKS": next_power_of_2(spent_by_chunk.shape[2])}
    return KernelLaunch(levels_kernel, _grid(spent_by_chunk), arguments, num_warps=8)


def _grid(spent_by_chunk: Tensor) -> tuple[int, int]:
    return spent_by_chunk.shape[2], spent_by_chunk.shape[0]


def _arguments(prices, counts, full, spent, spent_by_chunk, costs, compute_budget) -> dict:
    _, batch, heads, query_blocks, kv_blocks = prices.shape
    pairs = heads * query_blocks * kv_blocks
    return {
        "prices": prices,
        "counts": counts,
        "full_query": full[0],
        "full_kv": full[1],
        "spent": spent,
        "spent_by_chunk": spent_by_chunk,
        # In whole numbers throughout; the budget is rounded to 2**-20 of a pair's centroid.
        "allowance": round(compute_budget * costs[-1] * 2**20),
        "heads": heads,
        "query_blocks": query_blocks,
        "kv_blocks": kv_blocks,
        "pairs": pairs,
        "pairs_of_all": batch * pairs,
        "chunk_tiles": chunks_of(pairs)[1],
        "LEVELS": len(costs) - 1,
        "COSTS": costs,
        "TILE": TILE,
        "OCTAVES": OCTAVES,
        "BINS": BINS,
        "COUNTERS": spent.shape[1],
    }
