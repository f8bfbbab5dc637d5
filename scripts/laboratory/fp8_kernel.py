"""The Hopper kernel with e4m3 products, to see what they gain: of queries and keys, and of weights and values.

Not part of the package: no value correction, no lse, and with e4m3 values no level whose blocks have less than 16 rows.

Rows of e4m3 keys are copied as if they were half as many 16-bit numbers, so that all producers are the package's. A
row of logits is multiplied by its query's scale, and all by the head's scale of keys: neither takes an instruction
more. Values have a scale a channel, which the finished output is multiplied by.

The matrix units take e4m3 numbers from shared memory along the summed dimension alone, the keys. Values are therefore
stored in granules of 16 rows, transposed: [head_dim, 16], each channel's keys in the order in which a thread holds
weights when it has computed logits, so that nothing is moved between threads. See :func:`value_granules`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import shared_memory_descriptor
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from psa_diffusers.backends.triton.hopper_consumers import token_places, tokens_at
from psa_diffusers.backends.triton.hopper_kernel import empty_ring
from psa_diffusers.backends.triton.hopper_producers import key_producer, thread_barrier, value_producer
from psa_diffusers.backends.triton.hopper_turns import Lists, Queries, Turns, Work, next_tile, query_tile, tile_stops

# Newer releases of Triton have another name for the same.
NEW_NAME = gl.constexpr(hasattr(shared_memory_descriptor, "reinterpret"))


@gluon.jit
def _as_e4m3(memory, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """Shared memory as e4m3 numbers [ROWS, COLUMNS]."""
    if NEW_NAME:
        return memory.reinterpret(gl.float8e4nv, [ROWS, COLUMNS], LAYOUT)
    else:
        return memory._reinterpret(gl.float8e4nv, [ROWS, COLUMNS], LAYOUT)


@gluon.jit
def _key_tile(ring, slot, D: gl.constexpr):
    """A tile of e4m3 keys, transposed: [D, BLOCK_N]."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    return _as_e4m3(ring.tiles.index(slot), ring.tiles.shape[1], D, LAYOUT).permute((1, 0))


@gluon.constexpr_function
def _granules(channels, keys):
    """The layout of [channels, keys] that lie as [keys / 16][channels][16]."""
    in_granule = [[0, 2**bit] for bit in range(4)]
    channel = [[2**bit, 0] for bit in range(channels.bit_length() - 1)]
    granule = [[0, 2**bit] for bit in range(4, keys.bit_length() - 1)]
    return gl.SharedLinearLayout(in_granule + channel + granule, alignment=1024)


@gluon.jit
def _value_tile(ring, slot, D: gl.constexpr, VALUES8: gl.constexpr):
    """A tile of values [BLOCK_N, D]."""
    if VALUES8:
        BLOCK_N: gl.constexpr = ring.tiles.shape[1]
        return _as_e4m3(ring.tiles.index(slot), D, BLOCK_N, _granules(D, BLOCK_N)).permute((1, 0))
    else:
        return ring.tiles.index(slot)


@gluon.jit
def _scaled(logits, biases, slot, running_max, scale, COLUMN: gl.constexpr):
    """Logits in units of ln 2 with their biases, and their maximum so far."""
    logits = logits * scale[:, None] + biases.index(slot).load(COLUMN)[None, :]
    return logits, gl.maximum(running_max, gl.max(logits, 1))


@gluon.jit
def _weights(logits, running_max, new_max, SHIFT: gl.constexpr):
    """exp2 of the logits less their maximum, plus SHIFT, and what rescales earlier sums."""
    finite_max = gl.where(new_max == float("-inf"), 0.0, new_max)  # rows that have read nothing real yet
    shifted = finite_max - SHIFT
    return gl.exp2(logits - shifted[:, None]), gl.exp2(running_max - finite_max)


@gluon.jit
def _flat_bias(tile, stops, LEVELS: gl.constexpr):
    """The bias that all columns of a tile have, or -1: centroids have several, and the last tile of a level may."""
    bias = -1.0
    is_last = False
    for level in gl.static_range(LEVELS):
        bias = gl.where((tile < stops[level]) & (bias < 0.0), level * 1.0, bias)
        is_last = is_last | (tile == stops[level] - 1)
    return gl.where(is_last, -1.0, bias)


