"""The value correction's matrices: how values vary with keys inside the blocks that pooling averages over."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...gpu.kernel_launch import KernelLaunch
from ...gpu.sizes import ceil_div
from ...gpu.target import padded_head_dim
from .layout import PyramidLayout
from .pyramid import Pyramid
from .tiles import covariance_tile

SLAB = 16  # rows of a matrix that the finishing kernel holds at a time
PROGRAMS = 256  # of level 1: enough to fill a GPU, few enough that their partial sums take little time and memory
LEAST_BLOCKS = 4  # of level 1 a program, where there are few
SUM_CHUNK = 1024  # numbers that a program of the sum holds


class Covariance(NamedTuple):
    """What the attention kernel adds for the values' covariance with the keys inside a block."""

    matrix: Tensor  # [batch, heads, head_dim (values), head_dim (keys)], dtype of the inputs; largest entry 1 or all 0
    factors: Tensor  # float32 [batch, heads, num_levels + 1]: share of it that each level lost, times its largest entry


@triton.jit
def _load_rows(base, row, mask, channel, HEAD_DIM: tl.constexpr):
    pointers = base + row.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :]
    return tl.load(pointers, mask=mask[:, None] & (channel < HEAD_DIM)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _tokens(bias, row, mask):
    """Real tokens behind packed rows, as float32: the bias is their log2."""
    return tl.floor(tl.exp2(tl.load(bias + row, mask=mask, other=float("-inf"))) + 0.5)


@triton.jit
def _pairs(item, bias, live, level, kv_blocks, LOG_KV_BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    """Two packed rows and a weight for each of a level's merges [items].

    Merging two groups of n and m tokens adds n m / (n + m) times the product of the differences of their means. The
    rows of the coarsest level are compared with their block's centroid instead, each weighing its tokens: the same sum.
    """
    rows = 1 << (LOG_KV_BLOCK + 1 - level)  # of the level, a block
    section = kv_blocks * ((2 << LOG_KV_BLOCK) - 2 * rows)
    centroids = kv_blocks * ((2 << LOG_KV_BLOCK) - (2 << LOG_KV_BLOCK >> LEVELS))
    is_last = level == LEVELS
    first = section + tl.where(is_last, item, 2 * item)
    second = tl.where(is_last, centroids + item // rows, section + 2 * item + 1)
    n, m = _tokens(bias, first, live), _tokens(bias, second, live)
    weight = tl.where(is_last, n, n * m / tl.maximum(n + m, 1.0))
    return first, second, weight


# The runs of blocks that programs add up: level 1's, level 2's, ... A level that has half as many merges a block has
# runs of twice as many blocks, so that all programs do equally much. The last level has as many as the one before.


@triton.jit
def _place_of_run(run, kv_blocks, blocks_each, LEVELS: tl.constexpr):
    """Which of its level's runs this is, that level, and how many blocks a run of it has."""
    level = 1 + 0 * run
    for finer in tl.static_range(1, LEVELS):
        runs = (kv_blocks + blocks_each - 1) // blocks_each
        is_coarser = (level == finer) & (run >= runs)
        run -= tl.where(is_coarser, runs, 0)
        level += is_coarser.to(tl.int32)
        if finer < LEVELS - 1:
            blocks_each = tl.where(is_coarser, 2 * blocks_each, blocks_each)
    return run, level, blocks_each


@triton.jit
def covariance_sum_kernel(partial, totals, kv_blocks, blocks_each, numbers, LEVELS: tl.constexpr, CHUNK: tl.constexpr):
    """One program: CHUNK numbers of a level's sum over its runs, in their order. Grid (chunks, levels)."""
    level = tl.program_id(1) + 1
    first = 0 * level
    for finer in tl.static_range(1, LEVELS):
        is_finer = finer < level
        first += tl.where(is_finer, (kv_blocks + blocks_each - 1) // blocks_each, 0)
        if finer < LEVELS - 1:
            blocks_each = tl.where(is_finer, 2 * blocks_each, blocks_each)
    place = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    partial += first.to(tl.int64) * numbers
    total = tl.zeros([CHUNK], tl.float32)
    for _run in range(0, (kv_blocks + blocks_each - 1) // blocks_each):
        total += tl.load(partial + place, mask=place < numbers, other=0.0)
        partial += numbers
    tl.store(totals + (level - 1).to(tl.int64) * numbers + place, total, mask=place < numbers)


@triton.jit
def covariance_kernel(
    packed_key,
    packed_value,
    bias,
    counted,
    partial,
    heads,
    kv_blocks,
    packed_rows,
    blocks_each,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    LOG_KV_BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: a level's merges in a run of blocks, for TILE_D value and TILE_D key channels.

    Grid (runs of blocks of all levels, tiles of the matrix, batch * heads). Half differences and weights of at most 1
    keep products in the range of float16; what that divides by is put back in float32.
    """
    DTYPE: tl.constexpr = packed_key.dtype.element_ty
    TILES: tl.constexpr = BLOCK_D // TILE_D
    tile = tl.program_id(1)
    run, level, blocks_each = _place_of_run(tl.program_id(0), kv_blocks, blocks_each, LEVELS)
    head = tl.program_id(2).to(tl.int64)
    value_channel = tile // TILES * TILE_D + tl.arange(0, TILE_D)
    key_channel = tile % TILES * TILE_D + tl.arange(0, TILE_D)
    packed_key += head * packed_rows * HEAD_DIM
    packed_value += head * packed_rows * HEAD_DIM
    bias += head // heads * packed_rows
    counted += head * kv_blocks

    is_last = level == LEVELS
    log_items = LOG_KV_BLOCK - level + tl.where(is_last, 1, 0)  # merges a block
    largest_weight = tl.exp2((level - tl.where(is_last, 1, 2)).to(tl.float32))  # of whole groups
    stop = tl.minimum((run + 1) * blocks_each, kv_blocks) << log_items
    total = tl.zeros([TILE_D, TILE_D], tl.float32)
    for start in range(run * blocks_each << log_items, stop, TILE_ROWS):
        item = start + tl.arange(0, TILE_ROWS)
        live = item < stop
        live = live & (tl.load(counted + (item >> log_items), mask=live, other=0) != 0)
        first, second, weight = _pairs(item, bias, live, level, kv_blocks, LOG_KV_BLOCK, LEVELS)
        value_gap = _load_rows(packed_value, first, live, value_channel, HEAD_DIM)
        value_gap -= _load_rows(packed_value, second, live, value_channel, HEAD_DIM)
        key_gap = _load_rows(packed_key, first, live, key_channel, HEAD_DIM)
        key_gap -= _load_rows(packed_key, second, live, key_channel, HEAD_DIM)
        value_gap *= 0.5 * (weight / largest_weight)[:, None]
        total = tl.dot(
            tl.trans(value_gap.to(DTYPE)), (0.5 * key_gap).to(DTYPE), total, input_precision=PRECISION
        )  # [TILE_D, TILE_D]
    matrix = (tl.program_id(0).to(tl.int64) * tl.num_programs(2) + head) * BLOCK_D * BLOCK_D
    places = value_channel[:, None] * BLOCK_D + key_channel[None, :]
    tl.store(partial + matrix + places, total * (4.0 * largest_weight))


@triton.jit
def _lost(totals, tokens, place, heads, BLOCK_D: tl.constexpr, LEVELS: tl.constexpr):
    """Covariance lost by pooling to level 2, ..., num_levels and to the centroid: one tile [SLAB, BD] each."""
    lost = ()
    so_far = tl.load(totals + place) / tokens
    lost += (so_far,)
    for level in tl.static_range(1, LEVELS):
        so_far += tl.load(totals + level * heads * BLOCK_D * BLOCK_D + place) / tokens
        lost += (so_far,)
    return lost


@triton.jit
def covariance_finish_kernel(
    totals,
    bias,
    counted,
    gain,
    matrix,
    factors,
    heads,
    kv_blocks,
    packed_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LOG_KV_BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
    SLAB: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: a head's matrix from its levels' sums [levels, batch * heads, BD, BD], and the levels' shares,
    times the head's ``gain`` [batch * heads] where there is one."""
    head = tl.program_id(0).to(tl.int64)
    all_heads = tl.num_programs(0)
    centroids = kv_blocks * ((2 << LOG_KV_BLOCK) - (2 << LOG_KV_BLOCK >> LEVELS))
    tokens = tl.zeros([CHUNK], tl.float32)
    for start in range(0, kv_blocks, CHUNK):
        block = start + tl.arange(0, CHUNK)
        is_counted = tl.load(counted + head * kv_blocks + block, mask=block < kv_blocks, other=0) != 0
        tokens += _tokens(bias + head // heads * packed_rows + centroids, block, is_counted)
    tokens = tl.maximum(tl.sum(tokens, axis=0), 1.0)

    slab, channel = tl.arange(0, SLAB), tl.arange(0, BLOCK_D)
    totals += head * BLOCK_D * BLOCK_D
    largest = tl.zeros([SLAB, BLOCK_D], tl.float32)
    for start in range(0, BLOCK_D, SLAB):
        lost = _lost(totals, tokens, (start + slab)[:, None] * BLOCK_D + channel[None, :], all_heads, BLOCK_D, LEVELS)
        largest = tl.maximum(largest, tl.abs(lost[LEVELS - 1]), propagate_nan=tl.PropagateNan.ALL)
    largest = tl.max(tl.max(largest, axis=1), axis=0)
    largest = tl.where(largest < 1e-30, 1.0, largest)

    inner = ()
    for _level in tl.static_range(0, LEVELS):
        inner += (tl.zeros([SLAB, BLOCK_D], tl.float32),)
    for start in range(0, BLOCK_D, SLAB):
        row = start + slab
        lost = _lost(totals, tokens, row[:, None] * BLOCK_D + channel[None, :], all_heads, BLOCK_D, LEVELS)
        whole = lost[LEVELS - 1] / largest
        sums = ()
        for level in tl.static_range(0, LEVELS):
            sums += (inner[level] + lost[level] / largest * whole,)
        inner = sums
        inside = (row < HEAD_DIM)[:, None] & (channel < HEAD_DIM)[None, :]
        place = (head * HEAD_DIM + row[:, None]) * HEAD_DIM + channel[None, :]
        tl.store(matrix + place, whole.to(matrix.dtype.element_ty), mask=inside)

    norm = tl.sum(tl.sum(inner[LEVELS - 1], axis=1), axis=0)
    if gain is not None:
        largest *= tl.load(gain + head)
    factors += head * (LEVELS + 1)
    tl.store(factors, 0.0)
    for level in tl.static_range(1, LEVELS + 1):
        share = tl.sum(tl.sum(inner[level - 1], axis=1), axis=0) / tl.where(norm == 0.0, 1.0, norm)
        tl.store(factors + level, tl.minimum(tl.maximum(share, 0.0), 1.0) * largest)


def build_covariance(pyramid: Pyramid, layout: PyramidLayout, counted: Tensor) -> Covariance:
    """How values vary with keys inside a block, a head at a time, and how much of it each level loses.

    Args:
        pyramid: Its rows of NaN do no harm as long as they are in blocks that do not count.
        layout: Where its levels are.
        counted: uint8 [batch, heads, kv_blocks]: the blocks over whose tokens the mean is taken.
    """
    covariance, launches = covariance_launches(pyramid, layout, counted)
    for launch in launches:
        launch.run()
    return covariance


def covariance_launches(
    pyramid: Pyramid, layout: PyramidLayout, counted: Tensor, gain: Tensor | None = None
) -> tuple[Covariance, list[KernelLaunch]]:
    """:func:`build_covariance` before it has run: its result's buffers, and what fills them."""
    covariance, partial, totals = empty_covariance(pyramid, layout)
    launches = [
        covariance_launch(pyramid, layout, counted, partial),
        covariance_sum_launch(partial, totals, layout),
        covariance_finish_launch(totals, pyramid, layout, counted, covariance, gain),
    ]
    return covariance, launches


def empty_covariance(pyramid: Pyramid, layout: PyramidLayout) -> tuple[Covariance, Tensor, Tensor]:
    """Buffers for the result; for sums of runs, float32 [runs, batch * heads, BD, BD]; and of levels, [levels, ...]."""
    batch, heads, _, head_dim = pyramid.key.shape
    width = padded_head_dim(head_dim)
    matrix = pyramid.key.new_empty(batch, heads, head_dim, head_dim)
    factors = pyramid.bias.new_empty(batch, heads, layout.num_levels + 1)
    matrices = (batch * heads, width, width)
    partial = pyramid.bias.new_empty(_runs(layout, batch * heads), *matrices)
    return Covariance(matrix, factors), partial, pyramid.bias.new_empty(layout.num_levels, *matrices)


def _blocks_each(layout: PyramidLayout, heads: int) -> int:
    """Blocks of a run of level 1: a matter of shapes alone, so that sums are always taken in one order."""
    return max(LEAST_BLOCKS, ceil_div(layout.kv_blocks * heads, PROGRAMS))


def _runs(layout: PyramidLayout, heads: int) -> int:
    """Runs of all levels, see :func:`_place_of_run`."""
    doubled = [max(0, min(level, layout.num_levels - 1) - 1) for level in range(1, layout.num_levels + 1)]
    return sum(ceil_div(layout.kv_blocks, _blocks_each(layout, heads) << times) for times in doubled)


def covariance_launch(pyramid: Pyramid, layout: PyramidLayout, counted: Tensor, partial: Tensor) -> KernelLaunch:
    """The launch that fills ``partial``."""
    batch, heads, _, head_dim = pyramid.key.shape
    tile = covariance_tile(head_dim, pyramid.key.dtype)
    arguments = {
        "packed_key": pyramid.key,
        "packed_value": pyramid.value,
        "bias": pyramid.bias,
        "counted": counted,
        "partial": partial,
        "heads": heads,
        "kv_blocks": layout.kv_blocks,
        "packed_rows": layout.rows,
        "blocks_each": _blocks_each(layout, batch * heads),
        "HEAD_DIM": head_dim,
        "BLOCK_D": partial.shape[-1],
        "TILE_D": tile.channels,
        "TILE_ROWS": tile.rows,
        "LOG_KV_BLOCK": layout.kv_block_size.bit_length() - 1,
        "LEVELS": layout.num_levels,
        "PRECISION": "ieee",
    }
    grid = (partial.shape[0], (partial.shape[-1] // tile.channels) ** 2, batch * heads)
    return KernelLaunch(covariance_kernel, grid, arguments, tile.num_warps)


def covariance_sum_launch(partial: Tensor, totals: Tensor, layout: PyramidLayout) -> KernelLaunch:
    """The launch that fills ``totals``, float32 [levels, batch * heads, BD, BD], from ``partial``."""
    arguments = {
        "partial": partial,
        "totals": totals,
        "kv_blocks": layout.kv_blocks,
        "blocks_each": _blocks_each(layout, totals.shape[1]),
        "numbers": totals[0].numel(),
        "LEVELS": layout.num_levels,
        "CHUNK": SUM_CHUNK,
    }
    grid = (ceil_div(totals[0].numel(), SUM_CHUNK), layout.num_levels)
    return KernelLaunch(covariance_sum_kernel, grid, arguments, num_warps=4)


def covariance_finish_launch(
    totals: Tensor,
    pyramid: Pyramid,
    layout: PyramidLayout,
    counted: Tensor,
    covariance: Covariance,
    gain: Tensor | None = None,
) -> KernelLaunch:
    """The launch that fills ``covariance`` from sums over all blocks, float32 [levels, batch * heads, BD, BD].

    ``gain`` is float32 [batch, heads], contiguous, how much of it each head gets; None = all of it.
    """
    arguments = {
        "totals": totals,
        "bias": pyramid.bias,
        "counted": counted,
        "gain": gain,
        "matrix": covariance.matrix,
        "factors": covariance.factors,
        "heads": covariance.matrix.shape[1],
        "kv_blocks": layout.kv_blocks,
        "packed_rows": layout.rows,
        "HEAD_DIM": covariance.matrix.shape[-1],
        "BLOCK_D": totals.shape[-1],
        "LOG_KV_BLOCK": layout.kv_block_size.bit_length() - 1,
        "LEVELS": layout.num_levels,
        "SLAB": SLAB,
        "CHUNK": 256,
    }
    return KernelLaunch(covariance_finish_kernel, (totals.shape[1],), arguments, num_warps=8)
