"""Statistics of the key and value blocks, and which keys are sampled: one pass over keys and values."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...gpu.addressing import strided_pointers
from ...gpu.kernel_launch import KernelLaunch
from ...gpu.sizes import ceil_div, next_power_of_2
from ...gpu.target import INTERPRETED, padded_head_dim
from .key_samples import KeySamples, draw_keys, store_weights
from .samples import real_tokens
from .spending import BIN_COUNTERS
from .tiles import statistics_tile


class Statistics(NamedTuple):
    """What :class:`~..spread.Spread` holds, in the input's dtype where later kernels multiply it, and the samples."""

    key_mean: Tensor  # [batch, heads, kv_blocks, head_dim], dtype of the inputs
    value_mean: Tensor  # the same
    key_spread: Tensor  # [levels, batch, heads, kv_blocks, head_dim]; bfloat16 for half precision, since squares
    value_spread: Tensor  # float32 [levels, batch, heads, kv_blocks]
    counts: Tensor  # int32 [batch, kv_blocks]: real keys
    count_bias: Tensor  # float32 [batch, kv_blocks]: log2 of the real keys, -inf for none
    samples: Tensor  # [batch, heads, samples, kv_blocks, head_dim]: the sampled keys, 0 for none
    sample_bias: Tensor  # float32 [batch, samples, kv_blocks]: log2 of the share of a full block's keys that a sample
    # stands for, times samples: 0 in full blocks, -inf for none
    spent: Tensor  # int64 [batch, BIN_COUNTERS]: the budget's histograms, zero

    @property
    def key_samples(self) -> KeySamples:
        return KeySamples(self.counts, self.samples, self.sample_bias)


@triton.jit
def _merge_pairs(rows, counts, PAIRS: tl.constexpr):
    """Merges the tiles of a tuple by twos: means, counts, and how much that adds to the squared deviations.

    Two groups of n and m tokens whose means differ by d add d^2 n m / (n + m): no cancellation.
    """
    merged_rows = ()
    merged_counts = ()
    gap = tl.zeros_like(rows[0])
    for pair in tl.static_range(PAIRS):
        n = counts[2 * pair]
        m = counts[2 * pair + 1]
        share = m / tl.maximum(n + m, 1.0)
        difference = rows[2 * pair + 1] - rows[2 * pair]
        gap += (n * share)[:, None] * (difference * difference)
        merged_rows += (rows[2 * pair] + difference * share[:, None],)
        merged_counts += (n + m,)
    return merged_rows, merged_counts, gap


@triton.jit
def _deviations(
    base, strides, batch, head, tokens, reals, counts, real_keys, channel, HEAD_DIM: tl.constexpr, LEVELS: tl.constexpr
):
    """LEVELS mean squared deviations [BD] (groups of 2, 4, ..., the block), and the block's mean [BD].

    Tile ``slot`` of a tuple holds token ``slot`` of every coarsest group, so that groups merge within a thread.
    """
    rows = ()
    for slot in tl.static_range(1 << (LEVELS - 1)):
        pointers = strided_pointers(base, strides, batch, head, tokens[slot], channel)
        mask = reals[slot][:, None] & (channel < HEAD_DIM)[None, :]
        rows += (tl.load(pointers, mask=mask, other=0.0).to(tl.float32),)
    spreads = ()
    squares = tl.zeros_like(rows[0])
    for merge in tl.static_range(LEVELS - 1):
        rows, counts, gap = _merge_pairs(rows, counts, 1 << (LEVELS - 2 - merge))
        squares += gap
        spreads += (tl.sum(squares, axis=0) / real_keys,)
    mean = tl.sum(rows[0] * counts[0][:, None], axis=0) / real_keys
    difference = tl.where(counts[0][:, None] > 0, rows[0] - mean[None, :], 0.0)
    squares += difference * difference * counts[0][:, None]
    spreads += (tl.sum(squares, axis=0) / real_keys,)
    return spreads, mean


