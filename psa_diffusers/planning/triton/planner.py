"""The planner's entry point on a GPU: buffers, and the launches in their order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...config import PSAConfig
from ...gpu.kernel_launch import KernelLaunch
from ...gpu.target import target_of, tensor_obstacle
from ..blocks import Layout
from ..budget import rung_costs
from .centroids import centroid_launch
from .prices import prices_launch
from .sampled import empty_masses, heads_at_a_time, masses_launch, masses_layout, shares_launch
from .samples import key_draws, query_positions
from .spending import BINS, bins_launch, chunks_of, levels_launch
from .statistics import Statistics, empty_statistics, statistics_launch

MAX_KV_BLOCK_SIZE = 512  # one program of the statistics kernel holds a block
MASSES_BYTES = 2**25  # of masses are made at a time, or a quarter of the keys' memory if that is more
MAX_SAMPLES = {"sampled_queries": 64, "sampled_keys": 16}  # a block's samples lie in one tile


@dataclass(frozen=True)
class Buffers:
    """What the kernels hand to each other besides the statistics."""

    attention: Tensor  # float32 [batch, heads, query_blocks, kv_blocks]: the second estimate, then attention^2
    features: Tensor  # [batch, heads, query_blocks, head_dim]
    output: Tensor  # the same
    output_power: Tensor  # float32 [batch, heads, query_blocks]
    prices: Tensor  # int16 [num_levels, batch, heads, query_blocks, kv_blocks]
    spent_by_chunk: Tensor  # int32 [batch, BINS, chunks]
    levels: Tensor  # int8 [batch, heads, query_blocks, kv_blocks]


def plan_levels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: PSAConfig,
    layout: Layout,
    key_lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """int8 [batch, heads, query_blocks, kv_blocks] by the ``budget`` rule. Six launches; nothing waits for the device.

    Takes, until it returns, 12 bytes a block pair (4 levels) beside the statistics, 0.05 times the memory of K and V.

    Args:
        query, key, value: [batch, seq, heads, head_dim], any strides; fp32 (exact products, slow), fp16 or bf16.
        layout: of these sequences, on their device. key_lengths: int64 [batch] there, or None.
    """
    query_length = query.shape[1]
    samples = min(config.sampled_queries, config.query_block_size)
    drawn = min(2 * config.sampled_queries, config.query_block_size)
    positions = query_positions(config.seed, query_length, config.query_block_size, samples, drawn, query.device)
    statistics = empty_statistics(key, config.kv_block_size, config.num_levels, config.sampled_keys)
    draws = key_draws(
        config.seed,
        statistics.counts.shape[1],
        config.kv_block_size,
        min(config.sampled_keys, config.kv_block_size),
        key.device,
    )
    where = {"order": layout.order, "key_lengths": key_lengths}
    statistics_launch(key, value, statistics, draws, kv_block_size=config.kv_block_size, **where).run()
    buffers = empty_buffers(query, positions, statistics)
    for launch in launches(
        query, key, config, layout, positions, statistics, buffers, scale=scale, is_padded=key_lengths is not None
    ):
        launch.run()
    return buffers.levels


def launches(
    query: Tensor,
    key: Tensor,
    config: PSAConfig,
    layout: Layout,
    positions: Tensor,
    statistics: Statistics,
    buffers: Buffers,
    *,
    scale: float,
    is_padded: bool,
    target: str | None = None,
) -> Iterator[KernelLaunch]:
    """The launches from statistics to levels, in order."""
    target = target_of(query.device) if target is None else target
    costs = tuple(rung_costs(config.kv_block_size, config.num_levels))
    full = (layout.full_query_blocks, layout.full_kv_blocks)
    yield centroid_launch(
        query,
        positions,
        layout.order,
        statistics,
        buffers.attention,
        buffers.features,
        scale=scale,
        kv_block_size=config.kv_block_size,
        target=target,
    )
    # Padding may lie anywhere in the block order; without it the last block alone may be short.
    full_blocks = 0 if is_padded else key.shape[1] // config.kv_block_size
    yield from _sampled_launches(query, config, layout, positions, statistics, buffers, full_blocks, scale, target)
    yield prices_launch(
        buffers.attention,
        buffers.output,
        buffers.output_power,
        buffers.features,
        statistics,
        full,
        buffers.prices,
        costs=costs,
        is_padded=is_padded,
        target=target,
    )
    counts = statistics.counts if is_padded else None
    spending = (buffers.prices, counts, full, statistics.spent, buffers.spent_by_chunk)
    settings = {"costs": costs, "compute_budget": config.compute_budget}
    yield bins_launch(*spending, **settings)
    yield levels_launch(*spending, buffers.levels, **settings)


def _sampled_launches(
    query: Tensor,
    config: PSAConfig,
    layout: Layout,
    positions: Tensor,
    statistics: Statistics,
    buffers: Buffers,
    full_blocks: int,
    scale: float,
    target: str,
) -> Iterator[KernelLaunch]:
    """Masses and what they come to, a few heads at a time, so that the masses stay a fraction of the keys."""
    samples = min(config.sampled_queries, config.query_block_size)
    cut = masses_layout(query, len(positions), samples, statistics, target)
    heads = query.shape[2]
    key_bytes = heads * statistics.counts.numel() * config.kv_block_size * query.shape[3] * query.itemsize
    step = heads_at_a_time(query, cut, max(MASSES_BYTES, key_bytes // 4))
    masses = empty_masses(query, cut, step)
    for first in range(0, heads, step):
        some = range(first, min(heads, first + step))
        yield masses_launch(
            query,
            positions,
            layout.order,
            statistics,
            masses,
            cut,
            some,
            samples=samples,
            scale=scale,
            full_blocks=full_blocks,
            target=target,
        )
        yield shares_launch(
            masses,
            cut,
            positions,
            statistics,
            buffers.attention,
            buffers.output,
            buffers.output_power,
            some,
            samples=samples,
            target=target,
        )


def empty_buffers(query: Tensor, positions: Tensor, statistics: Statistics) -> Buffers:
    """Memory for queries [batch, query_length, heads, head_dim]."""
    batch, _, heads, head_dim = query.shape
    query_blocks, kv_blocks = positions.shape[0], statistics.counts.shape[1]
    rows = (batch, heads, query_blocks)
    chunks, _ = chunks_of(heads * query_blocks * kv_blocks)
    return Buffers(
        attention=query.new_empty(*rows, kv_blocks, dtype=torch.float32),
        features=query.new_empty(*rows, head_dim, dtype=statistics.key_spread.dtype),
        output=query.new_empty(*rows, head_dim),
        output_power=query.new_empty(rows, dtype=torch.float32),
        prices=query.new_empty(statistics.key_spread.shape[0], *rows, kv_blocks, dtype=torch.int16),
        spent_by_chunk=query.new_empty(batch, BINS, chunks, dtype=torch.int32),
        levels=query.new_empty(*rows, kv_blocks, dtype=torch.int8),
    )


def why_unsupported(query: Tensor, key_length: int, config: PSAConfig) -> str | None:
    """Why these kernels cannot plan this, as a clause for a message; None if they can."""
    if obstacle := tensor_obstacle(query):
        return obstacle
    if config.kv_block_size > MAX_KV_BLOCK_SIZE:
        return f"kv_block_size must be at most {MAX_KV_BLOCK_SIZE}, but is {config.kv_block_size}"
    for name, most in MAX_SAMPLES.items():
        if getattr(config, name) > most:
            return f"{name} must be at most {most}, but is {getattr(config, name)}"
    blocks = -(-query.shape[1] // config.query_block_size) * -(-key_length // config.kv_block_size)
    prices = query.shape[0] * query.shape[2] * blocks * config.num_levels
    if prices >= 2**31:
        return f"block pairs times num_levels must be below 2**31, but are {prices}"
    return None
