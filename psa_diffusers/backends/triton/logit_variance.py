"""The logit correction on a GPU: what the variance of a pooled group's logits adds to its bias, one number a row.

:mod:`~psa_diffusers.backends.logit_variance` defines it. The pyramid kernel computes it on the way; where a program of
that holds a part of the channels alone, a kernel of its own does, which reads the keys once more.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...gpu.addressing import strided_pointers
from ...gpu.kernel_launch import KernelLaunch
from ...gpu.sizes import ceil_div
from ...gpu.target import padded_head_dim
from ..logit_variance import QUERY_STRIDE, query_lengths
from .group_variance import correction_and_bias, load_power, squares_of_rows_alone, store_corrected_bias
from .layout import PyramidLayout
from .pyramid import (
    MAX_PARTS,
    CorrectedBias,
    Pyramid,
    level_means,
    next_level,
    pool_rows,
    pools_whole_blocks,
    pyramid_launch,
)
from .tiles import POWER_TILE, variance_warps

POWER_PARTS = 8  # of each head's queries: programs enough to fill a GPU


@triton.jit
def query_power_kernel(
    query,
    lengths,
    power,
    query_strides,
    heads,
    query_length,
    HEAD_DIM: tl.constexpr,
    QUERY_STRIDE: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: what every PARTS-th tile of sampled queries has of the power of CHUNK channels of one head.

    The parts [batch * heads, PARTS, HEAD_DIM] add up to the power. Grid (batch * heads, chunks of channels, PARTS).
    """
    batch = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    channel = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    length = query_length
    if lengths is not None:
        length = tl.minimum(length, tl.load(lengths + batch)).to(tl.int32)
    samples = (length + QUERY_STRIDE - 1) // QUERY_STRIDE
    total = tl.zeros([ROWS, CHUNK], tl.float32)
    for start in range(tl.program_id(2) * ROWS, samples, PARTS * ROWS):
        sample = start + tl.arange(0, ROWS)
        token = sample.to(tl.int64) * QUERY_STRIDE
        mask = (sample < samples)[:, None] & (channel < HEAD_DIM)[None, :]
        rows = tl.load(strided_pointers(query, query_strides, batch, head, token, channel), mask=mask, other=0.0)
        rows = rows.to(tl.float32)
        total += rows * rows
    place = (tl.program_id(0) * PARTS + tl.program_id(2)) * HEAD_DIM + channel
    tl.store(power + place, tl.sum(total, axis=0) / tl.maximum(samples, 1), mask=channel < HEAD_DIM)


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
    BLOCK_D: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
    PARTS: tl.constexpr,
    POWER_PARTS: tl.constexpr,
    EMPTY_ROWS: tl.constexpr,
):
    """One program: the bias of all rows of one kv block of one head. Grid (kv_blocks, batch * heads).

    To ``centroid_bias``, if there is one, the centroid's correction is added.
    """
    block = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    packed_key += head * packed_rows * HEAD_DIM
    bias += head // heads * packed_rows
    head_bias += head * packed_rows
    weights = load_power(power, head, channel, HEAD_DIM, POWER_PARTS)  # [BD]

    keys = ()
    counts = ()
    for part in tl.static_range(PARTS):
        token = block * KV_BLOCK + tl.arange(0, KV_BLOCK // PARTS) * PARTS + part
        places = packed_key + token.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :]
        mask = tl.broadcast_to((channel < HEAD_DIM)[None, :], places.shape)
        keys += (tl.load(places, mask=mask, other=0.0).to(tl.float32),)
        counts += ((tl.load(bias + token) == 0.0).to(tl.float32),)  # one token, or none

    totals, squares = keys, squares_of_rows_alone(keys)
    store_corrected_bias(head_bias + block * KV_BLOCK, squares, counts, scale)
    section = kv_blocks * KV_BLOCK
    for level in tl.static_range(1, LEVELS):
        totals, counts, squares = next_level(
            totals, counts, level_means(totals, counts), squares, weights, KV_BLOCK >> level
        )
        store_corrected_bias(head_bias + section + block * (KV_BLOCK >> level), squares, counts, scale)
        section += kv_blocks * (KV_BLOCK >> level)
    _, counts, squares = pool_rows(
        totals, counts, level_means(totals, counts), squares, weights, 1, KV_BLOCK >> (LEVELS - 1)
    )
    store_corrected_bias(head_bias + section + block, squares, counts, scale)
    if centroid_bias is not None:
        correction, _ = correction_and_bias(squares[0], counts[0], scale)
        place = centroid_bias + head * kv_blocks + block + tl.arange(0, 1)
        tl.store(place, tl.load(place) + correction)
    if block == 0:
        for empty in range(0, EMPTY_ROWS):
            tl.store(head_bias + section + kv_blocks + empty, float("-inf"))


