"""The planner's entry point on a GPU, and the ``budget`` rule's buffers and launches in their order."""

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
from .prices import prices_launch
from .ranked import LevelPlan, ranked_plan
from .ranks import MAX_KV_BLOCKS
from .samples import sampled_draws, sampled_positions
from .shares import shares_launch
from .similarity import device_thresholds, similarity_launch
from .sources import MassSource, massed_heads, prepare_source
from .spending import BINS, bins_launch, chunks_of, levels_launch
from .statistics import Statistics, empty_statistics, statistics_launch

MAX_KV_BLOCK_SIZE = 512  # one program of the statistics kernel holds a block
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
    """int8 [batch, heads, query_blocks, kv_blocks] by the config's rule. Nothing waits for the device.

    By the ``budget`` rule seven launches, three by the others, and more where the masses of all heads would take more
    than their share of memory. For half precision, 4 levels and blocks of 64 keys the statistics take 0.11 times K and
    V (the samples alone 0.06), the masses MASSES_BYTES or an eighth of K and V, the choices 13 bytes a block pair; each
    no longer than needed, but at a shape's first call.

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
    plan = level_plan(query, key, value, config, layout, key_lengths, scale=scale, target=target_of(query.device))
    return Recording([(launch, launch.run()) for launch in plan.launches], [plan.levels], plan.constants)


def level_plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: PSAConfig,
    layout: Layout,
    key_lengths: Tensor | None,
    *,
    scale: float,
    target: str,
) -> LevelPlan:
    """The launches that make the levels of :func:`plan_levels`, and their buffers."""
    cap, launches, constants = None, [], [layout.order, layout.full_query_blocks, layout.full_kv_blocks]
    if config.similarity_thresholds is not None:
        cap = key.new_empty(len(key), key.shape[2], ceil_div(key.shape[1], config.kv_block_size), dtype=torch.int8)
        thresholds = device_thresholds(config.similarity_thresholds, key.device)
        where = {"order": layout.order, "key_lengths": key_lengths, "kv_block_size": config.kv_block_size}
        launches.append(similarity_launch(key, cap, thresholds, **where))
        constants.append(thresholds)
    # Padding may lie anywhere in the block order; without it the last block alone may be short.
    full_blocks = 0 if key_lengths is not None else key.shape[1] // config.kv_block_size
    known = {"scale": scale, "full_blocks": full_blocks, "target": target}
    if config.rule == "budget":
        plan = budget_plan(query, key, value, config, layout, key_lengths, cap, **known)
    else:
        plan = ranked_plan(query, key, config, layout, key_lengths, cap, **known)
    return LevelPlan(plan.levels, launches + plan.launches, constants + plan.constants)


def budget_plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: PSAConfig,
    layout: Layout,
    key_lengths: Tensor | None,
    cap: Tensor | None,
    *,
    scale: float,
    full_blocks: int,
    target: str,
) -> LevelPlan:
    """A plan by the ``budget`` rule. ``full_blocks``: see :func:`estimate_launches`."""
    positions, draws = sampled_positions(query, config), sampled_draws(key, config)
    statistics = empty_statistics(key, config.kv_block_size, config.num_levels, config.sampled_keys)
    where = {"order": layout.order, "key_lengths": key_lengths}
    sizes = {"kv_block_size": config.kv_block_size, "target": target}
    launches = [statistics_launch(key, value, statistics, draws, **where, **sizes)]
    estimates = empty_estimates(query, config.query_block_size, statistics)
    known = {"scale": scale, "full_blocks": full_blocks, "target": target}
    prepared = prepare_source(query, key, config, **where, **known, keys=statistics.key_samples)
    launches += prepared.launches
    inputs = (query, key, config, layout.order, positions[1], statistics, estimates)
    launches += estimate_launches(*inputs, source=prepared.source, **known)
    choices = empty_choices(estimates, config.num_levels)
    chosen = (config, layout, statistics, estimates, choices)
    launches += choice_launches(*chosen, is_padded=key_lengths is not None, target=target, cap=cap)
    return LevelPlan(choices.levels, launches, [positions[1], draws, *prepared.constants])


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
    key: Tensor,
    config: PSAConfig,
    order: Tensor | None,
    second_positions: Tensor,
    statistics: Statistics,
    estimates: Estimates,
    *,
    source: MassSource,
    scale: float,
    full_blocks: int,
    target: str,
) -> Iterator[KernelLaunch]:
    """The launches that fill ``estimates``, in order; memory for the masses lives as long as this iterator.

    Args:
        second_positions: of the queries sampled for the second estimate, see :func:`~.samples.sampled_positions`.
        source: what the first estimate is made from. full_blocks: so many kv blocks, from the first, miss no key in any
            sample of the batch.
    """
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
    results = (estimates.attention, estimates.output, estimates.output_power)
    for masses, some, launch in massed_heads(source, key, config):
        yield launch
        yield shares_launch(masses, source, statistics, *results, some, target=target)


def choice_launches(
    config: PSAConfig,
    layout: Layout,
    statistics: Statistics,
    estimates: Estimates,
    choices: Choices,
    *,
    is_padded: bool,
    target: str,
    cap: Tensor | None = None,
) -> Iterator[KernelLaunch]:
    """The launches that fill ``choices``, in order. ``cap``: int8 [batch, heads, kv_blocks], the coarsest levels."""
    costs = tuple(rung_costs(config.kv_block_size, config.num_levels))
    full = (layout.full_query_blocks, layout.full_kv_blocks)
    known = {"costs": costs, "is_padded": is_padded, "target": target}
    yield prices_launch(*estimates, statistics, full, cap, choices.prices, **known)
    counts = statistics.counts if is_padded else None
    spending = (choices.prices, counts, full, statistics.spent, choices.spent_by_chunk)
    settings = {"costs": costs, "compute_budget": config.compute_budget}
    yield bins_launch(*spending, **settings)
    yield levels_launch(*spending, choices.levels, cap=cap, **settings)


def why_unsupported(query: Tensor, key_length: int, config: PSAConfig) -> str | None:
    """Why these kernels cannot plan this, as a clause for a message; None if they can."""
    if obstacle := tensor_obstacle(query):
        return obstacle
    if config.kv_block_size > MAX_KV_BLOCK_SIZE:
        return f"kv_block_size must be at most {MAX_KV_BLOCK_SIZE}, but is {config.kv_block_size}"
    for name, most in MAX_SAMPLES.items():
        if getattr(config, name) > most:
            return f"{name} must be at most {most}, but is {getattr(config, name)}"
    query_blocks, kv_blocks = (
        ceil_div(query.shape[1], config.query_block_size),
        ceil_div(key_length, config.kv_block_size),
    )
    if config.rule != "budget" and kv_blocks > MAX_KV_BLOCKS:
        return f"with rule={config.rule!r} there must be at most {MAX_KV_BLOCKS} kv blocks, but there are {kv_blocks}"
    prices = query.shape[0] * query.shape[2] * query_blocks * kv_blocks * config.num_levels
    if config.rule == "budget" and prices >= 2**31:
        return f"block pairs times num_levels must be below 2**31, but are {prices}"
    return None
