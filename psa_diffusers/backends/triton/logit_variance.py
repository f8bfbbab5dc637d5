"""The logit correction on a GPU: what the variance of a pooled group's logits adds to its bias, one number a row.

:mod:`~psa_diffusers.backends.logit_variance` defines it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...gpu.addressing import strided_pointers
from ...gpu.kernel_launch import KernelLaunch
from ...gpu.sizes import ceil_div
from ..logit_variance import QUERY_STRIDE
from .layout import PyramidLayout
from .pyramid import Pyramid
from .tiles import POWER_TILE, variance_tile


@triton.jit
def query_power_kernel(
    query,
    power,
    query_strides,
    heads,
    query_length,
    HEAD_DIM: tl.constexpr,
    QUERY_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: CHUNK channels of one head's power, [batch * heads, HEAD_DIM]. Grid (batch * heads, chunks)."""
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    channel = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    samples = (query_length + QUERY_STRIDE - 1) // QUERY_STRIDE
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    for start in range(0, samples, ROWS):
        sample = start + tl.arange(0, ROWS)
        token = sample.to(tl.int64) * QUERY_STRIDE
        mask = (sample < samples)[:, None] & (channel < HEAD_DIM)[None, :]
        rows = tl.load(strided_pointers(query, query_strides, batch, head, token, channel), mask=mask, other=0.0)
        rows = rows.to(tl.float32)
        total += rows * rows
    mean = tl.sum(total, axis=0) / samples
    tl.store(power + tl.program_id(0) * HEAD_DIM + channel, mean, mask=channel < HEAD_DIM)


@triton.jit
def _squares(keys, real, power, SIZE: tl.constexpr):
    """[groups]: squared distances of keys [rows, channels] from the means of their groups of SIZE, weighed by power
    [channels], summed over the group's real keys. ``real`` [rows] is 1 or 0; other keys are 0."""
    GROUPS: tl.constexpr = keys.shape[0] // SIZE
    CHANNELS: tl.constexpr = keys.shape[1]
    real = tl.reshape(real, (GROUPS, SIZE))
    keys = tl.reshape(keys, (GROUPS, SIZE, CHANNELS))
    mean = tl.sum(keys, axis=1) / tl.maximum(tl.sum(real, axis=1), 1.0)[:, None]
    gap = keys - mean[:, None, :]
    distance = tl.sum(gap * gap * power[None, None, :], axis=2)  # [GROUPS, SIZE]
    return tl.sum(distance * real, axis=1)


