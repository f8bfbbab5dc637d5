"""Compute budgets that change over a run: from step to step, from layer to layer, from expert to expert."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

# Interpolated budgets are rounded to so many an octave (1 % or less): what a planner remembers of a budget is of use
# again, instead of every step of every layer having one of its own.
BUDGETS_AN_OCTAVE = 32


@dataclass(frozen=True)
class BudgetPoint:
    """The compute budget at a point of the run. Between two points it changes linearly; beyond the ends it stays.

    Attributes:
        at: Share of the run's steps that lie before: step ``i`` of ``n`` is at ``i / n``.
        budget: Of all layers, or one a transformer block. Dense = 1, and 1 is computed densely.
        expert: Name of the transformer in the pipeline that it is for (``"transformer_2"``, say). None = of each that
            has no points of its own.
    """

    at: float
    budget: float | tuple[float, ...]
    expert: str | None = None

    def of_layer(self, layer: int) -> float:
        return self.budget[layer] if isinstance(self.budget, tuple) else self.budget

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for YAML or JSON."""
        budget = list(self.budget) if isinstance(self.budget, tuple) else self.budget
        named = {} if self.expert is None else {"expert": self.expert}
        return {"at": self.at, "budget": budget, **named}


def read_points(values: Any, minimum: float) -> tuple[BudgetPoint, ...]:
    """Points in order, from :class:`BudgetPoint`, pairs (at, budget) or mappings.

    Args:
        values: What the config was given.
        minimum: The least budget that a plan can have.

    Raises:
        ValueError: naming the rule and the value.
    """
    if not isinstance(values, list | tuple) or not values:
        raise ValueError(f"{_NAME} must be a list of points, {_FORMS}, but is {values!r}.")
    points = sorted((_read_point(value, minimum) for value in values), key=lambda point: (point.expert or "", point.at))
    for first, second in pairwise(points):
        if (first.expert, first.at) == (second.expert, second.at):
            raise ValueError(f"{_NAME} must have one point a place, but has two at {first.at:g}; leave one out.")
        if first.expert == second.expert and _layers(first) != _layers(second):
            raise ValueError(
                f"{_NAME} must give one budget, or as many for the layers, at all points of an expert, but gives "
                f"{_layers(first) or 'one'} at {first.at:g} and {_layers(second) or 'one'} at {second.at:g}."
            )
    return tuple(points)


_NAME = "PSAConfig: budget_schedule"
_FORMS = "each (at, budget) or {at: ..., budget: ..., expert: ...}"


def _read_point(value: Any, minimum: float) -> BudgetPoint:
    if isinstance(value, BudgetPoint):
        at, budget, expert = value.at, value.budget, value.expert
    elif isinstance(value, Mapping) and {"at", "budget"} <= set(value) <= {"at", "budget", "expert"}:
        at, budget, expert = value["at"], value["budget"], value.get("expert")
    elif isinstance(value, list | tuple) and len(value) == 2:
        (at, budget), expert = value, None
    else:
        raise ValueError(f"{_NAME} must be a list of points, {_FORMS}, but holds {value!r}.")
    if not _is_number(at) or not 0 <= at <= 1:
        raise ValueError(f"{_NAME}: at must be a share of the run in [0, 1], but is {at!r}.")
    if expert is not None and (not isinstance(expert, str) or not expert):
        raise ValueError(f"{_NAME}: expert must be a transformer's name in the pipeline, but is {expert!r}.")
    several = isinstance(budget, list | tuple)
    if several and not budget:
        raise ValueError(f"{_NAME}: budget must be a number or one a layer, but is {budget!r} at {at:g}.")
    for number in budget if several else [budget]:
        if not _is_number(number) or not minimum <= number <= 1:
            raise ValueError(
                f"{_NAME}: budget must be from 1 / kv_block_size = {minimum:g} (one centroid a block) to 1 (dense), "
                f"but is {number!r} at {at:g}."
            )
    return BudgetPoint(float(at), tuple(map(float, budget)) if several else float(budget), expert)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _layers(point: BudgetPoint) -> int | None:
    return len(point.budget) if isinstance(point.budget, tuple) else None


def points_of(points: Iterable[BudgetPoint], expert: str | None) -> list[BudgetPoint]:
    """Those for this expert: its own, else those of no one in particular."""
    points = list(points)
    own = [point for point in points if point.expert == expert]
    return own or [point for point in points if point.expert is None]


def budget_at(points: list[BudgetPoint], at: float, layer: int) -> float:
    """The compute budget of a layer at a share of the run; ``points`` of one expert, in order, at least one."""
    for first, second in pairwise(points):
        if first.at <= at <= second.at:
            low, high = first.of_layer(layer), second.of_layer(layer)
            share = (at - first.at) / (second.at - first.at)
            return _rounded(low * (1 - share) + high * share, low, high)
    return points[0 if at < points[0].at else -1].of_layer(layer)


def _rounded(budget: float, low: float, high: float) -> float:
    if low == high:
        return low
    if budget in (low, high):
        return budget
    rounded = 2.0 ** (round(math.log2(budget) * BUDGETS_AN_OCTAVE) / BUDGETS_AN_OCTAVE)
    return min(max(rounded, min(low, high)), max(low, high))


def mean_budget(points: Iterable[BudgetPoint], places: Iterable[float]) -> float | None:
    """The mean over these shares of a run, over the layers, and over the experts that have points; None of no place."""
    points, places, found = list(points), list(places), []
    for expert in dict.fromkeys(point.expert for point in points):
        own = points_of(points, expert)
        found += [budget_at(own, at, layer) for at in places for layer in range(_layers(own[0]) or 1)]
    return sum(found) / len(found) if found else None