def pyramid_launches(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pyramid: Pyramid,
    layout: PyramidLayout,
    order: Tensor | None,
    key_lengths: Tensor | None,
    *,
    scale: float,
    counter: Tensor | None = None,
) -> tuple[Tensor, list[KernelLaunch]]:
    """What fills a pyramid, and the bias with the logit correction.

    Args:
        query: [batch, query_length, heads, head_dim], any strides.
        scale: Factor of the logits.
        key, value, pyramid, layout, order, key_lengths, counter: Of :func:`~.pyramid.pyramid_launch`.

    Returns:
        float32 [batch, heads, rows], in the place of the pyramid's own bias, which is [batch, rows]; and the launches.
        To the pyramid's centroid bias, if it has one, the correction is added.
    """
    corrected = empty_corrected_bias(pyramid, scale)
    launches = [query_power_launch(query, query_lengths(query, key, key_lengths), corrected.power)]
    inputs = (key, value, pyramid, layout, order, key_lengths, counter)
    if pools_whole_blocks(layout.kv_block_size, key.shape[3]):
        launches.append(pyramid_launch(*inputs, corrected))
    else:
        launches += [pyramid_launch(*inputs), logit_variance_launch(pyramid, layout, corrected)]
    return corrected.bias, launches


def empty_corrected_bias(pyramid: Pyramid, scale: float) -> CorrectedBias:
    """Buffers for the bias of a pyramid's rows."""
    batch, heads, rows, head_dim = pyramid.key.shape
    power = pyramid.bias.new_empty(batch, heads, POWER_PARTS, head_dim)
    return CorrectedBias(power, pyramid.bias.new_empty(batch, heads, rows), scale)


def query_power_launch(query: Tensor, lengths: Tensor | None, power: Tensor) -> KernelLaunch:
    """The launch that fills ``power``, float32 [batch, heads, parts, head_dim]."""
    batch, query_length, heads, head_dim = query.shape
    rows, chunk, num_warps = POWER_TILE
    arguments = {
        "query": query,
        "lengths": lengths,
        "power": power,
        "query_strides": query.stride(),
        "heads": heads,
        "query_length": query_length,
        "HEAD_DIM": head_dim,
        "QUERY_STRIDE": QUERY_STRIDE,
        "PARTS": power.shape[2],
        "ROWS": rows,
        "CHUNK": chunk,
    }
    grid = (batch * heads, ceil_div(head_dim, chunk), power.shape[2])
    return KernelLaunch(query_power_kernel, grid, arguments, num_warps)


def logit_variance_launch(pyramid: Pyramid, layout: PyramidLayout, corrected: CorrectedBias) -> KernelLaunch:
    """The launch that fills ``corrected.bias`` from a pyramid that is there."""
    batch, heads, rows, head_dim = pyramid.key.shape
    arguments = {
        "packed_key": pyramid.key,
        "bias": pyramid.bias,
        "power": corrected.power,
        "head_bias": corrected.bias,
        "centroid_bias": pyramid.centroid_bias,
        "scale": corrected.scale,
        "heads": heads,
        "kv_blocks": layout.kv_blocks,
        "packed_rows": rows,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "KV_BLOCK": layout.kv_block_size,
        "LEVELS": layout.num_levels,
        "PARTS": min(MAX_PARTS, 2 ** (layout.num_levels - 1)),
        "POWER_PARTS": corrected.power.shape[2],
        "EMPTY_ROWS": layout.empty_rows,
    }
    num_warps = variance_warps(layout.kv_block_size, head_dim)
    return KernelLaunch(logit_variance_kernel, (layout.kv_blocks, batch * heads), arguments, num_warps)
