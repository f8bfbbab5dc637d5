"""What a level of the pyramid costs and loses, on a real attention call."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..config import PSAConfig
from ..integration import AttentionCall
from ..metrics import relative_error
from ..planning.plan import Plan

THE_PLAN = "the plan"


@dataclass(frozen=True)
class Loss:
    """What one way to read keys and values does to the output of a call.

    Attributes:
        reading: A level's name, for a call that reads every block at it; or ``THE_PLAN``.
        compute_budget: Cost; dense = 1.
        error: Relative error of the output, all heads together, without the value correction.
        corrected: The same with it.
    """

    reading: str
    compute_budget: float
    error: float
    corrected: float


def level_name(level: int, num_levels: int) -> str:
    """``skip``, ``full``, ``2x``, ``4x``, ... or ``centroid``.

    Raises:
        ValueError: there is no such level.
    """
    if not 0 <= level <= num_levels + 1:
        raise ValueError(f"level_name: level must be in 0 .. num_levels + 1 = {num_levels + 1}, but is {level}.")
    if level == num_levels + 1:
        return "centroid"
    return {0: "skip", 1: "full"}.get(level, f"{2 ** (level - 1)}x")


def level_shares(plan: Plan, *, sample: int = 0, head: int | None = None) -> dict[str, float]:
    """The share of block pairs at each level, from full to centroid, then skipped; of one head or of all."""
    heads = slice(None) if head is None else slice(head, head + 1)
    counts = torch.bincount(plan.level_mask[sample, heads].flatten().long(), minlength=plan.num_levels + 2)
    order = [*range(1, plan.num_levels + 2), 0]
    return {level_name(level, plan.num_levels): float(counts[level] / counts.sum()) for level in order}


def uniform_plan(plan: Plan, level: int) -> Plan:
    """The plan with every block pair at one level (1 = full .. ``num_levels + 1`` = centroid; 0 = skip)."""
    level_name(level, plan.num_levels)  # raises where there is none
    return replace(plan, level_mask=torch.full_like(plan.level_mask, level), cache={}, notes=())


@torch.no_grad()
def level_losses(call: AttentionCall, config: PSAConfig | None = None) -> list[Loss]:
    """Cost and error of a call with everything read at one level, for every level, and of the config's plan.

    Args:
        call: A captured call.
        config: Of the ``budget`` rule, to which the value correction belongs; default ``PSAConfig()``.

    Raises:
        ValueError: the config has another rule.
    """
    config = config or PSAConfig()
    if config.rule != "budget":
        raise ValueError(f"level_losses: config must have rule='budget', but has {config.rule!r}.")
    plan, dense = call.plan(config), call.dense()
    names = {level_name(level, plan.num_levels): level for level in range(1, plan.num_levels + 2)}
    plans = {**{name: uniform_plan(plan, level) for name, level in names.items()}, THE_PLAN: plan}

    def error(chosen: Plan, correction: str) -> float:
        return relative_error(dense, call.attend(replace(config, value_correction=correction), chosen))

    return [
        Loss(name, chosen.compute_budget, error(chosen, "none"), error(chosen, "covariance"))
        for name, chosen in plans.items()
    ]
