"""The value correction's matrices: how values vary with keys inside the blocks that pooling averages over."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...gpu.kernel_launch import KernelLaunch
from ...gpu.target import padded_head_dim
from ...planning.plan import Plan
from .layout import PyramidLayout
from .pyramid import Pyramid
from .tiles import covariance_tile

SLAB = 16  # rows of a matrix that the finishing kernel holds at a time
PROGRAMS = 256  # a level: enough to fill a GPU, few enough that their partial sums take little time and memory


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

    Grid (runs of blocks, tiles of the matrix * levels, batch * heads). Half differences and weights of at most 1 keep
    products in the range of float16; what that divides by is put back in float32.
    """
    DTYPE: tl.constexpr = packed_key.dtype.element_ty
    TILES: tl.constexpr = BLOCK_D // TILE_D
    run = tl.program_id(0)
    level = tl.program_id(1) // (TILES * TILES) + 1
    tile = tl.program_id(1) % (TILES * TILES)
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
    matrix = ((run * LEVELS + level - 1).to(tl.int64) * tl.num_programs(2) + head) * BLOCK_D * BLOCK_D
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
    """One program: a head's matrix from its levels' sums [levels, batch * heads, BD, BD], and the levels' shares."""
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
    factors += head * (LEVELS + 1)
    tl.store(factors, 0.0)
    for level in tl.static_range(1, LEVELS + 1):
        share = tl.sum(tl.sum(inner[level - 1], axis=1), axis=0) / tl.where(norm == 0.0, 1.0, norm)
        tl.store(factors + level, tl.minimum(tl.maximum(share, 0.0), 1.0) * largest)


def blocks_read_by_all(plan: Plan, device: torch.device) -> Tensor:
    """uint8 [batch, heads, kv_blocks]: 1 where every query block reads the block. Stays in the plan's cache."""
    found = plan.cache.get(("triton", device, "read by all"))
    if found is None:
        found = (plan.level_mask.to(device).amin(2) > 0).to(torch.uint8)
        plan.cache["triton", device, "read by all"] = found
    return found


def build_covariance(pyramid: Pyramid, layout: PyramidLayout, counted: Tensor) -> Covariance:
    """How values vary with keys inside a block, a head at a time, and how much of it each level loses.

    Args:
        pyramid: Its rows of NaN do no harm as long as they are in blocks that do not count.
        layout: Where its levels are.
        counted: uint8 [batch, heads, kv_blocks]: the blocks over whose tokens the mean is taken.
    """
    covariance, partial = empty_covariance(pyramid, layout)
    covariance_launch(pyramid, layout, counted, partial).run()
    covariance_finish_launch(partial.sum(0), pyramid, layout, counted, covariance).run()
    return covariance


def empty_covariance(pyramid: Pyramid, layout: PyramidLayout) -> tuple[Covariance, Tensor]:
    """Buffers for the result, and for partial sums: float32 [runs, levels, batch * heads, BD, BD]."""
    batch, heads, _, head_dim = pyramid.key.shape
    width = padded_head_dim(head_dim)
    matrix = pyramid.key.new_empty(batch, heads, head_dim, head_dim)
    factors = pyramid.bias.new_empty(batch, heads, layout.num_levels + 1)
    runs = triton.cdiv(layout.kv_blocks, _blocks_each(layout, batch * heads))
    partial = pyramid.bias.new_empty(runs, layout.num_levels, batch * heads, width, width)
    return Covariance(matrix, factors), partial


def _blocks_each(layout: PyramidLayout, heads: int) -> int:
    """Blocks that one program adds up: a matter of shapes alone, so that sums are always taken in one order."""
    return max(8, triton.cdiv(layout.kv_blocks * heads, PROGRAMS))


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
    grid = (partial.shape[0], layout.num_levels * (partial.shape[-1] // tile.channels) ** 2, batch * heads)
    return KernelLaunch(covariance_kernel, grid, arguments, tile.num_warps)


def covariance_finish_launch(
    totals: Tensor, pyramid: Pyramid, layout: PyramidLayout, counted: Tensor, covariance: Covariance
) -> KernelLaunch:
    """The launch that fills ``covariance`` from sums over all blocks, float32 [levels, batch * heads, BD, BD]."""
    arguments = {
        "totals": totals,
        "bias": pyramid.bias,
        "counted": counted,
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
