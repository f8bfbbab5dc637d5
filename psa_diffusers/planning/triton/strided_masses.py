"""Attention between groups of queries and groups of keys: what :func:`~..importance.antidiagonal_importance` defines.

A group of consecutive queries and one of keys have one logit, the mean of query i . key STRIDE - 1 - i: a product of
rows STRIDE times as long, whose parts are gathered from the tokens where they lie. All else is as in :mod:`.masses`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...gpu.addressing import strided_pointers
from ...gpu.kernel_launch import KernelLaunch
from ...gpu.sizes import ceil_div
from ...gpu.target import padded_head_dim
from .mass_buffers import Masses, MassesLayout
from .masses import store_masses
from .means import Means
from .samples import log_of_sum, real_tokens
from .tiles import precision_of, strided_tile


class Groups(NamedTuple):
    """Tokens [batch, seq, heads, head_dim] in groups of consecutive positions."""

    tokens: Tensor
    means: Means | None  # in place of tokens that a group lacks, head by head; None = only whole groups


@dataclass(frozen=True)
class StridedMasses:
    """Of groups of queries and keys, see :func:`strided_masses_launch`. A :class:`~.sources.MassSource`."""

    query: Tensor
    queries: Groups
    keys: Groups
    positions: Tensor
    counts: Tensor | None
    order: Tensor | None
    key_lengths: Tensor | None
    layout: MassesLayout
    stride: int
    kv_block_size: int
    scale: float
    is_max: bool
    target: str

    def launch(self, masses: Masses, heads: range) -> KernelLaunch:
        return strided_masses_launch(self, masses, heads)


@triton.jit
def _group_rows(
    tokens,
    means,
    strides,
    mean_strides,
    order,
    lengths,
    batch,
    head,
    group,
    slot,
    length,
    channel,
    HEAD_DIM: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Token ``slot`` of each group [ROWS, BD], the group's mean where it lacks that one; 0 without means."""
    token, real = real_tokens(group * STRIDE + slot, order, lengths, batch, length)
    pointers = strided_pointers(tokens, strides, batch, head, token, channel)
    mask = real
    if means is not None:
        mean = strided_pointers(means, mean_strides, batch, head, group.to(tl.int64), channel)
        pointers = tl.where(real[:, None], pointers, mean)
        mask = group * STRIDE < length
    return tl.load(pointers, mask=mask[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def strided_masses_kernel(
    query,
    key,
    query_means,
    key_means,
    key_bias,
    order,
    key_lengths,
    masses,
    maxima,
    denominators,
    query_strides,
    key_strides,
    query_mean_strides,
    key_mean_strides,
    factor,
    first_head,
    heads_here,
    query_length,
    key_length,
    kv_blocks,
    rows_of_head,
    width,
    tiles,
    slots,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STRIDE: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS_N: tl.constexpr,
    IS_MAX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M groups of queries of one head against all groups of keys, SAMPLES in a kv block.

    ``factor``: on the products, so that they are logits in units of ln 2. ``slots`` is STRIDE, as a loop's end that is
    not unrolled.
    """
    head = (first_head + tl.program_id(1)).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    query_group = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = (batch * heads_here + tl.program_id(1)) * rows_of_head + query_group
    column = tl.arange(0, BLOCK_N)
    key_groups = (key_length + STRIDE - 1) // STRIDE
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, kv_blocks, BLOCKS_N):
        group = (start + column % BLOCKS_N) * SAMPLES + column // BLOCKS_N
        products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for slot in range(slots):
            queries = _group_rows(
                query,
                query_means,
                query_strides,
                query_mean_strides,
                order,
                None,
                batch,
                head,
                query_group,
                slot,
                query_length,
                channel,
                HEAD_DIM,
                STRIDE,
            )
            keys = _group_rows(
                key,
                key_means,
                key_strides,
                key_mean_strides,
                order,
                key_lengths,
                batch,
                head,
                group,
                STRIDE - 1 - slot,
                key_length,
                channel,
                HEAD_DIM,
                STRIDE,
            )
            products = tl.dot(queries, tl.trans(keys), products, input_precision=PRECISION)
        if key_bias is not None:
            bias = tl.load(key_bias + batch * key_groups + group, mask=group < key_groups, other=float("-inf"))
        else:
            bias = tl.where(group < key_groups, 0.0, float("-inf"))
        logits = products * factor + bias[None, :]
        new_max = tl.maximum(running_max, tl.max(logits, axis=1))
        largest = tl.where(new_max == float("-inf"), 0.0, new_max)  # rows that have met no key yet
        weights = tl.exp2(logits - largest[:, None])
        total = store_masses(weights, largest, masses, maxima, row, start, width, tiles, BLOCKS_N, IS_MAX)
        running_sum = running_sum * tl.exp2(running_max - largest) + total
        running_max = new_max
    is_row = query_group * STRIDE < query_length
    tl.store(denominators + row, log_of_sum(running_max, running_sum, is_row))


def strided_layout(
    query: Tensor, query_blocks: int, kv_blocks: int, groups: tuple[int, int], target: str
) -> MassesLayout:
    """How the masses are cut; ``groups`` of a query block and of a kv block."""
    tile = strided_tile(target, query.shape[3], query.dtype)
    blocks_n = max(1, tile.block_n // groups[1])
    return MassesLayout(
        padded=groups[0],
        rows=ceil_div(query_blocks * groups[0], tile.block_m) * tile.block_m,
        block_m=tile.block_m,
        block_n=blocks_n * groups[1],
        blocks_n=blocks_n,
        tiles=ceil_div(kv_blocks, blocks_n),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def strided_masses_launch(source: StridedMasses, masses: Masses, heads: range) -> KernelLaunch:
    """The launch that fills ``masses`` for some heads: their rows are groups of queries, in block order."""
    query, key, layout = source.queries.tokens, source.keys.tokens, source.layout
    head_dim, log2_e = query.shape[3], 1.4426950408889634
    query_means, key_means = (groups.means and groups.means.rows for groups in (source.queries, source.keys))
    arguments = {
        "query": query,
        "key": key,
        "query_means": query_means,
        "key_means": key_means,
        "key_bias": source.keys.means and source.keys.means.bias,
        "order": source.order,
        "key_lengths": source.key_lengths,
        "masses": masses.mass,
        "maxima": masses.maximum,
        "denominators": masses.denominator,
        "query_strides": query.stride(),
        "key_strides": key.stride(),
        "query_mean_strides": _strides(query_means),
        "key_mean_strides": _strides(key_means),
        "factor": source.scale / source.stride * log2_e,
        "first_head": heads.start,
        "heads_here": len(heads),
        "query_length": query.shape[1],
        "key_length": key.shape[1],
        "kv_blocks": ceil_div(key.shape[1], source.kv_block_size),
        "rows_of_head": layout.rows,
        "width": masses.mass.shape[1],
        "tiles": layout.tiles,
        "slots": source.stride,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "STRIDE": source.stride,
        "SAMPLES": source.kv_block_size // source.stride,
        "BLOCK_M": layout.block_m,
        "BLOCK_N": layout.block_n,
        "BLOCKS_N": layout.blocks_n,
        "IS_MAX": source.is_max,
        "PRECISION": precision_of(source.target, query.dtype),
    }
    grid = (layout.rows // layout.block_m, len(heads), query.shape[0])
    return KernelLaunch(strided_masses_kernel, grid, arguments, layout.num_warps, layout.num_stages)


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if tensor is None else tensor.stride()
