"""Builds the pyramid: every level of keys and values, packed along the sequence, in one pass over both.

And, where one program holds all channels of a block, the bias with the logit correction: the keys are there already.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...gpu.addressing import strided_pointers
from ...gpu.kernel_launch import KernelLaunch
from .group_variance import (
    correction_and_bias,
    load_power,
    squares_of_groups,
    squares_of_pairs,
    squares_of_rows_alone,
    store_corrected_bias,
)
from .layout import PyramidLayout
from .tiles import pyramid_tile

MAX_PARTS = 8  # tiles of a block


class Pyramid(NamedTuple):
    """All levels of all heads, as :class:`PyramidLayout` arranges them."""

    packed: Tensor  # [2, batch, heads, rows, head_dim], dtype of the inputs: keys, values
    bias: Tensor  # float32 [batch, rows]: log2 of the real tokens that a row stands for, -inf for none
    # float32 [batch, heads, kv_blocks]: the bias of centroids, NaN for those of NaN or Inf, whose rows hold 0 in their
    # place. So all centroids can be multiplied and some left out by their bias. None unless asked for.
    centroid_bias: Tensor | None = None

    @property
    def key(self) -> Tensor:
        return self.packed[0]

    @property
    def value(self) -> Tensor:
        return self.packed[1]


class CorrectedBias(NamedTuple):
    """The bias with the logit correction, and what it is made from."""

    power: Tensor  # float32 [batch, heads, parts, head_dim]: the parts add up to the query power
    bias: Tensor  # float32 [batch, heads, rows], to be filled
    scale: float  # factor of the logits


# A block's rows are held as PARTS tiles [GROUPS, BD], row r in tile r % PARTS: rows that pool together are in different
# tiles, at the same place, so that pooling is arithmetic between registers, and all loads are under way at once.


@triton.jit
def _load_parts(base, strides, batch, head, tokens, counts, channel, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr):
    rows = ()
    for part in tl.static_range(PARTS):
        pointers = strided_pointers(base, strides, batch, head, tokens[part], channel)  # [GROUPS, BD]
        mask = (counts[part] > 0.0)[:, None] & (channel < HEAD_DIM)[None, :]
        rows += (tl.load(pointers, mask=mask, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def _store_rows(base, row, rows, channel, HEAD_DIM: tl.constexpr):
    offsets = row.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :]  # [ROWS, BD]
    mask = tl.broadcast_to((channel < HEAD_DIM)[None, :], offsets.shape)
    tl.store(base + offsets, rows.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _mean(total, count):
    return total * (1.0 / tl.maximum(count, 1.0))[:, None]


@triton.jit
def level_means(totals, counts):
    means = ()
    for part in tl.static_range(len(totals)):
        means += (_mean(totals[part], counts[part]),)
    return means


@triton.jit
def _store_level(packed, means, first_row, channel, HEAD_DIM: tl.constexpr):
    PARTS: tl.constexpr = len(means)
    GROUPS: tl.constexpr = means[0].shape[0]
    for part in tl.static_range(PARTS):
        row = first_row + tl.arange(0, GROUPS) * PARTS + part
        _store_rows(packed, row, means[part], channel, HEAD_DIM)


@triton.jit
def _pool_parts(totals, counts):
    """Tiles in half as many, each a pair."""
    merged_totals = ()
    merged_counts = ()
    for part in tl.static_range(len(totals) // 2):
        merged_totals += (totals[2 * part] + totals[2 * part + 1],)
        merged_counts += (counts[2 * part] + counts[2 * part + 1],)
    return merged_totals, merged_counts


@triton.jit
def pool_rows(totals, counts, means, squares, power, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """The only tile's rows in groups of SIZE, GROUPS of them."""
    BLOCK_D: tl.constexpr = totals[0].shape[1]
    total = tl.sum(tl.reshape(totals[0], (GROUPS, SIZE, BLOCK_D)), axis=1)  # [GROUPS, BD]
    count = tl.sum(tl.reshape(counts[0], (GROUPS, SIZE)), axis=1)  # [GROUPS]
    square = squares[0]
    if power is not None:
        square = squares_of_groups(means[0], counts[0], square, _mean(total, count), power, GROUPS, SIZE)
    return (total,), (count,), (square,)


