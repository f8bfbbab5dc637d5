"""The Hopper kernel's consumers: each answers 64 queries, products of one tile beside the softmax of the next."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .hopper_turns import next_tile, query_tile, tile_stops

# Newer releases of Triton have another name for the same.
thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def tokens_at(order, first, stop, ROWS: gl.constexpr, layout: gl.constexpr):
    """Tokens of ROWS positions from ``first``, int64, and which are before ``stop``."""
    position = first + gl.arange(0, ROWS, layout)
    live = position < stop
    token = position.to(gl.int64)
    if order is not None:
        token = gl.load(order + position, mask=live, other=0)
    return token, live


@gluon.jit
def token_places(base, strides, batch, head, token, channel):
    """Where the features of tokens of one head are, [tokens, channels], from a tensor's base and strides."""
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
def _common_bias(tile, stops, ALIKE: gl.constexpr):
    """The bias that all rows of a tile have, without padding: that of a level's groups. -1 if they may have several.

    Those are the tiles of all but the first ALIKE levels, centroids among them, and the last of each level: only there
    are blocks missing, or the short last block.
    """
    bias = -1.0
    is_last = False
    for level in gl.static_range(ALIKE):
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
    ALIKE: gl.constexpr,
):
    if ALIKE == 0:
        weights, new_max, rescale = _weights(logits, biases, slot, running_max, scale, COLUMN)
    else:
        bias = _common_bias(tile, stops, ALIKE)
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
    ALIKE: gl.constexpr,
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
            logits, biases, slot, tile, stops, running_max, scale, COLUMN, ALIKE
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
def consumer(
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
    ALIKE: gl.constexpr,
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
    tile = next_tile(turns, turn, 4)
    while tile < work.tiles:
        row, first, stop = query_tile(work, tile, QUERY_BLOCK)
        local_head = row // work.query_blocks - work.first_head
        batch = (local_head // work.heads).to(gl.int64)
        head = (local_head % work.heads).to(gl.int64)
        token, live = tokens_at(queries.order, first + offset, stop, ROWS, gl.SliceLayout(1, MEMORY))
        places = token_places(queries.query, query_strides, batch, head, token, channel)
        rows.store(gl.load(places, mask=live[:, None], other=0.0))
        fence_async_shared()
        thread_barrier()

        stops = tile_stops(lists.counts + row.to(gl.int64) * (LEVELS + 1), lists.kv_blocks, KV_BLOCK, LEVELS, BLOCK_N)
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
            ALIKE,
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
        token, live = tokens_at(queries.order, first + offset, stop, ROWS, gl.SliceLayout(1, MEMORY))
        places = token_places(queries.out, out_strides, batch, head, token, channel)
        gl.store(places, rows.load(MEMORY), mask=live[:, None])
        if queries.lse is not None:
            row_lse = gl.where(is_empty, float("-inf"), (running_max + gl.log2(divisor)) / LOG2E)
            token, live = tokens_at(queries.order, first + offset, stop, ROWS, ROW)
            lse = queries.lse + (row // work.query_blocks).to(gl.int64) * work.query_length
            gl.store(lse + token, row_lse, mask=live)
        turn += 1
        tile = next_tile(turns, turn, 4)
