"""What the planner's tests want from inside the interpreter's process."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_diffusers import PSAConfig
from psa_diffusers.planning.blocks import Layout
from psa_diffusers.planning.triton import planner, sources, spending
from psa_diffusers.planning.triton import prices as prices_file
from psa_diffusers.planning.triton.statistics import Statistics


class Stages(NamedTuple):
    """Everything that one plan leaves behind."""

    statistics: Statistics
    second: Tensor  # the second estimate of the energy, before it is overwritten
    estimates: planner.Estimates
    choices: planner.Choices


def run_stages(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: PSAConfig,
    order: Tensor | None,
    key_lengths: Tensor | None,
    scale: float,
    masses_bytes: int,
) -> Stages:
    """All launches, one by one, over buffers that start as garbage; the masses take ``masses_bytes`` at a time."""
    before, sources.MASSES_BYTES = sources.MASSES_BYTES, masses_bytes
    statistics = planner.empty_statistics(key, config.kv_block_size, config.num_levels, config.sampled_keys)
    _poison(statistics)
    draws, where = planner.sampled_draws(key, config), {"order": order, "key_lengths": key_lengths}
    sizes = {"kv_block_size": config.kv_block_size, "target": "cpu"}
    planner.statistics_launch(key, value, statistics, draws, **where, **sizes).run()
    positions = planner.sampled_positions(query, config)
    estimates = planner.empty_estimates(query, config.query_block_size, statistics)
    _poison(estimates)
    full_blocks = 0 if key_lengths is not None else key.shape[1] // config.kv_block_size
    known, samples = {"scale": scale, "full_blocks": full_blocks, "target": "cpu"}, statistics.key_samples
    source = sources.prepare_source(query, key, config, order, key_lengths, **known, keys=samples).source
    inputs, second = (query, key, config, order, positions[1], statistics, estimates), None
    for launch in planner.estimate_launches(*inputs, source=source, **known):
        launch.run()
        second = estimates.attention.clone() if second is None else second
    sources.MASSES_BYTES = before
    choices = planner.empty_choices(estimates, config.num_levels)
    _poison(choices)
    chosen = (config, Layout(order, None, None, 0), statistics, estimates, choices)
    for launch in planner.choice_launches(*chosen, is_padded=key_lengths is not None, target="cpu"):
        launch.run()
    return Stages(statistics, second, estimates, choices)


def _poison(tensors: tuple[Tensor, ...]) -> None:
    for tensor in tensors:
        tensor.fill_(float("nan") if tensor.dtype.is_floating_point else 77)


@triton.jit
def _prices_of_errors(errors, prices, count, COSTS: tl.constexpr, LEVELS: tl.constexpr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    rungs = ()
    for rung in tl.static_range(LEVELS):
        rungs += (tl.load(errors + rung * count + place, mask=place < count, other=0.0),)
    rungs += (tl.zeros([SIZE], tl.float32),)
    for step in tl.static_range(1, LEVELS + 1):
        price = prices_file._price(rungs, step, COSTS, LEVELS)
        tl.store(prices + (step - 1) * count + place, price.to(tl.int16), mask=place < count)


def prices_of_errors(errors: Tensor, costs: tuple[int, ...]) -> Tensor:
    """int16 [num_levels, pairs] from errors float32 [num_levels, pairs], ordered as ``step_prices`` takes them."""
    levels, pairs = errors.shape
    rungs = errors.flip(0).contiguous()  # the centroid first
    prices = torch.empty(levels, pairs, dtype=torch.int16)
    size = triton.next_power_of_2(pairs)
    _prices_of_errors[(1,)](rungs, prices, pairs, COSTS=costs, LEVELS=levels, SIZE=size)
    return prices


def levels_of_prices(
    prices: Tensor,
    counts: Tensor | None,
    full: tuple[Tensor | None, Tensor | None],
    costs: tuple[int, ...],
    compute_budget: float,
    max_chunks: int,
    cap: Tensor | None = None,
) -> Tensor:
    """int8 levels from int16 prices with sentinels, [num_levels, batch, heads, query_blocks, kv_blocks]."""
    before = spending.MAX_CHUNKS
    spending.MAX_CHUNKS = max_chunks
    try:
        batch = prices.shape[1]
        spent = torch.zeros(batch, spending.BIN_COUNTERS, dtype=torch.int64)
        for step, price in enumerate(prices.long(), start=1):
            for sample in range(batch):
                octaves = price[sample][price[sample] >= 0] >> 7
                spent[sample, : spending.OCTAVES] += torch.bincount(octaves, minlength=spending.OCTAVES) * (
                    costs[step] - costs[step - 1]
                )
        chunks, _ = spending.chunks_of(prices[0, 0].numel())
        by_chunk = torch.full((batch, spending.BINS, chunks), 77, dtype=torch.int32)
        levels = torch.full(prices.shape[1:], 77, dtype=torch.int8)
        settings = {"costs": costs, "compute_budget": compute_budget}
        spending.bins_launch(prices, counts, full, spent, by_chunk, **settings).run()
        spending.levels_launch(prices, counts, full, spent, by_chunk, levels, **settings, cap=cap).run()
        return levels
    finally:
        spending.MAX_CHUNKS = before


def plan(query: Tensor, key: Tensor, value: Tensor, config: PSAConfig, **options: object) -> object:
    """``build_plan`` in this process."""
    from psa_diffusers.planning import build_plan

    return build_plan(query, key, value, config, **options)
