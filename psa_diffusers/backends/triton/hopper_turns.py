"""What the groups of warps of the Hopper kernel share: tiles, lists and work, and whose turn it is."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


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
def tell(turns, turn, tile):
    """Tells the other groups of warps the tile of queries of a turn."""
    slot = turn & 1
    mbarrier.wait(turns.empty.index(slot), ((turn >> 1) & 1) ^ 1)
    turns.tiles.index(slot).store(gl.full([1], tile, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(turns.full.index(slot))


@gluon.jit
def next_tile(turns, turn, WARPS: gl.constexpr):
    """The tile of queries of a turn, as told; all groups stop at the first past the last."""
    slot = turn & 1
    mbarrier.wait(turns.full.index(slot), (turn >> 1) & 1)
    tile = gl.max(turns.tiles.index(slot).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)
    mbarrier.arrive(turns.empty.index(slot))
    return tile


@gluon.jit
def query_tile(work, tile, QUERY_BLOCK: gl.constexpr):
    """The row (of all that the lists have), the first query's position and the end of the query block."""
    TILES: gl.constexpr = QUERY_BLOCK // 128
    row = gl.load(work.launch_order + work.first_head * work.query_blocks + tile // TILES)
    start = row % work.query_blocks * QUERY_BLOCK
    return row, start + tile % TILES * 128, gl.minimum(start + QUERY_BLOCK, work.query_length)


@gluon.jit
def tile_stops(counts, kv_blocks, KV_BLOCK: gl.constexpr, LEVELS: gl.constexpr, BLOCK_N: gl.constexpr):
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
