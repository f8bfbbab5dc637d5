"""The planner's launches over tensors without memory: what ``backends/triton/inspection.py`` compiles without a GPU."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ...config import PSAConfig
from ...gpu.kernel_launch import KernelLaunch
from ...gpu.sizes import ceil_div
from ..blocks import Layout
from . import hopper
from .planner import choice_launches, empty_choices, empty_estimates, estimate_launches
from .statistics import empty_statistics, statistics_launch

PLANNING_KERNELS = ("statistics", "centroids", "masses", "shares", "prices", "bins", "levels")
HOPPER_PLANNING_KERNELS = ("hopper_centroids", "hopper_masses")  # sm_90 alone, for long videos


class PlanningCase(Protocol):
    """What is read of a case."""

    kernel: str  # one of PLANNING_KERNELS or HOPPER_PLANNING_KERNELS
    target: str
    query_block_size: int
    kv_block_size: int
    num_levels: int
    is_plain: bool  # without padding and full tokens


def planning_launch(case: PlanningCase, query: Tensor, order: Tensor | None) -> KernelLaunch:
    """The launch that the planner makes for queries, keys and values like ``query`` [batch, seq, heads, head_dim]."""
    if case.kernel in HOPPER_PLANNING_KERNELS:  # so many heads that it is worth it
        query = query.new_empty(1, query.shape[1], hopper.MIN_PROGRAMS * 8, query.shape[3])
        with hopper.switched_on():
            return _planning_launch(case, query, order)
    return _planning_launch(case, query, order)


def _planning_launch(case: PlanningCase, query: Tensor, order: Tensor | None) -> KernelLaunch:
    config = PSAConfig(
        query_block_size=case.query_block_size, kv_block_size=case.kv_block_size, num_levels=case.num_levels
    )
    batch, length, _, head_dim = query.shape
    statistics = empty_statistics(query, case.kv_block_size, case.num_levels, config.sampled_keys)
    kv_blocks, query_blocks = statistics.counts.shape[1], ceil_div(length, case.query_block_size)
    if case.kernel == "statistics":
        draws = torch.empty(kv_blocks, case.kv_block_size, dtype=torch.int16, device="meta")
        key_lengths = None if case.is_plain else torch.empty(batch, dtype=torch.int64, device="meta")
        sizes = {"kv_block_size": case.kv_block_size, "target": case.target}
        return statistics_launch(query, query, statistics, draws, order=order, key_lengths=key_lengths, **sizes)
    full = (None, None)
    if not case.is_plain:
        full = tuple(torch.empty(size, dtype=torch.bool, device="meta") for size in (query_blocks, kv_blocks))
    samples = min(config.sampled_queries, case.query_block_size)
    positions = torch.empty(query_blocks, samples, dtype=torch.int32, device="meta")
    estimates = empty_estimates(query, case.query_block_size, statistics)
    inputs = (query, config, order, (positions, positions), statistics, estimates)
    full_blocks = length // case.kv_block_size if case.is_plain else 0
    made = list(estimate_launches(*inputs, scale=head_dim**-0.5, full_blocks=full_blocks, target=case.target))
    choices, is_padded = empty_choices(estimates, case.num_levels), not case.is_plain
    chosen = (config, Layout(order, *full, 0), statistics, estimates, choices)
    made += choice_launches(*chosen, is_padded=is_padded, target=case.target)
    return next(launch for launch in made if launch.kernel.__name__ == f"{case.kernel}_kernel")
