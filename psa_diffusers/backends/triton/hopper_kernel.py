"""The attention kernel for Hopper in Gluon: bulk copies, warp specialisation, asynchronous matrix units.

Four groups of warps share a query block of 128 rows. Two producers, a warp each, follow the lists and copy whole blocks
of packed keys, or of values, into a ring of tiles; the copy engine does the work and a barrier tells when a tile is
there. Two consumers of 64 queries multiply: while the matrix units work on one tile, the softmax of the next runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Newer releases of Triton have other names for the same.
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


class Ring(NamedTuple):
    """Tiles that one producer fills and both consumers empty, in turns."""

    tiles: Any  # shared memory [STAGES, BLOCK_N, D]
    full: Any  # barriers [STAGES, 1]: the tile has arrived
    empty: Any  # barriers [STAGES, 1]: both consumers are done with it


class Queries(NamedTuple):
    """Queries, outputs and lse [batch, heads, query_length] in device memory, and the token at each position."""

    query: Any
    out: Any
    lse: Any  # or None
    order: Any  # or None


class Work(NamedTuple):
    """What the programs share out among them."""

    launch_order: Any  # rows of query blocks
    tiles: Any  # of 128 queries, over all rows
    first_head: Any
    heads: Any
    query_blocks: Any
    query_length: Any


class Turns(NamedTuple):
    """Which tile of queries comes next: one producer takes it and tells the other groups of warps."""

    tiles: Any  # shared memory [2, 1]
    full: Any  # barriers [2, 1]
    empty: Any  # barriers [2, 1]: the three others know


class Lists(NamedTuple):
    """What query blocks read, in device memory: the first row's."""

    levels: Any  # int8 [kv_blocks]
    blocks: Any  # [kv_blocks]
    counts: Any  # [LEVELS + 1]
    kv_blocks: Any


