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
from .planner import level_plan

PLANNING_KERNELS = ("statistics", "centroids", "masses", "shares", "prices", "bins", "levels")
# Those that the rules without a budget, other importances and the similarity cap add. "ranks+threshold" is the rows'
# kernel by another rule, "masses+max" that of the masses by another reduction.
RULE_KERNELS = ("key_samples", "masses+max", "shares+max", "means", "similarity", "strided_masses")
ROW_KERNELS = ("ranks", "ranks+threshold")
HOPPER_PLANNING_KERNELS = ("hopper_centroids", "hopper_masses", "hopper_masses+max")  # sm_90 alone, for long videos

LONG = 118800  # tokens of HunyuanVideo's 720p


class PlanningCase(Protocol):
    """What is read of a case."""

    kernel: str  # one of those above
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
    kernel, _, variant = case.kernel.partition("+")
    batch, length, _, head_dim = query.shape
    sizes = (case.query_block_size, case.kv_block_size)
    key_lengths, full = None, (None, None)
    if not case.is_plain:
        key_lengths = torch.empty(batch, dtype=torch.int64, device="meta")
        full = tuple(torch.empty(ceil_div(length, size), dtype=torch.bool, device="meta") for size in sizes)
    config = PSAConfig(
        query_block_size=sizes[0],
        kv_block_size=sizes[1],
        num_levels=case.num_levels,
        **_rule_of(kernel, variant, case),
    )
    # Rows as long as long videos have them, unless the case is about short ones.
    key = query.new_empty(batch, LONG, *query.shape[2:]) if kernel == "ranks" and not case.is_plain else query
    layout, scale = Layout(order, *full, 0), head_dim**-0.5
    plan = level_plan(query, key, key, config, layout, key_lengths, scale=scale, target=case.target)
    return next(launch for launch in plan.launches if launch.kernel.__name__ == f"{kernel}_kernel")


def _rule_of(kernel: str, variant: str, case: PlanningCase) -> dict[str, object]:
    """Settings with which the kernel is launched, in the variant that takes most."""
    levels = range(case.num_levels)
    has_cap = kernel == "similarity" or not case.is_plain
    settings = {"similarity_thresholds": [0.5] * (case.num_levels - 1)} if has_cap else {}
    if kernel == "means":
        return settings | {"importance": "pooled"}
    if kernel == "strided_masses":
        return settings | {"importance": "antidiagonal"}
    if variant == "max":
        return settings | {"importance_reduction": "max"}
    if variant == "threshold":
        return settings | {"rule": "threshold", "level_thresholds": [0.6 + 0.1 * level for level in levels]}
    if kernel in ("key_samples", "ranks"):
        return settings | {"rule": "topk", "level_fractions": [0.1] * case.num_levels}
    return settings
