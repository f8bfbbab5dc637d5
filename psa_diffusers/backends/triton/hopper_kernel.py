"""The attention kernel for Hopper in Gluon: bulk copies, warp specialisation, asynchronous matrix units.

Four groups of warps share a query block of 128 rows. Two producers, a warp each, follow the lists and copy whole blocks
of packed keys, or of values, into a ring of tiles; the copy engine does the work and a barrier tells when a tile is
there. Two consumers of 64 queries multiply: while the matrix units work on one tile, the softmax of the next runs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .hopper_consumers import consumer
from .hopper_producers import key_producer, value_producer
from .hopper_turns import Lists, Queries, Ring, Turns, Work

# Newer releases of Triton have another name for the same.
thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def empty_ring(source, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
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
    ALIKE: gl.constexpr,
    BIAS_OF_HEADS: gl.constexpr,
):
    """As many programs as there are processors; each takes one tile of 128 queries after the other. ``taken`` is 0.

    ``rows_1`` to ``rows_4`` describe the packed keys, and from row ``first_value`` on the values, in boxes of a block's
    rows at each level, ``covariance`` the matrices [batch * heads * D (values), D (keys)]. The tensors hold ``heads``
    heads a sample; the first is number ``first_head`` of those in the lists, the level mask and the lse. Each of the
    first ALIKE levels has but one bias, except in its last tile: most of their tiles do without the biases.
    """
    HALF: gl.constexpr = 64
    rows = gl.allocate_shared_memory(rows_1.dtype, [2, HALF, D], rows_1.layout)
    keys = empty_ring(rows_1, D, BLOCK_N, STAGES)
    values = empty_ring(rows_1, D, BLOCK_N, STAGES)
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
                consumer,
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
                    ALIKE,
                ),
            ),
            (
                consumer,
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
                    ALIKE,
                ),
            ),
            (
                key_producer,
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
                    BIAS_OF_HEADS,
                ),
            ),
            (
                value_producer,
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
                    BIAS_OF_HEADS,
                ),
            ),
        ],
        [4, 1, 1],
        [232, 40, 40],
    )
