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
from .pyramid import MAX_PARTS, Pyramid
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


# A block's keys are held as tiles [GROUPS, BD], row r in tile r % PARTS, as the pyramid kernel does. ``squares`` are of
# each group of keys the squared distances from its mean, weighed by the power and summed over channels and keys.


@triton.jit
def _merge_parts(means, counts, squares, power):
    """Tiles in half as many, each a pair. Squares are merged too: no cancellation, unlike E[x^2] - E[x]^2."""
    merged_means = ()
    merged_counts = ()
    merged_squares = ()
    for part in tl.static_range(len(means) // 2):
        first, second = counts[2 * part], counts[2 * part + 1]
        count = first + second
        share = first / tl.maximum(count, 1.0)
        gap = means[2 * part] - means[2 * part + 1]
        between = tl.sum(gap * gap * power[None, :], axis=1)
        merged_means += (means[2 * part + 1] + share[:, None] * gap,)
        merged_counts += (count,)
        merged_squares += (squares[2 * part] + squares[2 * part + 1] + between * (share * second),)
    return merged_means, merged_counts, merged_squares


@triton.jit
def _merge_rows(means, counts, squares, power, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """The only tile's rows in groups of SIZE, GROUPS of them."""
    BLOCK_D: tl.constexpr = means[0].shape[1]
    rows = tl.reshape(means[0], (GROUPS, SIZE, BLOCK_D))
    tokens = tl.reshape(counts[0], (GROUPS, SIZE))
    count = tl.sum(tokens, axis=1)
    mean = tl.sum(rows * tokens[:, :, None], axis=1) / tl.maximum(count, 1.0)[:, None]
    gap = rows - mean[:, None, :]
    between = tl.sum(gap * gap * power[None, None, :], axis=2) * tokens
    square = tl.sum(tl.reshape(squares[0], (GROUPS, SIZE)) + between, axis=1)
    return (mean,), (count,), (square,)


@triton.jit
def _correction_and_bias(square, count, scale):
    """min(half the logits' variance, ln of the group's tokens) of each group, and the two's sum, in units of ln 2."""
    LOG2E: tl.constexpr = 1.4426950408889634
    log_count = tl.log2(tl.maximum(count, 1.0))
    half_variance = square * (0.5 * LOG2E * scale * scale) / tl.maximum(count, 1.0)
    correction = tl.minimum(half_variance, log_count, propagate_nan=tl.PropagateNan.ALL)
    return correction, tl.where(count > 0.0, log_count + correction, float("-inf"))


@triton.jit
def _store_bias(place, squares, counts, scale):
    """The bias of a level's rows of one block, the first of which is at ``place``."""
    for part in tl.static_range(len(squares)):
        row = tl.arange(0, squares[part].shape[0]) * len(squares) + part
        _, bias = _correction_and_bias(squares[part], counts[part], scale)
        tl.store(place + row, bias)


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
    part_of_power = (head * POWER_PARTS + tl.arange(0, POWER_PARTS))[:, None] * HEAD_DIM + channel[None, :]
    is_channel = tl.broadcast_to((channel < HEAD_DIM)[None, :], part_of_power.shape)
    weights = tl.sum(tl.load(power + part_of_power, mask=is_channel, other=0.0), axis=0)  # [BD]

    means = ()
    counts = ()
    squares = ()
    for part in tl.static_range(PARTS):
        token = block * KV_BLOCK + tl.arange(0, KV_BLOCK // PARTS) * PARTS + part
        token_bias = tl.load(bias + token)
        tl.store(head_bias + token, token_bias)
        places = packed_key + token.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :]
        mask = tl.broadcast_to((channel < HEAD_DIM)[None, :], places.shape)
        means += (tl.load(places, mask=mask, other=0.0).to(tl.float32),)
        counts += ((token_bias == 0.0).to(tl.float32),)  # one token, or none
        squares += (tl.zeros([KV_BLOCK // PARTS], tl.float32),)

    section = kv_blocks * KV_BLOCK
    for level in tl.static_range(1, LEVELS):
        if len(means) > 1:
            means, counts, squares = _merge_parts(means, counts, squares, weights)
        else:
            means, counts, squares = _merge_rows(means, counts, squares, weights, KV_BLOCK >> level, 2)
        _store_bias(head_bias + section + block * (KV_BLOCK >> level), squares, counts, scale)
        section += kv_blocks * (KV_BLOCK >> level)
    means, counts, squares = _merge_rows(means, counts, squares, weights, 1, KV_BLOCK >> (LEVELS - 1))
    _store_bias(head_bias + section + block, squares, counts, scale)
    if centroid_bias is not None:
        correction, _ = _correction_and_bias(squares[0], counts[0], scale)
        place = centroid_bias + head * kv_blocks + block + tl.arange(0, 1)
        tl.store(place, tl.load(place) + correction)
    if block == 0:
        for empty in range(0, EMPTY_ROWS):
            tl.store(head_bias + section + kv_blocks + empty, float("-inf"))


def logit_variance_launches(
    query: Tensor, lengths: Tensor | None, pyramid: Pyramid, layout: PyramidLayout, scale: float
) -> tuple[Tensor, list[KernelLaunch]]:
    """The bias with the correction, and what fills it from a pyramid that is there.

    Args:
        query: [batch, query_length, heads, head_dim], any strides.
        lengths: int64 [batch]; queries from that one on are padding. None = none is.
        pyramid, layout: Of the keys. To the pyramid's centroid bias, if it has one, the correction is added.
        scale: Factor of the logits.

    Returns:
        float32 [batch, heads, rows], in the place of the pyramid's own bias, which is [batch, rows].
    """
    batch, heads, rows, head_dim = pyramid.key.shape
    power = pyramid.bias.new_empty(batch, heads, POWER_PARTS, head_dim)
    head_bias = pyramid.bias.new_empty(batch, heads, rows)
    return head_bias, [
        query_power_launch(query, lengths, power),
        logit_variance_launch(pyramid, layout, power, head_bias, scale),
    ]


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


def logit_variance_launch(
    pyramid: Pyramid, layout: PyramidLayout, power: Tensor, head_bias: Tensor, scale: float
) -> KernelLaunch:
    """The launch that fills ``head_bias``."""
    batch, heads, rows, head_dim = pyramid.key.shape
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
        "BLOCK_D": padded_head_dim(head_dim),
        "KV_BLOCK": layout.kv_block_size,
        "LEVELS": layout.num_levels,
        "PARTS": min(MAX_PARTS, 2 ** (layout.num_levels - 1)),
        "POWER_PARTS": power.shape[2],
        "EMPTY_ROWS": layout.empty_rows,
    }
    num_warps = variance_warps(layout.kv_block_size, head_dim)
    return KernelLaunch(logit_variance_kernel, (layout.kv_blocks, batch * heads), arguments, num_warps)