@gluon.jit
def _flat_weights(logits, bias, running_max, scale, SHIFT: gl.constexpr):
    """Weights where all columns have one bias, the new maximum, and what rescales: one instruction a number less."""
    new_max = gl.maximum(running_max, gl.max(logits, 1) * scale + bias)
    shift = bias + SHIFT - new_max
    return gl.exp2(logits * scale[:, None] + shift[:, None]), new_max, gl.exp2(running_max - new_max)


@gluon.jit
def _operand(weights, OPERAND: gl.constexpr, VALUES8: gl.constexpr):
    """Weights [ROWS, BLOCK_N] as the left operand; e4m3 ones in the order of keys of a granule."""
    if VALUES8:
        ROWS: gl.constexpr = weights.shape[0]
        BLOCK_N: gl.constexpr = weights.shape[1]
        weights = weights.reshape([ROWS, BLOCK_N // 16, 2, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([ROWS, BLOCK_N])
        weights = gl.convert_layout(weights, OPERAND, assert_trivial=True)
        # The compiler's own conversion takes the bytes apart and puts them together again.
        return gl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
            }""",
            "=r,r,r,r,r",
            [weights],
            dtype=gl.float8e4nv,
            is_pure=True,
            pack=4,
        )
    else:
        return gl.convert_layout(weights.to(gl.bfloat16), OPERAND)


@gluon.jit
def _attend(
    rows,
    keys,
    values,
    biases,
    done,
    stops,
    scale,
    D: gl.constexpr,
    LEVELS: gl.constexpr,
    STAGES: gl.constexpr,
    VALUES8: gl.constexpr,
    FRESH: gl.constexpr,
    CONVERT_FIRST: gl.constexpr,
    FLAT: gl.constexpr,
):
    """Goes through all tiles for the e4m3 queries ``rows`` [ROWS, D] in shared memory; ``scale`` [ROWS].

    With FRESH a tile's product with its values is added up in registers, not in the matrix units, whose sums of e4m3
    products have few bits. With FLAT tiles whose biases are all alike, with no padding among the keys, skip them; not
    together with FRESH.
    """
    ROWS: gl.constexpr = rows.shape[0]
    BLOCK_N: gl.constexpr = keys.tiles.shape[1]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32 if VALUES8 else 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 4 if VALUES8 else 2)
    COLUMN: gl.constexpr = gl.SliceLayout(0, LOGITS)
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    OUTPUT_ROW: gl.constexpr = gl.SliceLayout(1, OUTPUT)
    SHIFT: gl.constexpr = 8.0 if VALUES8 else 0.0

    blank = gl.zeros([ROWS, BLOCK_N], gl.float32, LOGITS)
    nothing = gl.zeros([ROWS, D], gl.float32, OUTPUT)
    accumulator = gl.zeros([ROWS, D], gl.float32, OUTPUT)
    running_max = gl.full([ROWS], float("-inf"), gl.float32, ROW)

    slot = done % STAGES
    mbarrier.wait(keys.full.index(slot), (done // STAGES) & 1)
    product = warpgroup_mma(rows, _key_tile(keys, slot, D), blank, use_acc=False, is_async=True)
    logits = warpgroup_mma_wait(0, [product])
    logits, new_max = _scaled(logits, biases, slot, running_max, scale, COLUMN)
    weights, rescale = _weights(logits, running_max, new_max, SHIFT)
    running_max = new_max
    mbarrier.arrive(keys.empty.index(slot))
    running_sum = gl.sum(weights, 1)
    if not VALUES8:
        weights = _operand(weights, OPERAND, VALUES8)

    for tile in range(1, stops[LEVELS]):
        operand = weights
        if VALUES8 and CONVERT_FIRST:  # Not a turn before: bytes that are carried over would take a register each.
            operand = _operand(weights, OPERAND, VALUES8)
        slot = (done + tile) % STAGES
        mbarrier.wait(keys.full.index(slot), ((done + tile) // STAGES) & 1)
        product = warpgroup_mma(rows, _key_tile(keys, slot, D), blank, use_acc=False, is_async=True)
        before = done + tile - 1
        mbarrier.wait(values.full.index(before % STAGES), (before // STAGES) & 1)
        tile_values = _value_tile(values, before % STAGES, D, VALUES8)
        if VALUES8 and not CONVERT_FIRST:
            operand = _operand(weights, OPERAND, VALUES8)
        if FRESH:
            pending = warpgroup_mma(operand, tile_values, nothing, use_acc=False, is_async=True)
        else:
            pending = warpgroup_mma(operand, tile_values, accumulator, is_async=True)
        logits = warpgroup_mma_wait(1, [product])
        if FLAT:
            bias = _flat_bias(tile, stops, LEVELS)
            if bias >= 0.0:
                new_weights, new_max, rescale = _flat_weights(logits, bias, running_max, scale, SHIFT)
            else:
                logits, new_max = _scaled(logits, biases, slot, running_max, scale, COLUMN)
                new_weights, rescale = _weights(logits, running_max, new_max, SHIFT)
            mbarrier.arrive(keys.empty.index(slot))
        else:
            logits, new_max = _scaled(logits, biases, slot, running_max, scale, COLUMN)
            mbarrier.arrive(keys.empty.index(slot))
            if FRESH:  # Before the weights: sums, a tile's product, operand and weights do not fit the registers.
                part = warpgroup_mma_wait(0, [pending])
                mbarrier.arrive(values.empty.index(before % STAGES))
                accumulator = accumulator * gl.convert_layout(rescale, OUTPUT_ROW)[:, None] + part
            new_weights, rescale = _weights(logits, running_max, new_max, SHIFT)
        running_max = new_max
        running_sum = running_sum * rescale + gl.sum(new_weights, 1)
        weights = new_weights if VALUES8 else _operand(new_weights, OPERAND, VALUES8)
        if not FRESH:
            accumulator = warpgroup_mma_wait(0, [pending])
            mbarrier.arrive(values.empty.index(before % STAGES))
            accumulator = accumulator * gl.convert_layout(rescale, OUTPUT_ROW)[:, None]

    last = done + stops[LEVELS] - 1
    mbarrier.wait(values.full.index(last % STAGES), (last // STAGES) & 1)
    tile_values = _value_tile(values, last % STAGES, D, VALUES8)
    operand = weights
    if VALUES8:
        operand = _operand(weights, OPERAND, VALUES8)
    pending = warpgroup_mma(operand, tile_values, nothing, use_acc=False, is_async=True)
    part = warpgroup_mma_wait(0, [pending])
    mbarrier.arrive(values.empty.index(last % STAGES))
    if FRESH:
        accumulator = accumulator * gl.convert_layout(rescale, OUTPUT_ROW)[:, None]
    return accumulator + part, running_sum


@gluon.jit
def consumer(
    turns,
    queries,
    work,
    lists,
    key_scales,
    value_scales,
    value_means,
    query_strides,
    out_strides,
    scale,
    offset,
    short_rows,
    rows,
    keys,
    values,
    biases,
    QUERY_BLOCK: gl.constexpr,
    KV_BLOCK: gl.constexpr,
    LEVELS: gl.constexpr,
    STAGES: gl.constexpr,
    VALUES8: gl.constexpr,
    FRESH: gl.constexpr,
    CONVERT_FIRST: gl.constexpr,
    FLAT: gl.constexpr,
):
    """Answers half of each tile of queries, from ``offset``; ``short_rows`` and ``rows`` [ROWS, D] are for them."""
    LOG2E: gl.constexpr = 1.4426950408889634
    ROWS: gl.constexpr = rows.shape[0]
    D: gl.constexpr = rows.shape[1]
    BLOCK_N: gl.constexpr = keys.tiles.shape[1]
    MEMORY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 32 if VALUES8 else 16])
    ROW: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32]))

    channel = gl.arange(0, D, gl.SliceLayout(0, MEMORY))
    out_channel = gl.arange(0, D, gl.SliceLayout(0, OUTPUT))
    done = 0
    turn = 0
    tile = next_tile(turns, turn, 4)
    while tile < work.tiles:
        row, first, stop = query_tile(work, tile, QUERY_BLOCK)
        local_head = row // work.query_blocks - work.first_head
        batch = (local_head // work.heads).to(gl.int64)
        head = (local_head % work.heads).to(gl.int64)
        token, live = tokens_at(queries.order, first + offset, stop, ROWS, gl.SliceLayout(1, MEMORY))
        places = token_places(queries.query, query_strides, batch, head, token, channel)
        query = gl.load(places, mask=live[:, None], other=0.0).to(gl.float32)
        largest = gl.maximum(gl.max(gl.abs(query), 1), 1e-30)
        short_rows.store((query * (448.0 / largest)[:, None]).to(gl.float8e4nv))
        row_scale = largest * (scale * LOG2E / 448.0 * gl.load(key_scales + local_head))
        fence_async_shared()
        thread_barrier()

        stops = tile_stops(lists.counts + row.to(gl.int64) * (LEVELS + 1), lists.kv_blocks, KV_BLOCK, LEVELS, BLOCK_N)
        accumulator, running_sum = _attend(
            short_rows,
            keys,
            values,
            biases,
            done,
            stops,
            gl.convert_layout(row_scale, ROW),
            D,
            LEVELS,
            STAGES,
            VALUES8,
            FRESH,
            CONVERT_FIRST,
            FLAT,
        )
        done += stops[LEVELS]
        is_empty = running_sum == 0.0
        divisor = gl.where(is_empty, 1.0, running_sum)
        accumulator = accumulator / gl.convert_layout(divisor, gl.SliceLayout(1, OUTPUT))[:, None]
        if VALUES8:
            accumulator = accumulator * gl.load(value_scales + local_head * D + out_channel)[None, :]
            accumulator += gl.load(value_means + local_head * D + out_channel)[None, :]

        rows.store(accumulator.to(rows.dtype))
        token, live = tokens_at(queries.order, first + offset, stop, ROWS, gl.SliceLayout(1, MEMORY))
        places = token_places(queries.out, out_strides, batch, head, token, channel)
        thread_barrier()
        gl.store(places, rows.load(MEMORY), mask=live[:, None])
        turn += 1
        tile = next_tile(turns, turn, 4)


@gluon.jit(do_not_specialize=["first_head"])
def fp8_attention_kernel(
    query,
    keys_1,
    keys_2,
    keys_3,
    keys_4,
    values_1,
    values_2,
    values_3,
    values_4,
    key_scales,
    value_scales,
    value_means,
    bias,
    centroid_bias,
    level_mask,
    blocks,
    counts,
    launch_order,
    order,
    out,
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
    empty_row,
    D: gl.constexpr,
    QUERY_BLOCK: gl.constexpr,
    KV_BLOCK: gl.constexpr,
    LEVELS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    VALUES8: gl.constexpr,
    FRESH: gl.constexpr,
    CONVERT_FIRST: gl.constexpr,
    FLAT: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """As the package's kernel; ``key_scales`` [heads], ``value_scales`` and ``value_means`` [heads, D], float32."""
    HALF: gl.constexpr = 64
    SHORT: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    LONG: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    short_rows_0 = gl.allocate_shared_memory(gl.float8e4nv, [HALF, D], SHORT)
    short_rows_1 = gl.allocate_shared_memory(gl.float8e4nv, [HALF, D], SHORT)
    rows_0 = gl.allocate_shared_memory(gl.bfloat16, [HALF, D], LONG)
    rows_1 = gl.allocate_shared_memory(gl.bfloat16, [HALF, D], LONG)
    keys = empty_ring(keys_1, D // 2, BLOCK_N, STAGES)
    values = empty_ring(values_1, D // 2 if VALUES8 else D, BLOCK_N, STAGES)
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

    queries = Queries(query, out, None, order)
    work = Work(launch_order, tiles, first_head, heads, query_blocks, query_length)
    lists = Lists(level_mask, blocks, counts, kv_blocks)
    gl.warp_specialize(
        [
            (
                consumer,
                (
                    turns,
                    queries,
                    work,
                    lists,
                    key_scales,
                    value_scales,
                    value_means,
                    query_strides,
                    out_strides,
                    scale,
                    0,
                    short_rows_0,
                    rows_0,
                    keys,
                    values,
                    biases,
                    QUERY_BLOCK,
                    KV_BLOCK,
                    LEVELS,
                    STAGES,
                    VALUES8,
                    FRESH,
                    CONVERT_FIRST,
                    FLAT,
                ),
            ),
            (
                consumer,
                (
                    turns,
                    queries,
                    work,
                    lists,
                    key_scales,
                    value_scales,
                    value_means,
                    query_strides,
                    out_strides,
                    scale,
                    HALF,
                    short_rows_1,
                    rows_1,
                    keys,
                    values,
                    biases,
                    QUERY_BLOCK,
                    KV_BLOCK,
                    LEVELS,
                    STAGES,
                    VALUES8,
                    FRESH,
                    CONVERT_FIRST,
                    FLAT,
                ),
            ),
            (
                key_producer,
                (
                    turns,
                    taken,
                    keys,
                    biases,
                    (keys_1, keys_2, keys_3, keys_4),
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
                value_producer,
                (
                    turns,
                    values,
                    (values_1, values_2, values_3, values_4),
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
                ),
            ),
        ],
        [4, 1, 1],
        [REGISTERS, 40, 40],
    )
