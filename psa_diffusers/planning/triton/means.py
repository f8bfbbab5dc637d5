"""Means of runs of tokens: of whole blocks for ``pooled`` importance, of short groups for ``antidiagonal``."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...gpu.addressing import strided_pointers
from ...gpu.kernel_launch import KernelLaunch
from ...gpu.sizes import ceil_div
from ...gpu.target import padded_head_dim
from .samples import real_tokens

TILE = 4096  # numbers that a program holds at a time


class Means(NamedTuple):
    """Of each run: what it holds on average, and how much."""

    rows: Tensor  # [batch, runs, heads, head_dim], any strides: means of the real tokens, 0 for none
    counts: Tensor  # int32 [batch, runs]: real tokens
    bias: Tensor  # float32 [batch, runs]: log2 of the share of the run that is real, -inf for nothing


@triton.jit
def means_kernel(
    tokens,
    order,
    lengths,
    means,
    counts,
    bias,
    strides,
    mean_strides,
    length,
    runs,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program: one run of RUN positions of one head; grid (heads, runs, batch)."""
    head = tl.program_id(0).to(tl.int64)
    run = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    count = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, RUN, BLOCK_M):
        token, real = real_tokens(run * RUN + start + tl.arange(0, BLOCK_M), order, lengths, batch, length)
        pointers = strided_pointers(tokens, strides, batch, head, token, channel)
        rows = tl.load(pointers, mask=real[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
        total += tl.sum(rows.to(tl.float32), axis=0)
        count += real.to(tl.int32)
    real_count = tl.sum(count, axis=0)
    mean = total / tl.maximum(real_count, 1).to(tl.float32)
    place = means + batch * mean_strides[0] + run.to(tl.int64) * mean_strides[1] + head * mean_strides[2]
    tl.store(place + channel * mean_strides[3], mean.to(means.dtype.element_ty), mask=channel < HEAD_DIM)
    if head == 0:
        share = tl.log2(tl.maximum(real_count, 1).to(tl.float32) / RUN)
        tl.store(counts + batch * runs + run, real_count)
        tl.store(bias + batch * runs + run, tl.where(real_count > 0, share, float("-inf")))


def empty_means(tokens: Tensor, run: int, *, dtype: torch.dtype, heads_first: bool) -> Means:
    """Memory for the means of tokens [batch, seq, heads, head_dim]; ``heads_first``: a head's lie side by side."""
    batch, length, heads, head_dim = tokens.shape
    runs = ceil_div(length, run)
    if heads_first:
        rows = tokens.new_empty(batch, heads, runs, head_dim, dtype=dtype).transpose(1, 2)
    else:
        rows = tokens.new_empty(batch, runs, heads, head_dim, dtype=dtype)
    counts = tokens.new_empty(batch, runs, dtype=torch.int32)
    return Means(rows, counts, tokens.new_empty(batch, runs, dtype=torch.float32))


def means_launch(
    tokens: Tensor, means: Means, run: int, *, order: Tensor | None, lengths: Tensor | None
) -> KernelLaunch:
    """The launch that fills ``means`` with those of runs of so many positions (a power of two).

    Args:
        tokens: [batch, seq, heads, head_dim], any strides.
        order: int64 [seq], the token at each position; None = raster.
        lengths: int64 [batch]; tokens from that one on are padding; None = no padding.
    """
    batch, length, heads, head_dim = tokens.shape
    runs = means.counts.shape[1]
    block_d = padded_head_dim(head_dim)
    arguments = {
        "tokens": tokens,
        "order": order,
        "lengths": lengths,
        "means": means.rows,
        "counts": means.counts,
        "bias": means.bias,
        "strides": tokens.stride(),
        "mean_strides": means.rows.stride(),
        "length": length,
        "runs": runs,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "RUN": run,
        "BLOCK_M": min(run, max(1, TILE // block_d)),
    }
    return KernelLaunch(means_kernel, (heads, runs, batch), arguments, num_warps=2 if run * block_d >= TILE else 1)
