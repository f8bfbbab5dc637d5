"""The masses' kernel for Hopper, in Gluon: while the matrix units multiply a tile, the exponentials of another run."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, warpgroup_mma, warpgroup_mma_wait

from .hopper_rows import arrived, copy_queries, copy_rows, later, rows_layout, settled

# A tile of 16 kv blocks is multiplied in two halves, its even and its odd blocks. Row r of a half holds sample r // 8
# of the half's block r % 8: so a thread of the matrix units' result holds all samples of its blocks, and blocks that
# lie side by side.


@gluon.jit
def _copy_half(halves, half, samples, kv_blocks, STAGES: gl.constexpr):
    """Starts the copy of the head's half number ``half``."""
    ROWS: gl.constexpr = halves.shape[1]
    D: gl.constexpr = halves.shape[2]
    LAYOUT: gl.constexpr = rows_layout(D, gl.num_warps())
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    channel = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    block = half // 2 * 16 + row % 8 * 2 + half % 2
    places = samples + ((row // 8 * kv_blocks + block) * D)[:, None] + channel[None, :]
    copy_rows(halves.index(half % STAGES), places, mask=(block < kv_blocks)[:, None])
    async_copy.commit_group()


@gluon.jit
def _half_masses(products, sample_bias, half, regular_halves, kv_blocks, running_max, factor, IS_MAX: gl.constexpr):
    """exp2 of the logits less their largest so far, summed over each block's samples [ROWS, 8], and what is kept of it.

    Also that largest [ROWS], and what it is taken as: 0 where no key was met yet.
    """
    ROWS: gl.constexpr = products.shape[0]
    SAMPLES: gl.constexpr = products.shape[1] // 8
    if half >= regular_halves:
        # Loaded once and handed round: where each thread needs them, the addresses alone would take many registers.
        column = gl.arange(0, 8 * SAMPLES, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        block = half // 2 * 16 + column % 8 * 2 + half % 2
        bias = gl.load(sample_bias + column // 8 * kv_blocks + block, mask=block < kv_blocks, other=float("-inf"))
        products += gl.convert_layout(bias * (1.0 / factor), gl.SliceLayout(0, products.type.layout))[None, :]
    largest = gl.maximum(running_max, gl.max(products, 1) * factor)
    reference = gl.where(largest == float("-inf"), 0.0, largest)
    weights = gl.exp2(products * factor - reference[:, None])
    samples = gl.reshape(weights, (ROWS, SAMPLES, 8))
    mass = gl.sum(samples, 1)
    return mass, gl.max(samples, 1) if IS_MAX else mass, largest, reference


@gluon.jit
def _rescaled(mass, rescale):
    return mass * gl.convert_layout(rescale, gl.SliceLayout(1, mass.type.layout))[:, None]


@gluon.jit
def _store_tile(masses, maxima, even, odd, reference, tile, width, tiles):
    """Writes the masses of a tile's halves [ROWS, 8] and their reference, from the first row of the program."""
    ROWS: gl.constexpr = even.shape[0]
    mass = gl.reshape(gl.join(even, odd), (ROWS, 16)).to(masses.dtype.element_ty)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, mass.type.layout))
    block = gl.arange(0, 16, gl.SliceLayout(0, mass.type.layout))
    gl.store(masses + tile * 16 + (row[:, None] * width + block[None, :]), mass)
    row = gl.arange(0, ROWS, reference.type.layout)
    gl.store(maxima + tile + row * tiles, reference)


@gluon.jit
def hopper_masses_kernel(
    query,
    samples,
    sample_bias,
    positions,
    order,
    masses,
    maxima,
    denominators,
    query_strides,
    scale,
    heads,
    first_head,
    heads_here,
    query_blocks,
    kv_blocks,
    regular_blocks,
    rows_of_head,
    width,
    tiles,
    HEAD_DIM: gl.constexpr,
    QUERY_SAMPLES: gl.constexpr,
    PADDED: gl.constexpr,
    SAMPLES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    IS_MAX: gl.constexpr,
):
    """What :func:`~.masses.masses_kernel` computes, for a positive scale and SAMPLES = 8 samples a kv block.

    BLOCK_M sampled queries against all sampled keys of the head; ``tiles`` are of 16 kv blocks.
    """
    LOG2E: gl.constexpr = 1.4426950408889634
    WARPS: gl.constexpr = gl.num_warps()
    HALF: gl.constexpr = 8 * SAMPLES
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HALF, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    first_block = gl.program_id(0) * (BLOCK_M // PADDED)
    head = (first_head + gl.program_id(1)).to(gl.int64)
    batch = gl.program_id(2).to(gl.int64)
    rows = gl.allocate_shared_memory(query.dtype.element_ty, [1, BLOCK_M, HEAD_DIM], SHARED)
    halves = gl.allocate_shared_memory(query.dtype.element_ty, [STAGES, HALF, HEAD_DIM], SHARED)
    samples += (batch * heads + head) * SAMPLES * kv_blocks * HEAD_DIM
    sample_bias += batch * SAMPLES * kv_blocks
    first_row = (batch * heads_here + gl.program_id(1)) * rows_of_head + gl.program_id(0) * BLOCK_M
    masses += first_row * width
    maxima += first_row * tiles

    local = gl.arange(0, BLOCK_M, gl.SliceLayout(1, rows_layout(HEAD_DIM, WARPS)))
    places = (first_block + local // PADDED, local % PADDED, query_blocks, QUERY_SAMPLES)
    copy_queries(rows.index(0), query, query_strides, positions, order, batch, head, *places)
    for half in gl.static_range(STAGES):  # the first one's group holds the queries too
        _copy_half(halves, half, samples, kv_blocks, STAGES)
    arrived(STAGES - 1)
    blank = gl.zeros([BLOCK_M, HALF], gl.float32, LOGITS)
    pending = warpgroup_mma(rows.index(0), halves.index(0).permute((1, 0)), blank, use_acc=False, is_async=True)
    products = warpgroup_mma_wait(0, [pending])

    factor = scale * LOG2E
    regular_halves = regular_blocks // 16 * 2
    running_max = gl.full([BLOCK_M], float("-inf"), gl.float32, ROW)
    running_sum = gl.sum(gl.reshape(blank, (BLOCK_M, SAMPLES, 8)), 1)  # [BLOCK_M, 8], not yet over the blocks
    for tile in range(0, tiles):
        even = running_sum
        for half in gl.static_range(2):
            number = 2 * tile + half
            arrived(STAGES - 2)  # the next half; and all warps are done with this one's rows
            following = halves.index((number + 1) % STAGES).permute((1, 0))
            pending = warpgroup_mma(rows.index(later(tile)), following, blank, use_acc=False, is_async=True)
            _copy_half(halves, number + STAGES, samples, kv_blocks, STAGES)
            mass, kept, largest, reference = _half_masses(
                products, sample_bias, number, regular_halves, kv_blocks, running_max, factor, IS_MAX
            )
            rescale = gl.exp2(running_max - reference)
            running_sum = _rescaled(running_sum, rescale) + mass
            running_max = largest
            if half == 0:
                even = kept
            else:
                _store_tile(masses, maxima, _rescaled(even, rescale), kept, reference, tile, width, tiles)
            running_sum = settled(running_sum, 8)
            products = warpgroup_mma_wait(0, [pending])
    async_copy.wait_group(0)

    total = gl.convert_layout(gl.sum(running_sum, 1), ROW)
    local = gl.arange(0, BLOCK_M, ROW)
    block = first_block + local // PADDED
    is_row = (block < query_blocks) & (local % PADDED < QUERY_SAMPLES)
    position = gl.load(positions + block * QUERY_SAMPLES + local % PADDED, mask=is_row, other=-1)
    has_keys = (position >= 0) & (total > 0.0)
    gl.store(denominators + first_row + local, gl.where(has_keys, running_max + gl.log2(total), float("inf")))
