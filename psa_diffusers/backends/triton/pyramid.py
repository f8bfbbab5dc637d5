"""Builds the pyramid: every level of keys and values, packed along the sequence, in one pass over both."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...gpu.addressing import strided_pointers
from ...gpu.kernel_launch import KernelLaunch
from .layout import PyramidLayout
from .tiles import pyramid_tile


class Pyramid(NamedTuple):
    """All levels of all heads, as :class:`PyramidLayout` arranges them."""

    key: Tensor  # [batch, heads, rows, head_dim], dtype of the inputs
    value: Tensor  # [batch, heads, rows, head_dim]
    bias: Tensor  # float32 [batch, rows]: log2 of the real tokens that a row stands for, -inf for none
    variance: (
        Tensor | None
    )  # [batch, heads, rows, head_dim]: variance of each channel of a row's keys; None unless asked


@triton.jit
def _load_rows(base, strides, batch, head, token, real, channel, HEAD_DIM: tl.constexpr):
    pointers = strided_pointers(base, strides, batch, head, token, channel)  # [KV_BLOCK, BD]
    return tl.load(pointers, mask=real[:, None] & (channel < HEAD_DIM)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store_rows(base, first_row, rows, channel, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr):
    offsets = (first_row + tl.arange(0, ROWS)).to(tl.int64)[:, None] * HEAD_DIM + channel[None, :]  # [ROWS, BD]
    mask = tl.broadcast_to((channel < HEAD_DIM)[None, :], offsets.shape)
    tl.store(base + offsets, rows.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _mean(total, count):
    return total / tl.maximum(count, 1.0)[:, None]


@triton.jit
def _merge(total, count, squares, GROUPS: tl.constexpr, PARTS: tl.constexpr, HAS_VARIANCE: tl.constexpr):
    """Merges every PARTS rows into one. Squared deviations are merged too: no cancellation, unlike E[x^2] - E[x]^2."""
    BLOCK_D: tl.constexpr = total.shape[1]
    merged_total = tl.sum(tl.reshape(total, (GROUPS, PARTS, BLOCK_D)), axis=1)  # [GROUPS, BD]
    merged_count = tl.sum(tl.reshape(count, (GROUPS, PARTS)), axis=1)  # [GROUPS]
    if HAS_VARIANCE:
        merged_mean = _mean(merged_total, merged_count)
        deviation = tl.reshape(_mean(total, count), (GROUPS, PARTS, BLOCK_D)) - merged_mean[:, None, :]
        between = deviation * deviation * tl.reshape(count, (GROUPS, PARTS))[:, :, None]
        squares = tl.sum(tl.reshape(squares, (GROUPS, PARTS, BLOCK_D)) + between, axis=1)
    else:
        squares = merged_total
    return merged_total, merged_count, squares


@triton.jit
def _store_levels(
    packed,
    variance,
    total,
    count,
    block,
    kv_blocks,
    channel,
    HEAD_DIM: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Writes one block's rows of every level. ``total`` [KV_BLOCK, BD] is zero where ``count`` [KV_BLOCK] is."""
    squares = tl.zeros_like(total)
    section = 0
    for level in tl.static_range(1, LEVELS + 1):
        first_row = section + block * (KV_BLOCK >> (level - 1))
        _store_rows(packed, first_row, _mean(total, count), channel, HEAD_DIM, KV_BLOCK >> (level - 1))
        if variance is not None:
            _store_rows(variance, first_row, _mean(squares, count), channel, HEAD_DIM, KV_BLOCK >> (level - 1))
        section += kv_blocks * (KV_BLOCK >> (level - 1))
        if level < LEVELS:
            total, count, squares = _merge(total, count, squares, KV_BLOCK >> level, 2, variance is not None)
    total, count, squares = _merge(total, count, squares, 1, KV_BLOCK >> (LEVELS - 1), variance is not None)
    _store_rows(packed, section + block, _mean(total, count), channel, HEAD_DIM, 1)
    if variance is not None:
        _store_rows(variance, section + block, _mean(squares, count), channel, HEAD_DIM, 1)
    if block == 0:
        _store_rows(packed, section + kv_blocks, tl.zeros_like(total), channel, HEAD_DIM, 1)
        if variance is not None:
            _store_rows(variance, section + kv_blocks, tl.zeros_like(total), channel, HEAD_DIM, 1)


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
    if block == 0:
        tl.store(bias + section + kv_blocks, float("-inf"))


