"""Which keys of a block are sampled, and what they weigh: all that the rules without a budget need of the keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...gpu.addressing import strided_pointers
from ...gpu.kernel_launch import KernelLaunch
from ...gpu.sizes import ceil_div, next_power_of_2
from ...gpu.target import padded_head_dim
from .samples import real_tokens


class KeySamples(NamedTuple):
    """What stands for the blocks of keys in a softmax."""

    counts: Tensor  # int32 [batch, kv_blocks]: real keys
    samples: Tensor  # [batch, heads, samples, kv_blocks, head_dim]: the sampled keys, 0 for none
    sample_bias: Tensor  # float32 [batch, samples, kv_blocks]: log2 of the share of a full block's keys that a sample
    # stands for, times samples: 0 in full blocks, -inf for none


@triton.jit
def draw_keys(
    draws,
    order,
    key_lengths,
    batch,
    block,
    key_length,
    KV_BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """A block's first real keys in the order in which they are drawn, [SLOTS] tokens, and how many real keys it has."""
    position = block * KV_BLOCK + tl.load(draws + block * KV_BLOCK + tl.arange(0, KV_BLOCK)).to(tl.int32)
    token, real = real_tokens(position, order, key_lengths, batch, key_length)
    slot = tl.where(real, tl.cumsum(real.to(tl.int32), axis=0) - 1, -1)
    is_here = slot[None, :] == tl.arange(0, SLOTS)[:, None]
    tokens = tl.sum(tl.where(is_here, token[None, :], 0), axis=1)
    return tokens, tl.sum(real.to(tl.int32), axis=0)


@triton.jit
def store_weights(
    counts,
    count_bias,
    sample_bias,
    count,
    batch,
    block,
    kv_blocks,
    KV_BLOCK: tl.constexpr,
    SAMPLES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """What a block's real keys (``count_bias``, if asked for) and each of its samples weigh, in units of ln 2."""
    tl.store(counts + batch * kv_blocks + block, count)
    if count_bias is not None:
        weight = tl.log2(tl.maximum(count, 1).to(tl.float32))
        tl.store(count_bias + batch * kv_blocks + block, tl.where(count > 0, weight, float("-inf")))
    sampled = tl.maximum(tl.minimum(count, SAMPLES), 1)
    share = count.to(tl.float32) * SAMPLES / (sampled.to(tl.float32) * KV_BLOCK)
    slot = tl.arange(0, SLOTS)
    bias = tl.where(slot < count, tl.log2(share), float("-inf"))
    tl.store(sample_bias + (batch * SAMPLES + slot) * kv_blocks + block, bias, mask=slot < SAMPLES)


@triton.jit
def key_samples_kernel(
    key,
    order,
    key_lengths,
    draws,
    counts,
    samples,
    sample_bias,
    key_strides,
    heads,
    key_length,
    kv_blocks,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    SAMPLES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """One program: one kv block of one head; grid (heads, kv_blocks, batch)."""
    head = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    tokens, count = draw_keys(draws, order, key_lengths, batch, block, key_length, KV_BLOCK, SLOTS)
    slot = tl.arange(0, SLOTS)
    channel = tl.arange(0, BLOCK_D)
    mask = (slot < SAMPLES)[:, None] & (channel < HEAD_DIM)[None, :]
    pointers = strided_pointers(key, key_strides, batch, head, tokens, channel)
    rows = tl.load(pointers, mask=mask & (slot < count)[:, None], other=0.0)
    place = ((batch * heads + head) * SAMPLES + slot) * kv_blocks + block
    tl.store(samples + place[:, None] * HEAD_DIM + channel[None, :], rows, mask=mask)
    if head == 0:
        store_weights(counts, None, sample_bias, count, batch, block, kv_blocks, KV_BLOCK, SAMPLES, SLOTS)


def empty_key_samples(key: Tensor, kv_block_size: int, sampled_keys: int) -> KeySamples:
    """Memory for the samples of keys [batch, key_length, heads, head_dim]: an eighth of K for 8 keys of 64."""
    batch, key_length, heads, head_dim = key.shape
    kv_blocks, samples = ceil_div(key_length, kv_block_size), min(sampled_keys, kv_block_size)
    return KeySamples(
        counts=key.new_empty(batch, kv_blocks, dtype=torch.int32),
        samples=key.new_empty(batch, heads, samples, kv_blocks, head_dim),
        sample_bias=key.new_empty(batch, samples, kv_blocks, dtype=torch.float32),
    )


def key_samples_launch(
    key: Tensor,
    made: KeySamples,
    draws: Tensor,
    *,
    order: Tensor | None,
    key_lengths: Tensor | None,
    kv_block_size: int,
) -> KernelLaunch:
    """The launch that fills ``made``; arguments as for :func:`~.statistics.statistics_launch`."""
    batch, key_length, heads, head_dim = key.shape
    kv_blocks, samples = made.counts.shape[1], made.samples.shape[2]
    arguments = {
        "key": key,
        "order": order,
        "key_lengths": key_lengths,
        "draws": draws,
        **made._asdict(),
        "key_strides": key.stride(),
        "heads": heads,
        "key_length": key_length,
        "kv_blocks": kv_blocks,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "KV_BLOCK": kv_block_size,
        "SAMPLES": samples,
        "SLOTS": next_power_of_2(samples),
    }
    return KernelLaunch(key_samples_kernel, (heads, kv_blocks, batch), arguments, num_warps=1)