@triton.jit
def _add_squares(squares, keys, real, power, KV_BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    """The squares of every level, and those of these channels."""
    more = ()
    for level in tl.static_range(1, LEVELS):
        more += (squares[level - 1] + _squares(keys, real, power, 1 << level),)
    return more + (squares[LEVELS - 1] + _squares(keys, real, power, KV_BLOCK),)


@triton.jit
def _correction_and_bias(squares, real, scale, SIZE: tl.constexpr):
    """min(half the logits' variance, ln of the group's tokens) of each group, and the two's sum, in units of ln 2."""
    LOG2E: tl.constexpr = 1.4426950408889634
    count = tl.sum(tl.reshape(real, (squares.shape[0], SIZE)), axis=1)
    log_count = tl.log2(tl.maximum(count, 1.0))
    half_variance = squares * (0.5 * LOG2E * scale * scale) / tl.maximum(count, 1.0)
    correction = tl.minimum(half_variance, log_count, propagate_nan=tl.PropagateNan.ALL)
    return correction, tl.where(count > 0.0, log_count + correction, float("-inf"))


@triton.jit
def logit_variance_kernel(
    packed_key,
    bias,
    power,
    head_bias,
    centroid_bias,
    scale,
    heads,
    kv_blocks,
    packed_rows,
    HEAD_DIM: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
    CHUNK: tl.constexpr,
    EMPTY_ROWS: tl.constexpr,
):
    """One program: the bias of all rows of one kv block of one head. Grid (kv_blocks, batch * heads).

    To ``centroid_bias``, if there is one, the centroid's correction is added.
    """
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    token = block * KV_BLOCK + tl.arange(0, KV_BLOCK)
    packed_key += head * packed_rows * HEAD_DIM
    head_bias += head * packed_rows
    token_bias = tl.load(bias + head // heads * packed_rows + token)
    real = (token_bias == 0.0).to(tl.float32)  # one token, or none
    tl.store(head_bias + token, token_bias)

    squares = ()  # of levels 2, 3, ... and the centroid
    for level in tl.static_range(1, LEVELS):
        squares += (tl.zeros([KV_BLOCK >> level], tl.float32),)
    squares += (tl.zeros([1], tl.float32),)
    for start in tl.static_range(0, HEAD_DIM, CHUNK):
        channel = start + tl.arange(0, CHUNK)
        inside = channel < HEAD_DIM
        places = packed_key + token.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :]
        mask = tl.broadcast_to(inside[None, :], places.shape)
        keys = tl.load(places, mask=mask, other=0.0).to(tl.float32)  # [KV_BLOCK, CHUNK]
        weights = tl.load(power + head * HEAD_DIM + channel, mask=inside, other=0.0)
        squares = _add_squares(squares, keys, real, weights, KV_BLOCK, LEVELS)

    section = kv_blocks * KV_BLOCK
    for level in tl.static_range(1, LEVELS):
        row = section + block * (KV_BLOCK >> level) + tl.arange(0, KV_BLOCK >> level)
        _, row_bias = _correction_and_bias(squares[level - 1], real, scale, 1 << level)
        tl.store(head_bias + row, row_bias)
        section += kv_blocks * (KV_BLOCK >> level)
    correction, row_bias = _correction_and_bias(squares[LEVELS - 1], real, scale, KV_BLOCK)
    tl.store(head_bias + section + block + tl.arange(0, 1), row_bias)
    if centroid_bias is not None:
        place = centroid_bias + head * kv_blocks + block + tl.arange(0, 1)
        tl.store(place, tl.load(place) + correction)
    if block == 0:
        for empty in range(0, EMPTY_ROWS):
            tl.store(head_bias + section + kv_blocks + empty, float("-inf"))


def logit_variance_launches(
    query: Tensor, pyramid: Pyramid, layout: PyramidLayout, scale: float
) -> tuple[Tensor, list[KernelLaunch]]:
    """The bias with the correction, and what fills it from a pyramid that is there.

    Args:
        query: [batch, query_length, heads, head_dim], any strides.
        pyramid, layout: Of the keys. To the pyramid's centroid bias, if it has one, the correction is added.
        scale: Factor of the logits.

    Returns:
        float32 [batch, heads, rows], in the place of the pyramid's own bias, which is [batch, rows].
    """
    batch, heads, rows, head_dim = pyramid.key.shape
    power = pyramid.bias.new_empty(batch, heads, head_dim)
    head_bias = pyramid.bias.new_empty(batch, heads, rows)
    launches = [query_power_launch(query, power), logit_variance_launch(pyramid, layout, power, head_bias, scale)]
    return head_bias, launches


def query_power_launch(query: Tensor, power: Tensor) -> KernelLaunch:
    """The launch that fills ``power``, float32 [batch, heads, head_dim]."""
    batch, query_length, heads, head_dim = query.shape
    rows, chunk, num_warps = POWER_TILE
    arguments = {
        "query": query,
        "power": power,
        "query_strides": query.stride(),
        "heads": heads,
        "query_length": query_length,
        "HEAD_DIM": head_dim,
        "QUERY_STRIDE": QUERY_STRIDE,
        "ROWS": rows,
        "CHUNK": chunk,
    }
    return KernelLaunch(query_power_kernel, (batch * heads, ceil_div(head_dim, chunk)), arguments, num_warps)


def logit_variance_launch(
    pyramid: Pyramid, layout: PyramidLayout, power: Tensor, head_bias: Tensor, scale: float
) -> KernelLaunch:
    """The launch that fills ``head_bias``."""
    batch, heads, rows, head_dim = pyramid.key.shape
    tile = variance_tile(layout.kv_block_size, head_dim)
    arguments = {
        "packed_key": pyramid.key,
        "bias": pyramid.bias,
        "power": power,
        "head_bias": head_bias,
        "centroid_bias": pyramid.centroid_bias,
        "scale": scale,
        "heads": heads,
        "kv_blocks": layout.kv_blocks,
        "packed_rows": rows,
        "HEAD_DIM": head_dim,
        "KV_BLOCK": layout.kv_block_size,
        "LEVELS": layout.num_levels,
        "CHUNK": tile.block_d,
        "EMPTY_ROWS": layout.empty_rows,
    }
    return KernelLaunch(logit_variance_kernel, (layout.kv_blocks, batch * heads), arguments, tile.num_warps)
