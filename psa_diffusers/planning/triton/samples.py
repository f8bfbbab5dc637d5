"""Where the sampled queries and keys stand: tables that depend on sizes and seed alone, kept on the device."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...config import PSAConfig
from ...gpu.addressing import strided_pointers
from ...gpu.sizes import ceil_div
from ..sampling import _positions, _priorities


@lru_cache(maxsize=64)
def key_draws(seed: int, kv_blocks: int, kv_block_size: int, samples: int, device: torch.device) -> Tensor:
    """int16 [kv_blocks, kv_block_size]: the positions inside each block, in the order in which samples are drawn."""
    return _priorities(seed, "key", kv_blocks, kv_block_size, samples, "cpu").to(torch.int16).to(device)


@lru_cache(maxsize=64)
def query_positions(seed: int, length: int, block_size: int, samples: int, turn: int, device: torch.device) -> Tensor:
    """int32 [query_blocks, samples]: the positions of each block's sampled queries in block order; -1 for none.

    See :func:`~..sampling.draw_samples` for ``turn``.
    """
    positions, valid, _ = _positions(seed, "query", length, block_size, samples, turn, "cpu")
    positions = positions[0]
    if valid is not None:
        positions = torch.where(valid[0].T, positions, -1)
    return positions.to(torch.int32).to(device)


def sampled_draws(key: Tensor, config: PSAConfig) -> Tensor:
    """int16 [kv_blocks, kv_block_size] for keys [batch, seq, heads, head_dim], see :func:`key_draws`."""
    size = config.kv_block_size
    return key_draws(config.seed, ceil_div(key.shape[1], size), size, min(config.sampled_keys, size), key.device)


def sampled_positions(query: Tensor, config: PSAConfig) -> tuple[Tensor, Tensor]:
    """int32 [query_blocks, samples] each: positions of the queries sampled for the first and the second estimate."""
    size, length = config.query_block_size, query.shape[1]
    samples = min(config.sampled_queries, size)
    first, second = (query_positions(config.seed, length, size, samples, turn, query.device) for turn in (0, 1))
    return first, second


@triton.jit
def real_tokens(position, order, key_lengths, batch, length):
    """Tokens at positions of the block order, and whether they are there and no padding."""
    real = position < length
    token = position.to(tl.int64)
    if order is not None:
        token = tl.load(order + position, mask=real, other=0)
    if key_lengths is not None:
        real = real & (token < tl.load(key_lengths + batch))
    return token, real


@triton.jit
def sampled_rows(
    query,
    query_strides,
    positions,
    order,
    batch,
    head,
    first_block,
    query_blocks,
    channel,
    SAMPLES: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """The SAMPLES sampled queries of each of ROWS / PADDED blocks: rows [ROWS, BD] (0 for none) and which are real.

    Row r is sample r % PADDED of block first_block + r // PADDED.
    """
    row = tl.arange(0, ROWS)
    block = first_block + row // PADDED
    sample = row % PADDED
    position = tl.load(positions + block * SAMPLES + sample, mask=(block < query_blocks) & (sample < SAMPLES), other=-1)
    valid = position >= 0
    token = position.to(tl.int64)
    if order is not None:
        token = tl.load(order + position, mask=valid, other=0)
    pointers = strided_pointers(query, query_strides, batch, head, token, channel)
    rows = tl.load(pointers, mask=valid[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
    return rows, valid


@triton.jit
def averages(valid, PADDED: tl.constexpr, AVERAGES: tl.constexpr, kind: tl.constexpr):
    """[AVERAGES, ROWS]: what, multiplied from the left, sums the rows of each query block; and 1 / their number.

    Sums by a matrix unit, since a block's rows lie in several threads. There are at least as many averages as blocks.
    """
    block = tl.arange(0, valid.shape[0]) // PADDED
    is_of = (block[None, :] == tl.arange(0, AVERAGES)[:, None]) & valid[None, :]
    return is_of.to(kind), 1.0 / tl.maximum(tl.sum(is_of.to(tl.float32), axis=1), 1.0)


@triton.jit
def add_to_softmax(running_max, running_sum, logits):
    """Maximum and sum of exp2(logits - maximum) over the rows of one more tile; rows may be all -inf so far."""
    new_max = tl.maximum(running_max, tl.max(logits, axis=1))
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    running_sum = running_sum * tl.exp2(running_max - finite_max) + tl.sum(tl.exp2(logits - finite_max[:, None]), 1)
    return new_max, running_sum


@triton.jit
def log_of_sum(running_max, running_sum, valid):
    """log2 of the softmax denominator; +inf, so that weights become 0, where there is no query or no key."""
    return tl.where(valid & (running_sum > 0.0), running_max + tl.log2(running_sum), float("inf"))