@triton.jit
def pyramid_kernel(
    key,
    value,
    order,
    key_lengths,
    packed_key,
    packed_value,
    bias,
    variance,
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
):
    """One program: one kv block, one head, BLOCK_D channels; grid (kv_blocks, heads * channel chunks, batch)."""
    block = tl.program_id(0)
    head = (tl.program_id(1) % heads).to(tl.int64)
    chunk = tl.program_id(1) // heads
    batch = tl.program_id(2).to(tl.int64)
    channel = chunk * BLOCK_D + tl.arange(0, BLOCK_D)

    position = block * KV_BLOCK + tl.arange(0, KV_BLOCK)
    real = position < key_length
    token = position.to(tl.int64)
    if order is not None:
        token = tl.load(order + position, mask=real, other=0)
    if key_lengths is not None:
        real = real & (token < tl.load(key_lengths + batch))
    count = real.to(tl.float32)  # [KV_BLOCK]

    base = (batch * heads + head) * packed_rows * HEAD_DIM
    if variance is not None:
        variance += base
    rows = _load_rows(key, key_strides, batch, head, token, real, channel, HEAD_DIM)  # [KV_BLOCK, BD]
    _store_levels(packed_key + base, variance, rows, count, block, kv_blocks, channel, HEAD_DIM, KV_BLOCK, LEVELS)
    rows = _load_rows(value, value_strides, batch, head, token, real, channel, HEAD_DIM)
    _store_levels(packed_value + base, None, rows, count, block, kv_blocks, channel, HEAD_DIM, KV_BLOCK, LEVELS)
    if tl.program_id(1) == 0:
        _store_bias(bias + batch * packed_rows, count, block, kv_blocks, KV_BLOCK, LEVELS)


def build_pyramid(
    key: Tensor,
    value: Tensor,
    layout: PyramidLayout,
    *,
    order: Tensor | None = None,
    key_lengths: Tensor | None = None,
    with_variance: bool = False,
) -> Pyramid:
    """Mean-pools keys and values to every level of the pyramid (arXiv 2512.04025, equation 2), real tokens only.

    Args:
        key, value: [batch, key_length, heads, head_dim], any strides; fp32, fp16 or bf16. Read once.
        layout: Where the levels go.
        order: int64 [key_length], the token at each position of the block order; None = raster.
        key_lengths: int64 [batch]; tokens from that one on are padding. None = no padding.
        with_variance: Also the population variance of each channel of a row's keys, for ``logit_correction``.
    """
    pyramid = empty_pyramid(key, layout, with_variance)
    pyramid_launch(key, value, pyramid, layout, order, key_lengths).run()
    return pyramid


def empty_pyramid(key: Tensor, layout: PyramidLayout, with_variance: bool) -> Pyramid:
    """Buffers for the pyramid of keys [batch, key_length, heads, head_dim], and of values like them."""
    batch, _, heads, head_dim = key.shape
    packed = key.new_empty(3 if with_variance else 2, batch, heads, layout.rows, head_dim)
    bias = key.new_empty(batch, layout.rows, dtype=torch.float32)
    return Pyramid(packed[0], packed[1], bias, packed[2] if with_variance else None)


def pyramid_launch(
    key: Tensor,
    value: Tensor,
    pyramid: Pyramid,
    layout: PyramidLayout,
    order: Tensor | None,
    key_lengths: Tensor | None,
) -> KernelLaunch:
    """The launch that fills ``pyramid``."""
    batch, key_length, heads, head_dim = key.shape
    tile = pyramid_tile(layout.kv_block_size, head_dim, pyramid.variance is not None)
    arguments = {
        "key": key,
        "value": value,
        "order": order,
        "key_lengths": key_lengths,
        "packed_key": pyramid.key,
        "packed_value": pyramid.value,
        "bias": pyramid.bias,
        "variance": pyramid.variance,
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
    }
    grid = (layout.kv_blocks, heads * triton.cdiv(head_dim, tile.block_d), batch)
    return KernelLaunch(pyramid_kernel, grid, arguments, num_warps=tile.num_warps)
