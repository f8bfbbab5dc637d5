"""What pooling loses: how far keys and values lie from the mean of the group that they are pooled into."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import block_rows, rows_per_chunk, unpadded_positions


@dataclass(frozen=True)
class Spread:
    """Statistics of the key and value blocks, float32, of real tokens only.

    Attributes:
        key: [levels, batch, heads, kv_blocks, head_dim], mean over the block's tokens of the squared deviation from
            their group's mean, a feature. Levels are 2 .. num_levels, then the centroid.
        value: [levels, batch, heads, kv_blocks], the same for values, summed over the features.
        key_mean, value_mean: [batch, heads, kv_blocks, head_dim].
    """

    key: Tensor
    value: Tensor
    key_mean: Tensor
    value_mean: Tensor

    def of_heads(self, heads: slice) -> Spread:
        return Spread(
            self.key[:, :, heads], self.value[:, :, heads], self.key_mean[:, heads], self.value_mean[:, heads]
        )


def measure_spread(
    key: Tensor, value: Tensor, order: Tensor | None, real: Tensor | None, block_size: int, num_levels: int
) -> Spread:
    """One pass over key and value [batch, seq, heads, head_dim], a few blocks at a time.

    ``real`` is bool [batch, blocks, block_size] where samples are padded, else None.
    """
    key_spread, key_mean = _deviations(key, order, real, block_size, num_levels)
    value_spread, value_mean = _deviations(value, order, real, block_size, num_levels)
    return Spread(key_spread, value_spread.sum(-1), key_mean, value_mean)


def _deviations(
    tokens: Tensor, order: Tensor | None, real: Tensor | None, block_size: int, num_levels: int
) -> tuple[Tensor, Tensor]:
    """[levels, batch, heads, blocks, head_dim] mean squared deviations, and [batch, heads, blocks, head_dim] means."""
    batch, length, heads, head_dim = tokens.shape
    blocks, step = -(-length // block_size), rows_per_chunk(tokens, block_size)
    whole = 0 if real is not None else length // block_size
    spread = tokens.new_empty(num_levels, batch, blocks, heads * head_dim, dtype=torch.float32)
    mean = tokens.new_empty(batch, blocks, heads * head_dim, dtype=torch.float32)
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        rows = block_rows(tokens, order, None, start, stop, block_size)
        mean[:, start:stop] = _halve_whole(rows, spread[:, :, start:stop])
    if real is None and whole < blocks:
        real = unpadded_positions(length, block_size, tokens.device)
    for start in range(whole, blocks, step):
        stop = min(start + step, blocks)
        rows = block_rows(tokens, order, real, start, stop, block_size)
        counts = real[:, start:stop, :, None].to(torch.float32).expand(batch, -1, -1, 1)
        mean[:, start:stop] = _halve_counted(rows, counts, spread[:, :, start:stop])
    by_head = spread.view(num_levels, batch, blocks, heads, head_dim).transpose(2, 3)
    return by_head, mean.view(batch, blocks, heads, head_dim).transpose(1, 2)


def _halve_whole(rows: Tensor, out: Tensor) -> Tensor:
    """Pool whole blocks by twos down to one row; write the deviations of each level, return the means.

    Merging two groups of n tokens whose means differ by d adds n d^2 / 2 to the sum of squared deviations: always a
    sum of squares, so that nothing cancels.
    """
    block_size, total = rows.shape[2], None
    merges = block_size.bit_length() - 1
    for merge in range(merges):
        first, second = rows[:, :, 0::2], rows[:, :, 1::2]
        # Rows are sums of 2^merge tokens, which are divided at the end: exact, and an operator less.
        gap = (first - second).square_().sum(2)
        share = 2.0 ** (-merge - 1) / block_size
        total = gap.mul_(share) if total is None else total.add_(gap, alpha=share)
        rows = first + second
        if merge < out.shape[0] - 1:
            out[merge] = total
    out[-1] = total
    return rows[:, :, 0] / block_size


def _halve_counted(rows: Tensor, counts: Tensor, out: Tensor) -> Tensor:
    """As :func:`_halve_whole` where some tokens are missing: groups weigh as many tokens as they hold."""
    total, real = 0.0, counts.sum(2).clamp_(min=1.0)
    for merge in range(rows.shape[2].bit_length() - 1):
        first, second, n, m = rows[:, :, 0::2], rows[:, :, 1::2], counts[:, :, 0::2], counts[:, :, 1::2]
        counts = n + m
        share = m / counts.clamp(min=1.0)
        total = total + (n * share * (first - second).square()).sum(2)
        rows = first + (second - first) * share
        if merge < out.shape[0] - 1:
            out[merge] = total / real
    out[-1] = total / real
    return rows[:, :, 0]
