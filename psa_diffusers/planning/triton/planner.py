"""The planner's entry point on a GPU: buffers, and the launches in their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...config import PSAConfig
from ...gpu.kernel_launch import KernelLaunch
from ...gpu.recipe import Recipes, Recording
from ...gpu.sizes import ceil_div
from ...gpu.target import target_of, tensor_obstacle
from ..blocks import Layout
from ..budget import rung_costs
from .centroids import centroid_launch
from .mass_buffers import empty_masses, heads_at_a_time, masses_layout
from .masses import masses_launch
from .prices import prices_launch
from .samples import key_draws, query_positions
from .shares import shares_launch
from .spending import BINS, bins_launch, chunks_of, levels_launch
from .statistics import Statistics, empty_statistics, statistics_launch

MAX_KV_BLOCK_SIZE = 512  # one program of the statistics kernel holds a block
MASSES_BYTES = 2**25  # of masses are made at a time, or a quarter of the keys' memory if that is more
MAX_SAMPLES = {"sampled_queries": 64, "sampled_keys": 16}  # a block's samples lie in one tile


_RECIPES = Recipes()  # how to plan again what has been planned once


class Estimates(NamedTuple):
    """What is known of the pairs and rows before levels are chosen."""

    attention: Tensor  # float32 [batch, heads, query_blocks, kv_blocks]: the second estimate, then attention^2
    features: Tensor  # [batch, heads, query_blocks, head_dim], see :mod:`.centroids`
    output: Tensor  # the same, see :mod:`.shares`
    output_power: Tensor  # float32 [batch, heads, query_blocks]


class Choices(NamedTuple):
    """What is chosen of the pairs, and how."""

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
    """int8 [batch, heads, query_blocks, kv_blocks] by the ``budget`` rule. Nothing waits for the device.

    Seven launches, or nine and more where the masses of all heads would take more than their share of memory. For half
    precision, 4 levels and blocks of 64 keys the statistics take 0.11 times K and V, the masses MASSES_BYTES or an
    eighth of K and V, the choices 13 bytes a block pair; each no longer than needed, but at a shape's first call.

    Args:
        query, key, value: [batch, seq, heads, head_dim], any strides; fp32 (slow), fp16 or bf16.
        layout: of these sequences, on their device. key_lengths: int64 [batch] there, or None.
    """

    def record(inputs: Sequence[Tensor | None]) -> Recording:
        return _record_plan(*inputs, config, layout, scale)

    settings = (config, id(layout), scale)
    (levels,) = _RECIPES.run(settings, (query, key, value, key_lengths), record, keep=layout)
    return levels


def _record_plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    config: PSAConfig,
    layout: Layout,
    scale: float,
) -> Recording:
    """Plans, and says how to plan again."""
    target, is_padded = target_of(query.device), key_lengths is not None
    positions, draws = sampled_positions(query, config), sampled_draws(key, config)
    statistics = empty_statistics(key, config.kv_block_size, config.num_levels, config.sampled_keys)
    where = {"order": layout.order, "key_lengths": key_lengths}
    sizes = {"kv_block_size": config.kv_block_size, "target": target}
    launched = [statistics_launch(key, value, statistics, draws, **where, **sizes)]
    # Padding may lie anywhere in the block order; without it the last block alone may be short.
    full_blocks = 0 if is_padded else key.shape[1] // config.kv_block_size
    estimates = empty_estimates(query, config.query_block_size, statistics)
    inputs = (query, config, layout.order, positions, statistics, estimates)
    launched += estimate_launches(*inputs, scale=scale, full_blocks=full_blocks, target=target)
    choices = empty_choices(estimates, config.num_levels)
    chosen = (config, layout, statistics, estimates, choices)
    launched += choice_launches(*chosen, is_padded=is_padded, target=target)
    constants = (*positions, draws, layout.order, layout.full_query_blocks, layout.full_kv_blocks)
    return Recording([(launch, launch.run()) for launch in launched], [choices.levels], constants)


def sampled_draws(key: Tensor, config: PSAConfig) -> Tensor:
    """int16 [kv_blocks, kv_block_size], see :func:`~.samples.key_draws`."""
    size = config.kv_block_size
    blocks = -(-key.shape[1] // size)
    return key_draws(config.seed, blocks, size, min(config.sampled_keys, size), key.device)


def sampled_positions(query: Tensor, config: PSAConfig) -> tuple[Tensor, Tensor]:
    """int32 [query_blocks, samples] each: positions of the queries sampled for the first and the second estimate."""
    size, length = config.query_block_size, query.shape[1]
    samples = min(config.sampled_queries, size)
    first, second = (query_positions(config.seed, length, size, samples, turn, query.device) for turn in (0, 1))
    return first, second


def empty_estimates(query: Tensor, query_block_size: int, statistics: Statistics) -> Estimates:
    """Memory for queries [batch, query_length, heads, head_dim]."""
    batch, length, heads, head_dim = query.shape
    rows = (batch, heads, ceil_div(length, query_block_size))
    return Estimates(
        attention=query.new_empty(*rows, statistics.counts.shape[1], dtype=torch.float32),
        features=query.new_empty(*rows, head_dim, dtype=statistics.key_spread.dtype),
        output=query.new_empty(*rows, head_dim),
        output_power=query.new_empty(rows, dtype=torch.float32),
    )


def empty_choices(estimates: Estimates, num_levels: int) -> Choices:
    """Memory for the choices of all pairs."""
    pairs = estimates.attention
    chunks, _ = chunks_of(pairs[0].numel())
    return Choices(
        prices=pairs.new_empty(num_levels, *pairs.shape, dtype=torch.int16),
        spent_by_chunk=pairs.new_empty(len(pairs), BINS, chunks, dtype=torch.int32),
        levels=pairs.new_empty(pairs.shape, dtype=torch.int8),
    )


def estimate_launches(
    query: Tensor,
    config: PSAConfig,
    order: Tensor | None,
    positions: tuple[Tensor, Tensor],
    statistics: Statistics,
    estimates: Estimates,
    *,
    scale: float,
    full_blocks: int,
    target: str,
) -> Iterator[KernelLaunch]:
    """The launches that fill ``estimates``, in order; memory for the masses lives as long as this iterator.

    ``positions``: see :func:`sampled_positions`. ``full_blocks``: so many kv blocks, from the first, miss no key in any
    sample of the batch.
    """
    first_positions, second_positions = positions
    yield centroid_launch(
        query,
        second_positions,
        order,
        statistics,
        estimates.attention,
        estimates.features,
        scale=scale,
        kv_block_size=config.kv_block_size,
        full_blocks=full_blocks,
        target=target,
    )
    cut = masses_layout(query, *first_positions.shape, statistics, scale=scale, target=target)
    heads = query.shape[2]
    key_bytes = heads * statistics.counts.numel() * config.kv_block_size * query.shape[3] * query.itemsize
    step = heads_at_a_time(query, cut, max(MASSES_BYTES, key_bytes // 4))
    masses = empty_masses(query, cut, step)
    results = (estimates.attention, estimates.output, estimates.output_power)
    for first in range(0, heads, step):
        some = range(first, min(heads, first + step))
        inputs = (query, first_positions, order, statistics, masses, cut, some)
        yield masses_launch(*inputs, scale=scale, full_blocks=full_blocks, target=target)
        yield shares_launch(masses, cut, first_positions, statistics, *results, some, target=target)


def choice_launches(
    config: PSAConfig,
    layout: Layout,
    statistics: Statistics,
    estimates: Estimates,
    choices: Choices,
    *,
    is_padded: bool,
    target: str,
) -> Iterator[KernelLaunch]:
    """The launches that fill ``choices``, in order."""
    costs = tuple(rung_costs(config.kv_block_size, config.num_levels))
    full = (layout.full_query_blocks, layout.full_kv_blocks)
    known = {"costs": costs, "is_padded": is_padded, "target": target}
    yield prices_launch(*estimates, statistics, full, choices.prices, **known)
    counts = statistics.counts if is_padded else None
    spending = (choices.prices, counts, full, statistics.spent, choices.spent_by_chunk)
    settings = {"costs": costs, "compute_budget": config.compute_budget}
    yield bins_launch(*spending, **settings)
    yield levels_launch(*spending, choices.levels, **settings)


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
