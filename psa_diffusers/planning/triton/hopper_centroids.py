"""The centroids' kernel for Hopper, in Gluon: while the matrix units multiply a tile, the softmax of another runs."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from .hopper_rows import arrived, copy_queries, copy_rows, later, rows_layout, settled

# Row r of a program is sample r % 16 of its query block r // 16: so a warp's share of the matrix units' result is whole
# blocks, and means over a block's samples stay within a warp.


@gluon.jit
def _copy_tile(means, spreads, number, tiles, key_mean, key_spread, kv_blocks, STAGES: gl.constexpr):
    """Starts the copy of a tile of the head's kv blocks, their means and spreads; from number ``tiles`` on again."""
    ROWS: gl.constexpr = means.shape[1]
    D: gl.constexpr = means.shape[2]
    LAYOUT: gl.constexpr = rows_layout(D, gl.num_warps())
    first = gl.where(number >= tiles, number - tiles, number) * ROWS
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    channel = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    inside = (first + row < kv_blocks)[:, None]
    places = first * D + (row * D)[:, None] + channel[None, :]
    copy_rows(means.index(number % STAGES), key_mean + places, mask=inside)
    copy_rows(spreads.index(number % STAGES), key_spread + places, mask=inside)
    async_copy.commit_group()


@gluon.jit
def _real_samples(positions, block, query_blocks, SAMPLES: gl.constexpr, LAYOUT: gl.constexpr):
    """How many samples there are of the query blocks ``block`` by the slice of LAYOUT, 1 at least."""
    sample = gl.arange(0, 16, gl.SliceLayout(0, LAYOUT))
    mask = (block < query_blocks)[:, None] & (sample < SAMPLES)[None, :]
    position = gl.load(positions + block[:, None] * SAMPLES + sample[None, :], mask=mask, other=-1)
    return gl.maximum(gl.sum((position >= 0).to(gl.float32), 1), 1.0)


