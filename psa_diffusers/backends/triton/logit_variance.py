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
from ...gpu.target import padded_head_dim
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
def _store_correction(place, squares, real, scale, SIZE: tl.constexpr):
    """min(half the logits' variance, ln of the group's tokens), in units of ln 2, at ``place`` of each group."""
    LOG2E: tl.constexpr = 1.4426950408889634
    count = tl.maximum(tl.sum(tl.reshape(real, (squares.shape[0], SIZE)), axis=1), 1.0)
    half_variance = squares * (0.5 * LOG2E * scale * scale) / count
    tl.store(place, tl.minimum(half_variance, tl.log2(count), propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def logit_variance_kernel(
    packed_key,
    bias,
    power,
    correction,
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
    """One program: the correction of all rows of one kv block of one head. Grid (kv_blocks, batch * heads)."""
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    token = block * KV_BLOCK + tl.arange(0, KV_BLOCK)
    packed_key += head * packed_rows * HEAD_DIM
    correction += head * packed_rows
    real = (tl.load(bias + head // heads * packed_rows + token) == 0.0).to(tl.float32)  # one token, or none
    tl.store(correction + token, tl.zeros([KV_BLOCK], tl.float32))

    squares = ()
    for level in tl.static_range(1, LEVELS + 1):
        size: tl.constexpr = KV_BLOCK if level == LEVELS else 1 << level
        squares += (tl.zeros([KV_BLOCK // size], tl.float32),)
    for start in tl.static_range(0, HEAD_DIM, CHUNK):
        channel = start + tl.arange(0, CHUNK)
        inside = channel < HEAD_DIM
        places = packed_key + token.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :]
        mask = tl.broadcast_to(inside[None, :], places.shape)
        keys = tl.load(places, mask=mask, other=0.0).to(tl.float32)  # [KV_BLOCK, CHUNK]
        weights = tl.load(power + head * HEAD_DIM + channel, mask=inside, other=0.0)
        more = ()
        for level in tl.static_range(1, LEVELS + 1):
            size: tl.constexpr = KV_BLOCK if level == LEVELS else 1 << level
            more += (squares[level - 1] + _squares(keys, real, weights, size),)
        squares = more

    section = kv_blocks * KV_BLOCK
    for level in tl.static_range(1, LEVELS + 1):
        size: tl.constexpr = KV_BLOCK if level == LEVELS else 1 << level
        row = section + block * (KV_BLOCK // size) + tl.arange(0, KV_BLOCK // size)
        _store_correction(correction + row, squares[level - 1], real, scale, size)
        section += kv_blocks * (KV_BLOCK // size)
    if block == 0:
        for empty in range(0, EMPTY_ROWS):
            tl.store(correction + section + empty, 0.0)


def logit_variance_launches(
    query: Tensor, pyramid: Pyramid, layout: PyramidLayout, scale: float
) -> tuple[Tensor, list[KernelLaunch]]:
    """The correction, float32 [batch, heads, rows] in units of ln 2, and what fills it from a pyramid that is there.

    Args:
        query: [batch, query_length, heads, head_dim], any strides.
        pyramid, layout: Of the keys.
        scale: Factor of the logits.
    """
    batch, heads, rows, head_dim = pyramid.key.shape
    power = pyramid.bias.new_empty(batch, heads, head_dim)
    correction = pyramid.bias.new_empty(batch, heads, rows)
    return correction, [
        query_power_launch(query, power),
        logit_variance_launch(pyramid, layout, power, correction, scale),
    ]


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
    pyramid: Pyramid, layout: PyramidLayout, power: Tensor, correction: Tensor, scale: float
) -> KernelLaunch:
    """The launch that fills ``correction``."""
    batch, heads, rows, head_dim = pyramid.key.shape
    tile = variance_tile(layout.kv_block_size, head_dim)
    arguments = {
        "packed_key": pyramid.key,
        "bias": pyramid.bias,
        "power": power,
        "correction": correction,
        "scale": scale,
        "heads": heads,
        "kv_blocks": layout.kv_blocks,
        "packed_rows": rows,
        "HEAD_DIM": head_dim,
        "KV_BLOCK": layout.kv_block_size,
        "LEVELS": layout.num_levels,
        "CHUNK": min(tile.block_d, padded_head_dim(head_dim)),
        "EMPTY_ROWS": layout.empty_rows,
    }
    return KernelLaunch(logit_variance_kernel, (layout.kv_blocks, batch * heads), arguments, tile.num_warps)
