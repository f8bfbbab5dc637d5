"""The similarity cap on a GPU: what :func:`~..similarity.similarity_cap` defines."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...gpu.addressing import strided_pointers
from ...gpu.kernel_launch import KernelLaunch
from ...gpu.sizes import ceil_div
from ...gpu.target import padded_head_dim
from .samples import real_tokens

TILE = 2048  # numbers of either end of the groups that a program holds at a time


@triton.jit
def _ends(order, key_lengths, batch, start, key_length, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """The first and the last real token of GROUPS groups of SIZE positions, and whether there is one, [GROUPS] each."""
    place = tl.arange(0, SIZE)
    group = start + tl.arange(0, GROUPS) * SIZE
    _, real = real_tokens(group[:, None] + place[None, :], order, key_lengths, batch, key_length)
    first = tl.min(tl.where(real, place[None, :], SIZE), axis=1)
    last = tl.max(tl.where(real, place[None, :], -1), axis=1)
    first_token, is_filled = real_tokens(tl.where(last >= 0, group + first, key_length), order, None, 0, key_length)
    last_token, _ = real_tokens(tl.where(last >= 0, group + last, key_length), order, None, 0, key_length)
    return first_token, last_token, is_filled


@triton.jit
def _mean_cosine(
    key,
    order,
    key_lengths,
    key_strides,
    batch,
    head,
    start,
    key_length,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Cosine similarity of the first and the last key of a group, averaged over the groups that hold a key."""
    first, last, is_filled = _ends(order, key_lengths, batch, start, key_length, GROUPS, SIZE)
    product = tl.zeros([GROUPS], tl.float32)
    first_square = tl.zeros([GROUPS], tl.float32)
    last_square = tl.zeros([GROUPS], tl.float32)
    for first_channel in tl.static_range(0, HEAD_DIM, BLOCK_D):
        channel = first_channel + tl.arange(0, BLOCK_D)
        mask = is_filled[:, None] & (channel < HEAD_DIM)[None, :]
        left = tl.load(strided_pointers(key, key_strides, batch, head, first, channel), mask=mask, other=0.0)
        right = tl.load(strided_pointers(key, key_strides, batch, head, last, channel), mask=mask, other=0.0)
        left = left.to(tl.float32)
        right = right.to(tl.float32)
        product += tl.sum(left * right, axis=1)
        first_square += tl.sum(left * left, axis=1)
        last_square += tl.sum(right * right, axis=1)
    lengths = tl.maximum(tl.sqrt(first_square), 1e-12) * tl.maximum(tl.sqrt(last_square), 1e-12)
    groups = tl.maximum(tl.sum(is_filled.to(tl.int32), axis=0), 1)
    return tl.sum(product / lengths, axis=0) / groups.to(tl.float32)


@triton.jit
def similarity_kernel(
    key,
    order,
    key_lengths,
    thresholds,
    cap,
    key_strides,
    heads,
    key_length,
    kv_blocks,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """One program: one kv block of one head; grid (heads, kv_blocks, batch)."""
    head = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    coarsest = tl.full([], 1, tl.int32)
    for level in tl.static_range(2, LEVELS + 1):
        cosine = _mean_cosine(
            key,
            order,
            key_lengths,
            key_strides,
            batch,
            head,
            block * KV_BLOCK,
            key_length,
            HEAD_DIM,
            BLOCK_D,
            KV_BLOCK >> (level - 1),
            1 << (level - 1),
        )
        coarsest = tl.where(cosine > tl.load(thresholds + level - 2), level, coarsest)
    tl.store(cap + (batch * heads + head) * kv_blocks + block, coarsest.to(tl.int8))


def similarity_launch(
    key: Tensor,
    cap: Tensor,
    thresholds: Tensor,
    *,
    order: Tensor | None,
    key_lengths: Tensor | None,
    kv_block_size: int,
) -> KernelLaunch:
    """The launch that fills ``cap`` int8 [batch, heads, kv_blocks] from key [batch, key_length, heads, head_dim].

    Args:
        thresholds: see :func:`device_thresholds`.
        order: int64 [key_length], the token at each position; None = raster.
        key_lengths: int64 [batch]; tokens from that one on are padding; None = no padding.
    """
    batch, key_length, heads, head_dim = key.shape
    kv_blocks = ceil_div(key_length, kv_block_size)
    arguments = {
        "key": key,
        "order": order,
        "key_lengths": key_lengths,
        "thresholds": thresholds,
        "cap": cap,
        "key_strides": key.stride(),
        "heads": heads,
        "key_length": key_length,
        "kv_blocks": kv_blocks,
        "HEAD_DIM": head_dim,
        "BLOCK_D": min(padded_head_dim(head_dim), max(16, 2 * TILE // kv_block_size)),
        "KV_BLOCK": kv_block_size,
        "LEVELS": 1 + len(thresholds),
    }
    return KernelLaunch(similarity_kernel, (heads, kv_blocks, batch), arguments, num_warps=2)


@lru_cache(maxsize=64)
def device_thresholds(thresholds: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [num_levels - 1]: those for levels 2, 3, ..."""
    return torch.tensor(thresholds, dtype=torch.float32).to(device)
