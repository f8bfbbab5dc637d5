"""One schedule from the measurements of several runs: the budgets of least error over all of their sparse calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..budget_schedule import BudgetPoint
from .allocation import ErrorCurve, predicted_error, spend_budget


@dataclass(frozen=True)
class Stretch:
    """Sparse steps of one expert.

    Attributes:
        expert: The transformer's name in its pipeline.
        steps: Their indices.
        blocks: Of the transformer.
        curves: By layer, those that were measured.
    """

    expert: str
    steps: tuple[int, ...]
    blocks: int
    curves: Mapping[int, ErrorCurve]


@dataclass(frozen=True)
class Tuned:
    """A schedule, and what is to be expected of it.

    Attributes:
        schedule: A point a step and expert.
        uniform_error, predicted_error: Root of the weighted mean of the squared errors of all calls, with the same
            budget everywhere, and by the schedule.
    """

    schedule: tuple[BudgetPoint, ...]
    uniform_error: float
    predicted_error: float


def mean_curve(curves: Sequence[ErrorCurve]) -> ErrorCurve:
    """Of several runs, at the same budgets."""
    errors = [sum(column) / len(curves) for column in zip(*(curve.errors for curve in curves), strict=True)]
    return replace(curves[0], errors=tuple(errors))


def tune(stretches: Sequence[Stretch], weights: Sequence[float], mean_budget: float, total: int) -> Tuned:
    """Spend ``mean_budget`` over all calls of these stretches.

    Args:
        stretches: Together the run's sparse steps.
        weights: How much an error in each of the run's ``total`` steps matters.
        mean_budget: Over the calls. Layers that were not measured get it too.
        total: Steps of the run.
    """
    places = [(stretch, step, layer) for stretch in stretches for step in stretch.steps for layer in stretch.curves]
    calls = [replace(stretch.curves[layer], weight=weights[step]) for stretch, step, layer in places]
    chosen = spend_budget(calls, mean_budget)
    given = {(stretch.expert, step, layer): b for (stretch, step, layer), b in zip(places, chosen, strict=True)}
    points = [
        BudgetPoint(step / total, _of_layers(given, stretch, step, mean_budget), stretch.expert)
        for stretch in stretches
        for step in stretch.steps
    ]
    errors = (predicted_error(calls, budgets) for budgets in ([mean_budget] * len(calls), chosen))
    return Tuned(tuple(points), *errors)


def _of_layers(given: Mapping, stretch: Stretch, step: int, otherwise: float) -> tuple[float, ...]:
    layers = range(stretch.blocks)
    return tuple(float(f"{given.get((stretch.expert, step, layer), otherwise):.4g}") for layer in layers)