@gluon.jit
def _tell(turns, turn, tile):
    """Tells the other groups of warps the tile of queries of a turn."""
    slot = turn & 1
    mbarrier.wait(turns.empty.index(slot), ((turn >> 1) & 1) ^ 1)
    turns.tiles.index(slot).store(gl.full([1], tile, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(turns.full.index(slot))


@gluon.jit
def _next_tile(turns, turn, WARPS: gl.constexpr):
    """The tile of queries of a turn, as told; all groups stop at the first past the last."""
    slot = turn & 1
    mbarrier.wait(turns.full.index(slot), (turn >> 1) & 1)
    tile = gl.max(turns.tiles.index(slot).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)
    mbarrier.arrive(turns.empty.index(slot))
    return tile


@gluon.jit
def _query_tile(work, tile, QUERY_BLOCK: gl.constexpr):
    """The row (of all that the lists have), the first query's position and the end of the query block."""
    TILES: gl.constexpr = QUERY_BLOCK // 128
    row = gl.load(work.launch_order + work.first_head * work.query_blocks + tile // TILES)
    start = row % work.query_blocks * QUERY_BLOCK
    return row, start + tile % TILES * 128, gl.minimum(start + QUERY_BLOCK, work.query_length)


@gluon.jit
def _tile_stops(counts, kv_blocks, KV_BLOCK: gl.constexpr, LEVELS: gl.constexpr, BLOCK_N: gl.constexpr):
    """Of each level, centroids included, the first tile after it. There is always a tile, be it an empty one."""
    stops = ()
    tiles = 0
    for level in gl.static_range(LEVELS):
        blocks = gl.load(counts + level)
        tiles += (blocks * (KV_BLOCK >> level) + (BLOCK_N - 1)) // BLOCK_N
        stops += (tiles,)
    centroids = gl.where(gl.load(counts + LEVELS) > 0, (kv_blocks + (BLOCK_N - 1)) // BLOCK_N, 0)
    stops += (tiles + gl.where(tiles + centroids == 0, 1, centroids),)
    return stops


# -- producers --------------------------------------------------------------------------------------------------------


@gluon.jit
def _send(ring, biases, tile, source, rows, row_bias, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Waits for a place in the ring and copies a tile there, ROWS rows from each of ``rows``."""
    slot = tile % STAGES
    mbarrier.wait(ring.empty.index(slot), ((tile // STAGES) & 1) ^ 1)
    if biases is not None:
        biases.index(slot).store(row_bias)
        thread_barrier()
    mbarrier.expect(ring.full.index(slot), BLOCK_N * source.block_shape[1] * 2)
    for part in gl.static_range(BLOCK_N // ROWS):
        copy_tile(source, [rows[part], 0], ring.full.index(slot), ring.tiles.index(slot).slice(part * ROWS, ROWS, 0))


@gluon.jit
def _send_level(
    ring,
    biases,
    tile,
    source,
    blocks,
    count,
    section,
    head_row,
    empty_row,
    bias,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Sends the listed blocks of one level, ROWS rows each, and the empty row's where a tile is not full."""
    PARTS: gl.constexpr = BLOCK_N // ROWS
    column = gl.arange(0, BLOCK_N, gl.BlockedLayout([BLOCK_N // 32], [32], [1], [0]))
    for first in range(0, count, PARTS):
        rows = ()
        for part in gl.static_range(PARTS):
            live = first + part < count
            block = gl.load(blocks + first + part, mask=live, other=0).to(gl.int32)
            rows += (head_row + gl.where(live, section + block * ROWS, empty_row),)
        row_bias = None
        if biases is not None:
            live = first + column // ROWS < count
            block = gl.load(blocks + first + column // ROWS, mask=live, other=0).to(gl.int32)
            row_bias = gl.load(bias + section + block * ROWS + column % ROWS, mask=live, other=float("-inf"))
        _send(ring, biases, tile, source, rows, row_bias, ROWS, BLOCK_N, STAGES)
        tile += 1
    return tile


@gluon.jit
def _send_centroids(
    ring,
    biases,
    tile,
    tiles,
    source,
    levels,
    kv_blocks,
    section,
    head_row,
    centroid_bias,
    LEVEL: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Sends the centroids of all blocks, as they lie; the bias takes out those that are read otherwise or not at all.

    Most blocks are read as centroids: no list, and whole tiles in one copy, cost less than leaving the others out.
    """
    column = gl.arange(0, BLOCK_N, gl.BlockedLayout([BLOCK_N // 32], [32], [1], [0]))
    for first in range(0, tiles * BLOCK_N, BLOCK_N):
        rows = ()
        for part in gl.static_range(BLOCK_N // ROWS):
            rows += (head_row + section + first + part * ROWS,)
        row_bias = None
        if biases is not None:
            block = first + column
            inside = block < kv_blocks
            chosen = gl.load(levels + block, mask=inside, other=0) == LEVEL
            row_bias = gl.load(centroid_bias + block, mask=inside & chosen, other=float("-inf"))
        _send(ring, biases, tile, source, rows, row_bias, ROWS, BLOCK_N, STAGES)
        tile += 1
    return tile


@gluon.jit
def _send_query_tile(
    ring,
    biases,
    sent,
    tile,
    sources,
    first_row,
    covariance,
    work,
    lists,
    bias,
    centroid_bias,
    packed_rows,
    empty_row,
    QUERY_BLOCK: gl.constexpr,
    KV_BLOCK: gl.constexpr,
    LEVELS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Sends all that a tile of queries reads, with the bias of the rows if there is room for it.

    The covariance comes last, if there is one. Returns how many tiles went through the ring.
    """
    kv_blocks = lists.kv_blocks
    row, _, _ = _query_tile(work, tile, QUERY_BLOCK)
    head = row // work.query_blocks - work.first_head
    counts = lists.counts + row.to(gl.int64) * (LEVELS + 1)
    blocks = lists.blocks + row.to(gl.int64) * kv_blocks
    head_row = first_row + head * packed_rows
    bias += (head // work.heads).to(gl.int64) * packed_rows
    stop = sent + _tile_stops(counts, kv_blocks, KV_BLOCK, LEVELS, BLOCK_N)[LEVELS]
    section = 0
    for level in gl.static_range(LEVELS):
        count = gl.load(counts + level)
        sent = _send_level(
            ring,
            biases,
            sent,
            sources[level],
            blocks,
            count,
            section,
            head_row,
            empty_row,
            bias,
            KV_BLOCK >> level,
            BLOCK_N,
            STAGES,
        )
        blocks += count
        section += kv_blocks * (KV_BLOCK >> level)
    sent = _send_centroids(
        ring,
        biases,
        sent,
        stop - sent,
        sources[0],
        lists.levels + row.to(gl.int64) * kv_blocks,
        kv_blocks,
        section,
        head_row,
        centroid_bias + head.to(gl.int64) * kv_blocks,
        LEVELS + 1,
        KV_BLOCK,
        BLOCK_N,
        STAGES,
    )
    if covariance is not None:
        WIDTH: gl.constexpr = covariance.block_shape[0]
        _send(ring, None, sent, covariance, (head * WIDTH,), None, WIDTH, WIDTH, STAGES)
        sent += 1
    return sent


@gluon.jit
def _key_producer(
    turns,
    taken,
    ring,
    biases,
    sources,
    work,
    lists,
    bias,
    centroid_bias,
    packed_rows,
    empty_row,
    QUERY_BLOCK: gl.constexpr,
    KV_BLOCK: gl.constexpr,
    LEVELS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Takes tiles of queries until none is left, and sends the keys and biases."""
    sent = 0
    turn = 0
    tile = gl.program_id(0)
    while tile < work.tiles:
        _tell(turns, turn, tile)
        sent = _send_query_tile(
            ring,
            biases,
            sent,
            tile,
            sources,
            0,
            None,
            work,
            lists,
            bias,
            centroid_bias,
            packed_rows,
            empty_row,
            QUERY_BLOCK,
            KV_BLOCK,
            LEVELS,
            BLOCK_N,
            STAGES,
        )
        tile = gl.num_programs(0) + gl.atomic_add(taken, 1)
        turn += 1
    _tell(turns, turn, tile)


@gluon.jit
def _value_producer(
    turns,
    ring,
    sources,
    first_row,
    covariance,
    work,
    lists,
    bias,
    centroid_bias,
    packed_rows,
    empty_row,
    QUERY_BLOCK: gl.constexpr,
    KV_BLOCK: gl.constexpr,
    LEVELS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Sends the values, from row ``first_row`` on, and after them the head's covariance."""
    sent = 0
    turn = 0
    tile = _next_tile(turns, turn, 1)
    while tile < work.tiles:
        sent = _send_query_tile(
            ring,
            None,
            sent,
            tile,
            sources,
            first_row,
            covariance,
            work,
            lists,
            bias,
            centroid_bias,
            packed_rows,
            empty_row,
            QUERY_BLOCK,
            KV_BLOCK,
            LEVELS,
            BLOCK_N,
            STAGES,
        )
        turn += 1
        tile = _next_tile(turns, turn, 1)


# -- consumers --------------------------------------------------------------------------------------------------------


@gluon.jit
def _tokens(order, first, stop, ROWS: gl.constexpr, layout: gl.constexpr):
    """Tokens of ROWS positions from ``first``, int64, and which are before ``stop``."""
    position = first + gl.arange(0, ROWS, layout)
    live = position < stop
    token = position.to(gl.int64)
    if order is not None:
        token = gl.load(order + position, mask=live, other=0)
    return token, live


@gluon.jit
def _places(base, strides, batch, head, token, channel):
    base += batch * strides[0] + head * strides[2]
    return base + token[:, None] * strides[1] + channel.to(gl.int64)[None, :] * strides[3]


@gluon.jit
def _weights(logits, biases, slot, running_max, scale, COLUMN: gl.constexpr):
    """exp2 of the scaled logits less their maximum so far [ROWS, BLOCK_N], that maximum, and what rescales sums."""
    logits = logits * scale + biases.index(slot).load(COLUMN)[None, :]
    new_max = gl.maximum(running_max, gl.max(logits, 1))
    finite_max = gl.where(new_max == float("-inf"), 0.0, new_max)  # rows that have read nothing real yet
    return gl.exp2(logits - finite_max[:, None]), new_max, gl.exp2(running_max - finite_max)


@gluon.jit
def _common_bias(tile, stops, LEVELS: gl.constexpr):
    """The bias that all rows of a tile have, without padding: that of a level's groups. -1 if they may have several.

    Those are tiles of centroids, and the last of each level: only there are blocks missing, or the short last block.
    """
    bias = -1.0
    is_last = False
    for level in gl.static_range(LEVELS):
        bias = gl.where((tile < stops[level]) & (bias < 0.0), level * 1.0, bias)
        is_last = is_last | (tile == stops[level] - 1)
    return gl.where(is_last, -1.0, bias)


@gluon.jit
def _weights_alike(logits, bias, running_max, scale):
    """As :func:`_weights` where all rows of a tile have one bias; ``scale`` is positive.

    An addition less for each weight, and weights, not products, are what takes the time.
    """
    new_max = gl.maximum(running_max, gl.max(logits, 1) * scale + bias)
    finite_max = gl.where(new_max == float("-inf"), 0.0, new_max)
    return gl.exp2(logits * scale + (bias - finite_max)[:, None]), new_max, gl.exp2(running_max - finite_max)


@gluon.jit
def _weights_of_tile(
    logits,
    biases,
    slot,
    tile,
    stops,
    running_max,
    scale,
    COLUMN: gl.constexpr,
    LEVELS: gl.constexpr,
    PADDED: gl.constexpr,
):
    if PADDED:
        weights, new_max, rescale = _weights(logits, biases, slot, running_max, scale, COLUMN)
    else:
        bias = _common_bias(tile, stops, LEVELS)
        if bias < 0.0:
            weights, new_max, rescale = _weights(logits, biases, slot, running_max, scale, COLUMN)
        else:
            weights, new_max, rescale = _weights_alike(logits, bias, running_max, scale)
    return weights, new_max, rescale


@gluon.jit
def _load_factors(factors, LEVELS: gl.constexpr):
    """What each level loses of the covariance, in registers: in the loop over tiles a load would be waited for."""
    loaded = ()
    for level in gl.static_range(LEVELS + 1):
        loaded += (gl.load(factors + level),)
    return loaded


@gluon.jit
def _factor_of(tile, stops, factors, LEVELS: gl.constexpr):
    factor = factors[0]
    for finer in gl.static_range(LEVELS):
        factor = gl.where(tile >= stops[finer], factors[finer + 1], factor)
    return factor


@gluon.jit
def _attend(
    rows,
    keys,
    values,
    biases,
    first_key,
    first_value,
    stops,
    factors,
    scale,
    D: gl.constexpr,
    LEVELS: gl.constexpr,
    STAGES: gl.constexpr,
    PADDED: gl.constexpr,
):
    """Goes through all tiles for the queries ``rows`` [ROWS, D] in shared memory.

    ``first_key`` and ``first_value`` count the tiles that went through the rings before. Returns the accumulator
    [ROWS, D], and maximum, sum and lost covariance [ROWS]. Logits and the maximum are in units of ln 2. The product of
    a tile's weights with its values runs while the next tile's weights are computed.
    """
    ROWS: gl.constexpr = rows.shape[0]
    BLOCK_N: gl.constexpr = keys.tiles.shape[1]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    COLUMN: gl.constexpr = gl.SliceLayout(0, LOGITS)
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)

    blank = gl.zeros([ROWS, BLOCK_N], gl.float32, LOGITS)
    accumulator = gl.zeros([ROWS, D], gl.float32, OUTPUT)
    running_lost = gl.zeros([ROWS], gl.float32, ROW)
    running_max = gl.full([ROWS], float("-inf"), gl.float32, ROW)

    slot = first_key % STAGES
    mbarrier.wait(keys.full.index(slot), (first_key // STAGES) & 1)
    product = warpgroup_mma(rows, keys.tiles.index(slot).permute((1, 0)), blank, use_acc=False, is_async=True)
    logits = warpgroup_mma_wait(0, [product])
    weights, running_max, rescale = _weights(logits, biases, slot, running_max, scale, COLUMN)
    mbarrier.arrive(keys.empty.index(slot))
    running_sum = gl.sum(weights, 1)
    if factors is not None:
        running_lost = running_sum * _factor_of(0, stops, factors, LEVELS)
    operand = gl.convert_layout(weights.to(rows.dtype), OPERAND)

    for tile in range(1, stops[LEVELS]):
        slot = (first_key + tile) % STAGES
        mbarrier.wait(keys.full.index(slot), ((first_key + tile) // STAGES) & 1)
        product = warpgroup_mma(rows, keys.tiles.index(slot).permute((1, 0)), blank, use_acc=False, is_async=True)
        before = first_value + tile - 1
        mbarrier.wait(values.full.index(before % STAGES), (before // STAGES) & 1)
        pending = warpgroup_mma(operand, values.tiles.index(before % STAGES), accumulator, is_async=True)
        logits = warpgroup_mma_wait(1, [product])
        weights, running_max, rescale = _weights_of_tile(
            logits, biases, slot, tile, stops, running_max, scale, COLUMN, LEVELS, PADDED
        )
        mbarrier.arrive(keys.empty.index(slot))
        tile_sum = gl.sum(weights, 1)
        running_sum = running_sum * rescale + tile_sum
        if factors is not None:
            running_lost = running_lost * rescale + tile_sum * _factor_of(tile, stops, factors, LEVELS)
        next_operand = gl.convert_layout(weights.to(rows.dtype), OPERAND)
        accumulator = warpgroup_mma_wait(0, [pending])
        mbarrier.arrive(values.empty.index(before % STAGES))
        accumulator = accumulator * gl.convert_layout(rescale, gl.SliceLayout(1, OUTPUT))[:, None]
        operand = next_operand

    last = first_value + stops[LEVELS] - 1
    mbarrier.wait(values.full.index(last % STAGES), (last // STAGES) & 1)
    pending = warpgroup_mma(operand, values.tiles.index(last % STAGES), accumulator, is_async=True)
    accumulator = warpgroup_mma_wait(0, [pending])
    mbarrier.arrive(values.empty.index(last % STAGES))
    return accumulator, running_max, running_sum, running_lost


@gluon.jit
def _consumer(
    turns,
    queries,
    work,
    lists,
    factors,
    query_strides,
    out_strides,
    scale,
    offset,
    rows,
    keys,
    values,
    biases,
    QUERY_BLOCK: gl.constexpr,
    KV_BLOCK: gl.constexpr,
    LEVELS: gl.constexpr,
    STAGES: gl.constexpr,
    PADDED: gl.constexpr,
):
    """Answers half of each tile of queries, from ``offset``; ``rows`` [ROWS, D] is shared memory for them."""
    LOG2E: gl.constexpr = 1.4426950408889634
    ROWS: gl.constexpr = rows.shape[0]
    D: gl.constexpr = rows.shape[1]
    BLOCK_N: gl.constexpr = keys.tiles.shape[1]
    MEMORY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    OUTPUT_ROW: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    ROW: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16]))

    channel = gl.arange(0, D, gl.SliceLayout(0, MEMORY))
    first_key = 0
    first_value = 0
    turn = 0
    tile = _next_tile(turns, turn, 4)
    while tile < work.tiles:
        row, first, stop = _query_tile(work, tile, QUERY_BLOCK)
        local_head = row // work.query_blocks - work.first_head
        batch = (local_head // work.heads).to(gl.int64)
        head = (local_head % work.heads).to(gl.int64)
        token, live = _tokens(queries.order, first + offset, stop, ROWS, gl.SliceLayout(1, MEMORY))
        places = _places(queries.query, query_strides, batch, head, token, channel)
        rows.store(gl.load(places, mask=live[:, None], other=0.0))
        fence_async_shared()
        thread_barrier()

        stops = _tile_stops(lists.counts + row.to(gl.int64) * (LEVELS + 1), lists.kv_blocks, KV_BLOCK, LEVELS, BLOCK_N)
        head_factors = None
        if factors is not None:
            head_factors = _load_factors(factors + local_head * (LEVELS + 1), LEVELS)
        accumulator, running_max, running_sum, running_lost = _attend(
            rows,
            keys,
            values,
            biases,
            first_key,
            first_value,
            stops,
            head_factors,
            scale * LOG2E,
            D,
            LEVELS,
            STAGES,
            PADDED,
        )
        first_key += stops[LEVELS]
        first_value += stops[LEVELS]
        is_empty = running_sum == 0.0
        divisor = gl.where(is_empty, 1.0, running_sum)
        accumulator = accumulator / gl.convert_layout(divisor, OUTPUT_ROW)[:, None]
        if factors is not None:
            slot = first_value % STAGES
            mbarrier.wait(values.full.index(slot), (first_value // STAGES) & 1)
            matrix = values.tiles.index(slot).slice(0, D, 0).permute((1, 0))  # [keys, values]
            blank = gl.zeros([ROWS, D], gl.float32, OUTPUT)
            product = warpgroup_mma(rows, matrix, blank, use_acc=False, is_async=True)
            moved = warpgroup_mma_wait(0, [product])
            mbarrier.arrive(values.empty.index(slot))
            accumulator += moved * gl.convert_layout(running_lost / divisor * scale, OUTPUT_ROW)[:, None]
            first_value += 1

        # Through shared memory, so that whole rows are written at a time.
        rows.store(accumulator.to(rows.dtype))
        token, live = _tokens(queries.order, first + offset, stop, ROWS, gl.SliceLayout(1, MEMORY))
        places = _places(queries.out, out_strides, batch, head, token, channel)
        gl.store(places, rows.load(MEMORY), mask=live[:, None])
        if queries.lse is not None:
            row_lse = gl.where(is_empty, float("-inf"), (running_max + gl.log2(divisor)) / LOG2E)
            token, live = _tokens(queries.order, first + offset, stop, ROWS, ROW)
            lse = queries.lse + (row // work.query_blocks).to(gl.int64) * work.query_length
            gl.store(lse + token, row_lse, mask=live)
        turn += 1
        tile = _next_tile(turns, turn, 4)


# -- the kernel -------------------------------------------------------------------------------------------------------


@gluon.jit
def _ring(source, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """An empty ring for what ``source`` describes."""
    tiles = gl.allocate_shared_memory(source.dtype, [STAGES, BLOCK_N, D], source.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=2)
    return Ring(tiles, full, empty)


@gluon.jit(do_not_specialize=["first_head"])
def hopper_attention_kernel(
    query,
    rows_1,
    rows_2,
    rows_3,
    rows_4,
    covariance,
    covariance_factors,
    bias,
    centroid_bias,
    level_mask,
    blocks,
    counts,
    launch_order,
    order,
    out,
    lse,
    taken,
    query_strides,
    out_strides,
    scale,
    tiles,
    first_head,
    heads,
    query_length,
    query_blocks,
    kv_blocks,
    packed_rows,
    first_value,
    empty_row,
    D: gl.constexpr,
    QUERY_BLOCK: gl.constexpr,
    KV_BLOCK: gl.constexpr,
    LEVELS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    PADDED: gl.constexpr,
):
    """As many programs as there are processors; each takes one tile of 128 queries after the other. ``taken`` is 0.

    ``rows_1`` to ``rows_4`` describe the packed keys, and from row ``first_value`` on the values, in boxes of a block's
    rows at each level, ``covariance`` the matrices [batch * heads * D (values), D (keys)]. The tensors hold ``heads``
    heads a sample; the first is number ``first_head`` of those in the lists, the level mask and the lse. Where keys are
    not PADDED, and ``scale`` is positive, most tiles do without the biases.
    """
    HALF: gl.constexpr = 64
    rows = gl.allocate_shared_memory(rows_1.dtype, [2, HALF, D], rows_1.layout)
    keys = _ring(rows_1, D, BLOCK_N, STAGES)
    values = _ring(rows_1, D, BLOCK_N, STAGES)
    biases = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    turns = Turns(
        gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout()),
    )
    for slot in gl.static_range(2):
        mbarrier.init(turns.full.index(slot), count=1)
        mbarrier.init(turns.empty.index(slot), count=3)
    fence_async_shared()
    thread_barrier()

    queries = Queries(query, out, lse, order)
    work = Work(launch_order, tiles, first_head, heads, query_blocks, query_length)
    lists = Lists(level_mask, blocks, counts, kv_blocks)
    gl.warp_specialize(
        [
            (
                _consumer,
                (
                    turns,
                    queries,
                    work,
                    lists,
                    covariance_factors,
                    query_strides,
                    out_strides,
                    scale,
                    0,
                    rows.index(0),
                    keys,
                    values,
                    biases,
                    QUERY_BLOCK,
                    KV_BLOCK,
                    LEVELS,
                    STAGES,
                    PADDED,
                ),
            ),
            (
                _consumer,
                (
                    turns,
                    queries,
                    work,
                    lists,
                    covariance_factors,
                    query_strides,
                    out_strides,
                    scale,
                    HALF,
                    rows.index(1),
                    keys,
                    values,
                    biases,
                    QUERY_BLOCK,
                    KV_BLOCK,
                    LEVELS,
                    STAGES,
                    PADDED,
                ),
            ),
            (
                _key_producer,
                (
                    turns,
                    taken,
                    keys,
                    biases,
                    (rows_1, rows_2, rows_3, rows_4),
                    work,
                    lists,
                    bias,
                    centroid_bias,
                    packed_rows,
                    empty_row,
                    QUERY_BLOCK,
                    KV_BLOCK,
                    LEVELS,
                    BLOCK_N,
                    STAGES,
                ),
            ),
            (
                _value_producer,
                (
                    turns,
                    values,
                    (rows_1, rows_2, rows_3, rows_4),
                    first_value,
                    covariance,
                    work,
                    lists,
                    bias,
                    centroid_bias,
                    packed_rows,
                    empty_row,
                    QUERY_BLOCK,
                    KV_BLOCK,
                    LEVELS,
                    BLOCK_N,
                    STAGES,
                ),
            ),
        ],
        [4, 1, 1],
        [232, 40, 40],
    )
