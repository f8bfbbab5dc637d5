"""The Hopper kernel's producers, a warp each: they follow the lists and copy packed keys, or values, into a ring."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from .hopper_turns import next_tile, query_tile, tell, tile_stops

# Newer releases of Triton have other names for the same.
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


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
    BIAS_OF_HEADS: gl.constexpr,
):
    """Sends all that a tile of queries reads, with the bias of the rows if there is room for it.

    The covariance comes last, if there is one. Returns how many tiles went through the ring.
    """
    kv_blocks = lists.kv_blocks
    row, _, _ = query_tile(work, tile, QUERY_BLOCK)
    head = row // work.query_blocks - work.first_head
    counts = lists.counts + row.to(gl.int64) * (LEVELS + 1)
    blocks = lists.blocks + row.to(gl.int64) * kv_blocks
    head_row = first_row + head * packed_rows
    bias += (head if BIAS_OF_HEADS else head // work.heads).to(gl.int64) * packed_rows
    stop = sent + tile_stops(counts, kv_blocks, KV_BLOCK, LEVELS, BLOCK_N)[LEVELS]
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
def key_producer(
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
    BIAS_OF_HEADS: gl.constexpr,
):
    """Takes tiles of queries until none is left, and sends the keys and biases."""
    sent = 0
    turn = 0
    tile = gl.program_id(0)
    while tile < work.tiles:
        tell(turns, turn, tile)
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
            BIAS_OF_HEADS,
        )
        tile = gl.num_programs(0) + gl.atomic_add(taken, 1)
        turn += 1
    tell(turns, turn, tile)


@gluon.jit
def value_producer(
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
    BIAS_OF_HEADS: gl.constexpr,
):
    """Sends the values, from row ``first_row`` on, and after them the head's covariance."""
    sent = 0
    turn = 0
    tile = next_tile(turns, turn, 1)
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
            BIAS_OF_HEADS,
        )
        turn += 1
        tile = next_tile(turns, turn, 1)
