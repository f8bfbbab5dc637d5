"""What the planner's kernels for Hopper share: copies to shared memory, and the order of what runs side by side."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared

# Newer releases of Triton have other names for the same.
copy_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.constexpr_function
def rows_layout(head_dim, num_warps):
    """Rows of head_dim numbers, 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // head_dim, head_dim // 8], [num_warps, 1], [1, 0])


@gluon.jit
def later(number):
    """0, as the compiler cannot know: what is computed with it is not kept in registers from before a loop."""
    return number >> 30


@gluon.constexpr_function
def _assembly(count):
    """Adds up ``count`` numbers, sleeps if the sum is a NaN that no arithmetic makes, and returns the numbers."""
    moves = "".join(f"mov.f32 ${number}, ${count + number}; " for number in range(count))
    adds = "".join(f"add.f32 total, total, ${count + number}; " for number in range(1, count))
    check = "mov.b32 bits, total; setp.eq.s32 never, bits, 0x7f812345; @never nanosleep.u32 1; "
    names = ".reg .f32 total; .reg .b32 bits; .reg .pred never; "
    return "{ " + names + f"mov.f32 total, ${count}; " + adds + check + moves + "}"


@gluon.constexpr_function
def _constraints(count):
    return ",".join(["=f"] * count + ["f"] * count)


@gluon.jit
def settled(numbers, COUNT: gl.constexpr):
    """``numbers``, of which a thread has a multiple of COUNT, computed before all that follows.

    The assembler would otherwise wait for matrix units first, and do afterwards what should run in the meantime.
    """
    return gl.inline_asm_elementwise(
        _assembly(COUNT), _constraints(COUNT), [numbers], dtype=gl.float32, is_pure=False, pack=COUNT
    )


@gluon.jit
def arrived(PENDING: gl.constexpr):
    """Waits until but PENDING groups of copies have arrived, for all warps; matrix units may read what arrived."""
    async_copy.wait_group(PENDING)
    fence_async_shared()
    thread_barrier()


@gluon.jit
def copy_queries(
    rows,
    query,
    query_strides,
    positions,
    order,
    batch,
    head,
    block,
    sample,
    query_blocks,
    SAMPLES: gl.constexpr,
):
    """Starts the copy of sampled queries to shared memory [ROWS, D]; 0 for none.

    Row r is sample[r] of query block block[r], if sample[r] < SAMPLES; both are int32 [ROWS] by rows_layout.
    """
    D: gl.constexpr = rows.shape[1]
    is_row = (block < query_blocks) & (sample < SAMPLES)
    position = gl.load(positions + block * SAMPLES + sample, mask=is_row, other=-1)
    valid = position >= 0
    token = position.to(gl.int64)
    if order is not None:
        token = gl.load(order + position, mask=valid, other=0)
    channel = gl.arange(0, D, gl.SliceLayout(0, rows_layout(D, gl.num_warps())))
    query += batch * query_strides[0] + head * query_strides[2]
    places = query + token[:, None] * query_strides[1] + channel.to(gl.int64)[None, :] * query_strides[3]
    copy_rows(rows, places, mask=valid[:, None])