@triton.jit
def statistics_kernel(
    key,
    value,
    order,
    key_lengths,
    draws,
    key_mean,
    value_mean,
    key_spread,
    value_spread,
    counts,
    count_bias,
    samples,
    sample_bias,
    spent,
    key_strides,
    value_strides,
    heads,
    key_length,
    kv_blocks,
    blocks_of_all_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KV_BLOCK: tl.constexpr,
    LEVELS: tl.constexpr,
    SAMPLES: tl.constexpr,
    SLOTS: tl.constexpr,
    COUNTERS: tl.constexpr,
    COUNTERS_PADDED: tl.constexpr,
):
    """One program: one kv block of one head; grid (heads, kv_blocks, batch), so that neighbours read neighbours."""
    head = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    GROUP: tl.constexpr = 1 << (LEVELS - 1)
    tokens = ()
    reals = ()
    slot_counts = ()
    real_keys = 0.0
    for slot in tl.static_range(GROUP):
        position = block * KV_BLOCK + tl.arange(0, KV_BLOCK // GROUP) * GROUP + slot
        token, real = real_tokens(position, order, key_lengths, batch, key_length)
        tokens += (token,)
        reals += (real,)
        slot_counts += (real.to(tl.float32),)
        real_keys += tl.sum(real.to(tl.float32), axis=0)
    real_keys = tl.maximum(real_keys, 1.0)

    row = (batch * heads + head) * kv_blocks + block
    slot = tl.arange(0, SLOTS)
    sampled, count = draw_keys(draws, order, key_lengths, batch, block, key_length, KV_BLOCK, SLOTS)
    sample_rows = ((batch * heads + head) * SAMPLES + slot) * kv_blocks + block
    value_spreads = ()
    for _ in tl.static_range(LEVELS):
        value_spreads += (0.0,)
    for first in tl.static_range(0, HEAD_DIM, BLOCK_D):
        channel = first + tl.arange(0, BLOCK_D)
        inside = channel < HEAD_DIM
        spreads, mean = _deviations(
            key, key_strides, batch, head, tokens, reals, slot_counts, real_keys, channel, HEAD_DIM, LEVELS
        )
        sample_mask = (slot < SAMPLES)[:, None] & inside[None, :]
        pointers = strided_pointers(key, key_strides, batch, head, sampled, channel)
        rows = tl.load(pointers, mask=sample_mask & (slot < count)[:, None], other=0.0)
        tl.store(samples + sample_rows[:, None] * HEAD_DIM + channel[None, :], rows, mask=sample_mask)
        tl.store(key_mean + row * HEAD_DIM + channel, mean.to(key_mean.dtype.element_ty), mask=inside)
        for level in tl.static_range(LEVELS):
            place = (level * blocks_of_all_heads + row) * HEAD_DIM + channel
            tl.store(key_spread + place, spreads[level].to(key_spread.dtype.element_ty), mask=inside)
        spreads, mean = _deviations(
            value, value_strides, batch, head, tokens, reals, slot_counts, real_keys, channel, HEAD_DIM, LEVELS
        )
        tl.store(value_mean + row * HEAD_DIM + channel, mean.to(value_mean.dtype.element_ty), mask=inside)
        sums = ()
        for level in tl.static_range(LEVELS):
            sums += (value_spreads[level] + tl.sum(spreads[level], axis=0),)
        value_spreads = sums
    for level in tl.static_range(LEVELS):
        tl.store(value_spread + level * blocks_of_all_heads + row, value_spreads[level])

    if head == 0:
        store_weights(counts, count_bias, sample_bias, count, batch, block, kv_blocks, KV_BLOCK, SAMPLES, SLOTS)
        if block == 0:
            counter = tl.arange(0, COUNTERS_PADDED)
            zeros = tl.zeros([COUNTERS_PADDED], tl.int64)
            tl.store(spent + batch * COUNTERS + counter, zeros, mask=counter < COUNTERS)


def empty_statistics(key: Tensor, kv_block_size: int, num_levels: int, sampled_keys: int) -> Statistics:
    """Buffers for keys [batch, key_length, heads, head_dim]: 0.11 times K and V (half precision, 4 levels of 64)."""
    batch, key_length, heads, head_dim = key.shape
    kv_blocks = ceil_div(key_length, kv_block_size)
    blocks, samples = (batch, heads, kv_blocks), min(sampled_keys, kv_block_size)
    # Squares of float16 overflow float16; the interpreter has no bfloat16.
    squares = torch.float32 if INTERPRETED or key.dtype == torch.float32 else torch.bfloat16
    return Statistics(
        key_mean=key.new_empty(*blocks, head_dim),
        value_mean=key.new_empty(*blocks, head_dim),
        key_spread=key.new_empty(num_levels, *blocks, head_dim, dtype=squares),
        value_spread=key.new_empty(num_levels, *blocks, dtype=torch.float32),
        counts=key.new_empty(batch, kv_blocks, dtype=torch.int32),
        count_bias=key.new_empty(batch, kv_blocks, dtype=torch.float32),
        samples=key.new_empty(batch, heads, samples, kv_blocks, head_dim),
        sample_bias=key.new_empty(batch, samples, kv_blocks, dtype=torch.float32),
        spent=key.new_empty(batch, BIN_COUNTERS, dtype=torch.int64),
    )


def statistics_launch(
    key: Tensor,
    value: Tensor,
    statistics: Statistics,
    draws: Tensor,
    *,
    order: Tensor | None,
    key_lengths: Tensor | None,
    kv_block_size: int,
    target: str,
) -> KernelLaunch:
    """The launch that fills ``statistics`` from key and value [batch, key_length, heads, head_dim], any strides.

    Args:
        draws: int16 [kv_blocks, kv_block_size], see :func:`~.samples.key_draws`.
        order: int64 [key_length], the token at each position; None = raster.
        key_lengths: int64 [batch]; tokens from that one on are padding; None = no padding.
    """
    batch, key_length, heads, head_dim = key.shape
    kv_blocks = statistics.counts.shape[1]
    tile = statistics_tile(target, kv_block_size, head_dim, key.dtype)
    arguments = {
        "key": key,
        "value": value,
        "order": order,
        "key_lengths": key_lengths,
        "draws": draws,
        **{name: getattr(statistics, name) for name in ("key_mean", "value_mean", "key_spread", "value_spread")},
        **{name: getattr(statistics, name) for name in ("counts", "count_bias", "samples", "sample_bias", "spent")},
        "key_strides": key.stride(),
        "value_strides": value.stride(),
        "heads": heads,
        "key_length": key_length,
        "kv_blocks": kv_blocks,
        "blocks_of_all_heads": batch * heads * kv_blocks,
        "HEAD_DIM": head_dim,
        "BLOCK_D": min(tile.block_d, padded_head_dim(head_dim)),
        "KV_BLOCK": kv_block_size,
        "LEVELS": statistics.key_spread.shape[0],
        "SAMPLES": statistics.samples.shape[2],
        "SLOTS": next_power_of_2(statistics.samples.shape[2]),
        "COUNTERS": BIN_COUNTERS,
        "COUNTERS_PADDED": next_power_of_2(BIN_COUNTERS),
    }
    return KernelLaunch(statistics_kernel, (heads, kv_blocks, batch), arguments, tile.num_warps)