@triton.jit
def _store_levels(
    packed,
    totals,
    counts,
    power,
    head_bias,
    scale,
    block,
    kv_blocks,
    channel,
    HEAD_DIM: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
    FINITE: tl.constexpr,
):
    """Writes one block's rows of every level. ``totals`` are its tiles, zero where ``counts`` are.

    With a ``power`` also their bias with the logit correction. Returns how many of the centroid's numbers are not
    finite (with FINITE zeros are written for them), and the centroid's correction, 0 without.
    """
    squares = squares_of_rows_alone(totals)
    section = 0
    for level in tl.static_range(1, LEVELS + 1):
        first_row = section + block * (KV_BLOCK >> (level - 1))
        means = totals if level == 1 else level_means(totals, counts)
        _store_level(packed, means, first_row, channel, HEAD_DIM)
        if power is not None:
            store_corrected_bias(head_bias + first_row, squares, counts, scale)
        section += kv_blocks * (KV_BLOCK >> (level - 1))
        if level < LEVELS:
            totals, counts, squares = next_level(totals, counts, means, squares, power, KV_BLOCK >> level)
    means = level_means(totals, counts)
    totals, count, squares = pool_rows(totals, counts, means, squares, power, 1, KV_BLOCK >> (LEVELS - 1))
    centroid = _mean(totals[0], count[0])  # [1, BD]
    is_finite = tl.abs(centroid) < float("inf")
    if FINITE:
        centroid = tl.where(is_finite, centroid, 0.0)
    row = section + block + tl.arange(0, 1)
    _store_rows(packed, row, centroid, channel, HEAD_DIM)
    correction = 0.0
    if power is not None:
        store_corrected_bias(head_bias + section + block, squares, count, scale)
        correction = tl.sum(correction_and_bias(squares[0], count[0], scale)[0], axis=0)
    return tl.sum(tl.sum((~is_finite).to(tl.int32), axis=1), axis=0), correction


@triton.jit
def next_level(totals, counts, means, squares, power, GROUPS: tl.constexpr):
    if len(totals) > 1:
        if power is not None:
            squares = squares_of_pairs(means, counts, squares, power)
        totals, counts = _pool_parts(totals, counts)
    else:
        totals, counts, squares = pool_rows(totals, counts, means, squares, power, GROUPS, 2)
    return totals, counts, squares


@triton.jit
def _bias(count):
    return tl.where(count > 0, tl.log2(tl.maximum(count, 1.0)), float("-inf"))


