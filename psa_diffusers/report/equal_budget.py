"""Rules at one and the same achieved compute budget, so that they can be compared.

Only the ``budget`` rule takes a budget. The others get one by a single factor on their published settings, found by
bisection on the plans of real attention calls. Importance, order and blocks are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from ..config import DEFAULT_LEVEL_FRACTIONS, DEFAULT_LEVEL_THRESHOLDS, PSAConfig

# method -> (rule, setting, published values that the factor scales)
SCALED = {
    "psa-3 shares": ("topk", "level_fractions", DEFAULT_LEVEL_FRACTIONS),
    "threshold rule": ("threshold", "level_thresholds", DEFAULT_LEVEL_THRESHOLDS),
    "binary, top-k": ("topk", "level_fractions", (1.0, 0.0, 0.0, 0.0)),
    "binary, threshold": ("threshold", "level_thresholds", (1.0, 1.0, 1.0, 1.0)),
}
BUDGET_RULE = "budget rule (default)"
METHODS = (BUDGET_RULE, *SCALED)


def scaled_config(method: str, factor: float, base: PSAConfig) -> PSAConfig:
    """``base`` with the rule of this method, its published settings times ``factor`` (thresholds are cut at 1).

    Args:
        method: A key of ``SCALED``. Binary methods know only full resolution and skip.
        factor: Above 0; shares may not add up to more than 1.
        base: Blocks, importance, order and schedule.

    Raises:
        ValueError: the method is unknown, or the scaled settings break :class:`PSAConfig`'s rules.
    """
    if method not in SCALED:
        raise ValueError(f"scaled_config: method must be one of {', '.join(SCALED)}, but is {method!r}.")
    rule, setting, values = SCALED[method]
    by_rule = (  # what only some rules read, or have another default in each
        "compute_budget",
        "target_error",
        "budget_schedule",
        "logit_correction",
        "value_correction",
        "level_thresholds",
        "level_fractions",
    )
    cleared = dict.fromkeys(by_rule)
    scaled = tuple(min(1.0, value * factor) for value in values)
    return replace(base, rule=rule, **{**cleared, setting: scaled})


def largest_factor(method: str) -> float:
    """The factor beyond which a method's settings cannot grow."""
    _, setting, values = SCALED[method]
    return 1 / sum(values) if setting == "level_fractions" else 1 / min(values)


def find_factor(budget_of: Callable[[float], float], target: float, high: float, rounds: int = 14) -> float:
    """The smallest factor up to ``high`` whose budget is at least ``target``, by bisection.

    Rows have whole numbers of blocks, so a budget may jump over the target: then the factor is the one above the jump,
    which gives the method a little more than its rivals, never less.

    Args:
        budget_of: Factor -> achieved compute budget, not decreasing.
        target: Compute budget in (0, 1].
        high: Largest factor.
        rounds: Halvings of the interval.

    Raises:
        ValueError: even ``high`` stays below the target.
    """
    if budget_of(high) < target:
        raise ValueError(f"find_factor: no factor up to {high:g} reaches compute budget {target:g}.")
    low = 0.0
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (low, middle) if budget_of(middle) >= target else (middle, high)
    return high


def calibrate(method: str, target: float, base: PSAConfig, calls: Sequence[Callable[[PSAConfig], float]]) -> PSAConfig:
    """The config of a method whose mean compute budget over these calls is the target.

    Args:
        method: A name of ``METHODS``.
        target: Compute budget.
        base: Blocks, importance, order and schedule.
        calls: For each recorded attention call a function: config -> ``build_plan(...).compute_budget``.
    """
    if method == BUDGET_RULE:
        cleared = {"level_thresholds": None, "level_fractions": None}
        return replace(base, rule="budget", compute_budget=target, **cleared)

    def budget_of(factor: float) -> float:
        config = scaled_config(method, factor, base)
        return sum(call(config) for call in calls) / len(calls)

    return scaled_config(method, find_factor(budget_of, target, largest_factor(method)), base)