@gluon.jit
def _square_queries(
    rows,
    squares,
    features,
    positions,
    first_block,
    query_blocks,
    scale,
    SAMPLES: gl.constexpr,
    D: gl.constexpr,
    KIND: gl.constexpr,
):
    """Fills ``squares`` with scale / 2 x those of the queries; writes the mean of the scaled ones' a block."""
    WARPS: gl.constexpr = gl.num_warps()
    LAYOUT: gl.constexpr = gl.BlockedLayout([16 * D // 256, 8], [256 // D, D // 8], [WARPS, 1], [1, 0])
    TABLE: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [WARPS, 1], [1, 0])
    for part in gl.static_range(rows.shape[0] // (16 * WARPS)):  # a block a warp
        square = rows.slice(part * 16 * WARPS, 16 * WARPS, 0).load(LAYOUT).to(gl.float32)
        square *= square
        squares.slice(part * 16 * WARPS, 16 * WARPS, 0).store((square * (0.5 * scale)).to(KIND))
        total = gl.sum(gl.reshape(square, (WARPS, 16, D)), 1) * (scale * scale)
        first = first_block + part * WARPS
        in_table = first + gl.arange(0, WARPS, gl.SliceLayout(1, TABLE))
        count = _real_samples(positions, in_table, query_blocks, SAMPLES, TABLE)
        power = total / gl.convert_layout(count, gl.SliceLayout(1, total.type.layout))[:, None]
        block = first + gl.arange(0, WARPS, gl.SliceLayout(1, total.type.layout))
        channel = gl.arange(0, D, gl.SliceLayout(0, total.type.layout))
        places = features + block[:, None] * D + channel[None, :]
        gl.store(places, power.to(features.dtype.element_ty), mask=(block < query_blocks)[:, None])


@gluon.jit
def _half_variance(squares, spreads, slot, blank):
    """Starts a tile's half variances of the logits, in units of the products of queries and means."""
    return warpgroup_mma(squares, spreads.index(slot).permute((1, 0)), blank, use_acc=False, is_async=True)


@gluon.jit
def _add_means(rows, means, slot, products):
    """Starts adding the products of queries and a tile's means."""
    return warpgroup_mma(rows, means.index(slot).permute((1, 0)), products, is_async=True)


@gluon.jit
def _biased(products, tile, count_bias, tiles, regular_tiles, kv_blocks, factor, LOG_KV_BLOCK: gl.constexpr):
    """Adds what a tile's blocks weigh less than whole ones, tile ``tiles`` being the first again."""
    tile = gl.where(tile >= tiles, tile - tiles, tile)
    if tile >= regular_tiles:
        block = tile * products.shape[1] + gl.arange(
            0, products.shape[1], gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        )
        bias = gl.load(count_bias + block, mask=block < kv_blocks, other=float("-inf"))
        bias = (bias - LOG_KV_BLOCK) * (1.0 / factor)
        products += gl.convert_layout(bias, gl.SliceLayout(0, products.type.layout))[None, :]
    return products


@gluon.jit
def _lane_sums(squared_mass):
    """Sums of squared masses [ROWS, BN] over the samples of a block that one thread has, [blocks, 8, BN]."""
    ROWS: gl.constexpr = squared_mass.shape[0]
    return gl.sum(gl.reshape(squared_mass, (ROWS // 16, 2, 8, squared_mass.shape[1])), 1)


@gluon.jit
def _store_energy(energy, lane_sums, per_sample, tile, first_block, query_blocks, kv_blocks):
    """Writes the means over a block's samples of squared masses."""
    BLOCKS: gl.constexpr = lane_sums.shape[0]
    BLOCK_N: gl.constexpr = lane_sums.shape[2]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, BLOCK_N // 32], [1, 32], [gl.num_warps(), 1], [1, 0])
    total = gl.convert_layout(gl.sum(lane_sums, 1), LAYOUT)
    block = gl.arange(0, BLOCKS, gl.SliceLayout(1, LAYOUT))
    column = tile * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
    mask = (first_block + block < query_blocks)[:, None] & (column < kv_blocks)[None, :]
    gl.store(energy + (block * kv_blocks)[:, None] + column[None, :], total * per_sample[:, None], mask=mask)


@gluon.jit
def hopper_centroids_kernel(
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
    regular_blocks,
    blocks_of_all_heads,
    HEAD_DIM: gl.constexpr,
    LEVELS: gl.constexpr,
    SAMPLES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    LOG_KV_BLOCK: gl.constexpr,
):
    """What :func:`~.centroids.centroids_kernel` computes, for 16 sampled queries a block: SAMPLES and empty rows.

    The first ``regular_blocks`` kv blocks have all their keys.
    """
    LOG2E: gl.constexpr = 1.4426950408889634
    WARPS: gl.constexpr = gl.num_warps()
    BLOCKS: gl.constexpr = BLOCK_M // 16
    MEMORY: gl.constexpr = rows_layout(HEAD_DIM, WARPS)
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    TABLE: gl.constexpr = gl.BlockedLayout([1, BLOCK_N // 32], [1, 32], [WARPS, 1], [1, 0])
    first_block = gl.program_id(0) * BLOCKS
    head = gl.program_id(1).to(gl.int64)
    batch = gl.program_id(2).to(gl.int64)
    kind: gl.constexpr = key_spread.dtype.element_ty
    rows = gl.allocate_shared_memory(query.dtype.element_ty, [1, BLOCK_M, HEAD_DIM], SHARED)
    squares = gl.allocate_shared_memory(kind, [1, BLOCK_M, HEAD_DIM], SHARED)
    means = gl.allocate_shared_memory(query.dtype.element_ty, [STAGES, BLOCK_N, HEAD_DIM], SHARED)
    spreads = gl.allocate_shared_memory(kind, [STAGES, BLOCK_N, HEAD_DIM], SHARED)
    base = (batch * heads + head) * kv_blocks * HEAD_DIM
    key_mean += base
    key_spread += base + (LEVELS - 1) * blocks_of_all_heads.to(gl.int64) * HEAD_DIM  # the last is the centroid
    count_bias += batch * kv_blocks
    row_block = (batch * heads + head) * query_blocks
    features += row_block * HEAD_DIM
    energy += (row_block + first_block) * kv_blocks
    tiles = (kv_blocks + BLOCK_N - 1) // BLOCK_N
    regular_tiles = regular_blocks // BLOCK_N

    local = gl.arange(0, BLOCK_M, gl.SliceLayout(1, MEMORY))
    place = (first_block + local // 16, local % 16)
    copy_queries(rows.index(0), query, query_strides, positions, order, batch, head, *place, query_blocks, SAMPLES)
    for stage in gl.static_range(STAGES):  # the first one's group holds the queries too
        _copy_tile(means, spreads, stage, tiles, key_mean, key_spread, kv_blocks, STAGES)
    arrived(STAGES - 1)
    tables = (features, positions, first_block, query_blocks, scale)
    _square_queries(rows.index(0), squares.index(0), *tables, SAMPLES, HEAD_DIM, kind)
    arrived(STAGES - 1)

    # Logits, in units of ln 2, are products of queries and means plus half their variance, both in one accumulator.
    # The largest of n keys holds at most the mass of n: beyond it the logits are not normal.
    factor = scale * LOG2E
    most = LOG_KV_BLOCK / factor
    blank = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, LOGITS)
    weights = (count_bias, tiles, regular_tiles, kv_blocks, factor, LOG_KV_BLOCK)
    variance = warpgroup_mma_wait(0, [_half_variance(squares.index(0), spreads, 0, blank)])
    products = warpgroup_mma_wait(0, [_add_means(rows.index(0), means, 0, gl.minimum(variance, most))])
    products = _biased(products, 0, *weights)
    running_max = gl.full([BLOCK_M], float("-inf"), gl.float32, ROW)
    running_sum = gl.zeros([BLOCK_M], gl.float32, ROW)
    for tile in range(0, tiles):
        slot = (tile + 1) % STAGES
        arrived(STAGES - 2)  # the next tile; and all warps are done with this one's rows
        pending = _half_variance(squares.index(later(tile)), spreads, slot, blank)
        _copy_tile(means, spreads, tile + STAGES, tiles, key_mean, key_spread, kv_blocks, STAGES)
        largest = settled(gl.maximum(running_max, gl.max(products, 1) * factor), 4)
        reference = gl.where(largest == float("-inf"), 0.0, largest)  # rows that have met no key yet
        variance = warpgroup_mma_wait(0, [pending])
        pending = _add_means(rows.index(later(tile)), means, slot, gl.minimum(variance, most))
        total = gl.sum(gl.exp2(products * factor - reference[:, None]), 1)
        running_sum = settled(running_sum * gl.exp2(running_max - reference) + total, 4)
        running_max = largest
        products = _biased(warpgroup_mma_wait(0, [pending]), tile + 1, *weights)

    local = gl.arange(0, BLOCK_M, ROW)
    block = first_block + local // 16
    is_row = (block < query_blocks) & (local % 16 < SAMPLES)
    position = gl.load(positions + block * SAMPLES + local % 16, mask=is_row, other=-1)
    has_keys = (position >= 0) & (running_sum > 0.0)
    denominator = gl.where(has_keys, 2.0 * (running_max + gl.log2(running_sum)), float("inf"))
    in_table = first_block + gl.arange(0, BLOCKS, gl.SliceLayout(1, TABLE))
    count = _real_samples(positions, in_table, query_blocks, SAMPLES, TABLE)
    per_sample = 1.0 / count
    for tile in range(0, tiles):
        number = tiles + tile
        slot = (number + 1) % STAGES
        arrived(STAGES - 2)
        pending = _half_variance(squares.index(later(tile)), spreads, slot, blank)
        _copy_tile(means, spreads, number + STAGES, tiles, key_mean, key_spread, kv_blocks, STAGES)
        lane_sums = settled(_lane_sums(gl.exp2(products * (2.0 * factor) - denominator[:, None])), 16)
        variance = warpgroup_mma_wait(0, [pending])
        pending = _add_means(rows.index(later(tile)), means, slot, gl.minimum(variance, most))
        _store_energy(energy, lane_sums, per_sample, tile, first_block, query_blocks, kv_blocks)
        products = _biased(warpgroup_mma_wait(0, [pending]), tile + 1, *weights)
    async_copy.wait_group(0)