@triton.jit
def _store_bias(bias, count, block, kv_blocks, KV_BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    section = 0
    for level in tl.static_range(1, LEVELS + 1):
        row = section + block * (KV_BLOCK >> (level - 1)) + tl.arange(0, KV_BLOCK >> (level - 1))
        tl.store(bias + row, _bias(count))
        section += kv_blocks * (KV_BLOCK >> (level - 1))
        if level < LEVELS:
            count = tl.sum(tl.reshape(count, (KV_BLOCK >> level, 2)), axis=1)
    tl.store(bias + section + block, _bias(tl.sum(count, axis=0)))


@triton.jit
def _store_empty_rows(
    packed_key,
    packed_value,
    bias,
    head_bias,
    empty_row,
    channel,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EMPTY_ROWS: tl.constexpr,
):
    for empty in range(0, EMPTY_ROWS):
        row = empty_row + empty + tl.arange(0, 1)
        zeros = tl.zeros([1, BLOCK_D], tl.float32)
        _store_rows(packed_key, row, zeros, channel, HEAD_DIM)
        _store_rows(packed_value, row, zeros, channel, HEAD_DIM)
        tl.store(bias + empty_row + empty, float("-inf"))
        if head_bias is not None:
            tl.store(head_bias + empty_row + empty, float("-inf"))


@triton.jit
def pyramid_kernel(
    key,
    value,
    order,
    key_lengths,
    packed_key,
    packed_value,
    bias,
    centroid_bias,
    power,
    head_bias,
    counter,
    scale,
    key_strides,
    value_strides,
    heads,
    key_length,
    kv_blocks,
    packed_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
    PARTS: tl.constexpr,
    POWER_PARTS: tl.constexpr,
    EMPTY_ROWS: tl.constexpr,
):
    """One program: one kv block, one head, BLOCK_D channels; grid (heads * channel chunks, kv_blocks, batch).

    Heads first: what lies side by side in memory is read at a time. ``counter``, if there is one, is set to 0 for the
    kernel that comes next: it would otherwise take a launch of its own. With a ``power`` one program holds all
    channels, see pools_whole_blocks, and also fills ``head_bias``.
    """
    FINITE: tl.constexpr = centroid_bias is not None
    block = tl.program_id(1)
    head = (tl.program_id(0) % heads).to(tl.int64)
    chunk = tl.program_id(0) // heads
    batch = tl.program_id(2).to(tl.int64)
    channel = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    length = key_length
    if key_lengths is not None:
        length = tl.load(key_lengths + batch)

    tokens = ()
    counts = ()
    for part in tl.static_range(PARTS):
        position = block * KV_BLOCK + tl.arange(0, KV_BLOCK // PARTS) * PARTS + part
        token, count = _token_at(position, order, key_length, length)
        tokens += (token,)
        counts += (count,)

    base = (batch * heads + head) * packed_rows * HEAD_DIM
    packed_key += base
    packed_value += base
    keys = _load_parts(key, key_strides, batch, head, tokens, counts, channel, HEAD_DIM, PARTS)
    weights = None
    if power is not None:
        weights = load_power(power, batch * heads + head, channel, HEAD_DIM, POWER_PARTS)
        head_bias += (batch * heads + head) * packed_rows
    bad, correction = _store_levels(
        packed_key,
        keys,
        counts,
        weights,
        head_bias,
        scale,
        block,
        kv_blocks,
        channel,
        HEAD_DIM,
        KV_BLOCK,
        LEVELS,
        FINITE,
    )
    values = _load_parts(value, value_strides, batch, head, tokens, counts, channel, HEAD_DIM, PARTS)
    bad_values, _none = _store_levels(
        packed_value,
        values,
        counts,
        None,
        None,
        scale,
        block,
        kv_blocks,
        channel,
        HEAD_DIM,
        KV_BLOCK,
        LEVELS,
        FINITE,
    )
    bad += bad_values
    bias += batch * packed_rows
    if FINITE or tl.program_id(0) == 0:
        _, real = _token_at(block * KV_BLOCK + tl.arange(0, KV_BLOCK), order, key_length, length)
        if FINITE:  # one chunk of channels: see pools_whole_blocks
            row_bias = tl.where(bad > 0, float("nan"), _bias(tl.sum(real, axis=0)) + correction)
            tl.store(centroid_bias + (batch * heads + head) * kv_blocks + block, row_bias)
        if tl.program_id(0) == 0:
            _store_bias(bias, real, block, kv_blocks, KV_BLOCK, LEVELS)
    if counter is not None:
        tl.store(counter, 0, mask=(tl.program_id(0) == 0) & (block == 0) & (batch == 0))
    if block == 0:
        _store_empty_rows(
            packed_key,
            packed_value,
            bias,
            head_bias,
            packed_rows - EMPTY_ROWS,
            channel,
            HEAD_DIM,
            BLOCK_D,
            EMPTY_ROWS,
        )


@triton.jit
def _token_at(position, order, key_length, length):
    """The tokens at positions, int64, and 1.0 where there is a real one: neither beyond the end nor padding."""
    inside = position < key_length
    token = position.to(tl.int64)
    if order is not None:
        token = tl.load(order + position, mask=inside, other=0)
    return token, (inside & (token < length)).to(tl.float32)


def build_pyramid(
    key: Tensor,
    value: Tensor,
    layout: PyramidLayout,
    *,
    order: Tensor | None = None,
    key_lengths: Tensor | None = None,
    with_centroid_bias: bool = False,
) -> Pyramid:
    """Mean-pools keys and values to every level of the pyramid (arXiv 2512.04025, equation 2), real tokens only.

    Args:
        key, value: [batch, key_length, heads, head_dim], any strides; fp32, fp16 or bf16. Read once.
        layout: Where the levels go.
        order: int64 [key_length], the token at each position of the block order; None = raster.
        key_lengths: int64 [batch]; tokens from that one on are padding. None = no padding.
        with_centroid_bias: Also the centroids' own bias, and only finite numbers in their rows. Where one program of
            the kernel holds a whole block, see :func:`pools_whole_blocks`.
    """
    pyramid = empty_pyramid(key, layout, with_centroid_bias)
    pyramid_launch(key, value, pyramid, layout, order, key_lengths).run()
    return pyramid


def pools_whole_blocks(kv_block_size: int, head_dim: int) -> bool:
    """Whether one program of the pyramid kernel holds all channels of a block."""
    return pyramid_tile(kv_block_size, head_dim).block_d >= head_dim


def empty_pyramid(key: Tensor, layout: PyramidLayout, with_centroid_bias: bool = False) -> Pyramid:
    """Buffers for the pyramid of keys [batch, key_length, heads, head_dim], and of values like them."""
    batch, _, heads, head_dim = key.shape
    packed = key.new_empty(2, batch, heads, layout.rows, head_dim)
    bias = key.new_empty(batch, layout.rows, dtype=torch.float32)
    centroid_bias = bias.new_empty(batch, heads, layout.kv_blocks) if with_centroid_bias else None
    return Pyramid(packed, bias, centroid_bias)


def pyramid_launch(
    key: Tensor,
    value: Tensor,
    pyramid: Pyramid,
    layout: PyramidLayout,
    order: Tensor | None,
    key_lengths: Tensor | None,
    counter: Tensor | None = None,
    corrected: CorrectedBias | None = None,
) -> KernelLaunch:
    """The launch that fills ``pyramid``, and sets ``counter`` (int32 [1]) to 0.

    With ``corrected``, where :func:`pools_whole_blocks`, also its bias; the pyramid's centroid bias, if there is one,
    gets the correction too.
    """
    batch, key_length, heads, head_dim = key.shape
    tile = pyramid_tile(layout.kv_block_size, head_dim)
    arguments = {
        "key": key,
        "value": value,
        "order": order,
        "key_lengths": key_lengths,
        "packed_key": pyramid.key,
        "packed_value": pyramid.value,
        "bias": pyramid.bias,
        "centroid_bias": pyramid.centroid_bias,
        "power": corrected and corrected.power,
        "head_bias": corrected and corrected.bias,
        "counter": counter,
        "scale": corrected.scale if corrected else 1.0,
        "key_strides": key.stride(),
        "value_strides": value.stride(),
        "heads": heads,
        "key_length": key_length,
        "kv_blocks": layout.kv_blocks,
        "packed_rows": layout.rows,
        "HEAD_DIM": head_dim,
        "BLOCK_D": tile.block_d,
        "KV_BLOCK": layout.kv_block_size,
        "LEVELS": layout.num_levels,
        "PARTS": min(MAX_PARTS, 2 ** (layout.num_levels - 1)),
        "POWER_PARTS": corrected.power.shape[2] if corrected else 1,
        "EMPTY_ROWS": layout.empty_rows,
    }
    grid = (heads * triton.cdiv(head_dim, tile.block_d), layout.kv_blocks, batch)
    return KernelLaunch(pyramid_kernel, grid, arguments, num_warps=tile.num_warps)
