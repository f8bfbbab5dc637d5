"""Attention between sampled queries and sampled keys: what :func:`~..importance.sampled_importance` defines.

Joined with the second estimate to attention^2 on the spot, so that score and energy need no memory of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...gpu.addressing import strided_pointers
from ...gpu.kernel_launch import KernelLaunch
from ...gpu.target import padded_head_dim
from ..errors import SHRINKAGE
from .samples import add_to_softmax, log_of_sum, sampled_rows, samples_of_blocks, sum_of_blocks
from .statistics import Statistics
from .tiles import precision_of, sampled_tile


@triton.jit
def _sampled_logits(
    query_tile,
    key,
    key_strides,
    sample_tokens,
    sample_bias,
    batch,
    head,
    start,
    kv_blocks,
    channel,
    scale,
    HEAD_DIM: tl.constexpr,
    KEY_SAMPLES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits in units of ln 2 with log2(keys a sample stands for) added, [ROWS, BN].

    Column c is sample c // BLOCKS_N of block start + c % BLOCKS_N: a block's samples lie BLOCKS_N columns apart, where
    they belong to one thread of a matrix unit's result.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    column = tl.arange(0, BLOCK_N)
    block = start + column % BLOCKS_N
    slot = column // BLOCKS_N
    inside = (block < kv_blocks) & (slot < KEY_SAMPLES)
    token = tl.load(sample_tokens + slot * kv_blocks + block, mask=inside, other=-1)
    bias = tl.load(sample_bias + block, mask=token >= 0, other=float("-inf"))
    pointers = strided_pointers(key, key_strides, batch, head, tl.maximum(token, 0).to(tl.int64), channel)
    # Samples that are not there read token 0, which is there, and count for nothing.
    if channel.shape[0] == HEAD_DIM:
        rows = tl.load(pointers)
    else:
        rows = tl.load(pointers, mask=(channel < HEAD_DIM)[None, :], other=0.0)
    logits = tl.dot(query_tile, tl.trans(rows), input_precision=PRECISION)
    return logits * (scale * LOG2E) + bias[None, :]


@triton.jit
def sampled_kernel(
    query,
    key,
    positions,
    order,
    sample_tokens,
    sample_bias,
    value_mean,
    attention,
    output,
    output_power,
    query_strides,
    key_strides,
    scale,
    heads,
    query_blocks,
    kv_blocks,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TABLE: tl.constexpr,
    SAMPLES: tl.constexpr,
    PADDED: tl.constexpr,
    KEY_SAMPLES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS_N: tl.constexpr,
    SHRINKAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M sampled queries (BLOCK_M / PADDED query blocks) of one head against all sampled keys.

    Two passes over the keys: the softmax's denominator, then the blocks' masses. ``attention`` holds the second
    estimate of the energy on entry, and attention^2 as the errors need it on return.
    """
    BLOCKS: tl.constexpr = BLOCK_M // PADDED
    first_block = tl.program_id(0) * BLOCKS
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    query_tile, valid = sampled_rows(
        query,
        query_strides,
        positions,
        order,
        batch,
        head,
        first_block,
        query_blocks,
        channel,
        TABLE,
        SAMPLES,
        PADDED,
        BLOCK_M,
        HEAD_DIM,
    )
    samples = samples_of_blocks(valid, PADDED)
    query_block = first_block + tl.arange(0, BLOCKS)
    is_block = query_block < query_blocks
    row = (batch * heads + head) * query_blocks + query_block
    sample_tokens += batch * KEY_SAMPLES * kv_blocks
    sample_bias += batch * kv_blocks
    value_mean += (batch * heads + head) * kv_blocks * HEAD_DIM

    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, kv_blocks, BLOCKS_N):
        logits = _sampled_logits(
            query_tile,
            key,
            key_strides,
            sample_tokens,
            sample_bias,
            batch,
            head,
            start,
            kv_blocks,
            channel,
            scale,
            HEAD_DIM,
            KEY_SAMPLES,
            BLOCK_N,
            BLOCKS_N,
            PRECISION,
        )
        running_max, running_sum = add_to_softmax(running_max, running_sum, logits)
    denominator = log_of_sum(running_max, running_sum, valid)

    mean_output = tl.zeros([BLOCKS, BLOCK_D], tl.float32)
    for start in range(0, kv_blocks, BLOCKS_N):
        logits = _sampled_logits(
            query_tile,
            key,
            key_strides,
            sample_tokens,
            sample_bias,
            batch,
            head,
            start,
            kv_blocks,
            channel,
            scale,
            HEAD_DIM,
            KEY_SAMPLES,
            BLOCK_N,
            BLOCKS_N,
            PRECISION,
        )
        weights = tl.exp2(logits - denominator[:, None])
        mass = tl.sum(tl.reshape(weights, (BLOCK_M, BLOCK_N // BLOCKS_N, BLOCKS_N)), axis=1)  # [BM, BLOCKS_N]
        block = start + tl.arange(0, BLOCKS_N)
        inside = block < kv_blocks
        values = tl.load(
            value_mean + block[:, None] * HEAD_DIM + channel[None, :],
            mask=inside[:, None] & (channel < HEAD_DIM)[None, :],
            other=0.0,
        )
        share = sum_of_blocks(mass, PADDED) / samples[:, None]
        mean_output = tl.dot(share.to(values.dtype), values, mean_output, input_precision=PRECISION)
        energy = sum_of_blocks(mass * mass, PADDED) / samples[:, None]
        pair = row[:, None] * kv_blocks + block[None, :]
        mask = is_block[:, None] & inside[None, :]
        second = tl.load(attention + pair, mask=mask, other=0.0)
        tl.store(attention + pair, tl.exp2(tl.log2(energy * second) * (0.5 * SHRINKAGE)), mask=mask)

    mask = is_block[:, None] & (channel < HEAD_DIM)[None, :]
    stored = mean_output.to(output.dtype.element_ty)
    tl.store(output + row[:, None] * HEAD_DIM + channel[None, :], stored, mask=mask)
    rounded = stored.to(tl.float32)
    tl.store(output_power + row, tl.sum(rounded * rounded, axis=1), mask=is_block)


def sampled_launch(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    order: Tensor | None,
    statistics: Statistics,
    attention: Tensor,
    output: Tensor,
    output_power: Tensor,
    *,
    samples: int,
    scale: float,
    target: str,
) -> KernelLaunch:
    """The launch that turns the second estimate in ``attention`` into attention^2, and fills what is beside it.

    Args:
        query, key: [batch, seq, heads, head_dim], any strides.
        positions: int32 [query_blocks, drawn], of which the first ``samples`` count here.
        attention: float32 [batch, heads, query_blocks, kv_blocks]; in and out.
        output: [batch, heads, query_blocks, head_dim], the mean output that the shares of the blocks' means give.
        output_power: float32 [batch, heads, query_blocks], its squared norm.
    """
    batch, _, heads, head_dim = query.shape
    query_blocks, kv_blocks = attention.shape[2:]
    padded = triton.next_power_of_2(samples)
    key_samples = statistics.sample_tokens.shape[1]
    padded_keys = triton.next_power_of_2(key_samples)
    tile = sampled_tile(target, head_dim, query.dtype)
    block_m = max(tile.block_m, padded)
    blocks_n = max(16, tile.block_n // padded_keys)
    arguments = {
        "query": query,
        "key": key,
        "positions": positions,
        "order": order,
        "sample_tokens": statistics.sample_tokens,
        "sample_bias": statistics.sample_bias,
        "value_mean": statistics.value_mean,
        "attention": attention,
        "output": output,
        "output_power": output_power,
        "query_strides": query.stride(),
        "key_strides": key.stride(),
        "scale": scale,
        "heads": heads,
        "query_blocks": query_blocks,
        "kv_blocks": kv_blocks,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "TABLE": positions.shape[1],
        "SAMPLES": samples,
        "PADDED": padded,
        "KEY_SAMPLES": key_samples,
        "BLOCK_M": block_m,
        "BLOCK_N": blocks_n * padded_keys,
        "BLOCKS_N": blocks_n,
        "SHRINKAGE": SHRINKAGE,
        "PRECISION": precision_of(target, query.dtype),
    }
    grid = (triton.cdiv(query_blocks, block_m // padded), heads, batch)
    return KernelLaunch(sampled_kernel, grid, arguments, tile.num_warps, tile.num_stages)
