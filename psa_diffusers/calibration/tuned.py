"""One schedule from the measurements of several runs: the budgets of least error over all of their sparse calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..budget_schedule import BudgetPoint
from .allocation import ErrorCurve, predicted_error, spend_budget, spend_to_error


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
        places: Expert, step and layer of the sparse calls that were measured.
        mean_budget: Over these.
        uniform_error, predicted_error: The total error, root of the weighted mean of the squared relative errors of
            these calls: with the mean budget everywhere, and by the schedule.
    """

    schedule: tuple[BudgetPoint, ...]
    places: tuple[tuple[str, int, int], ...]
    mean_budget: float
    uniform_error: float
    predicted_error: float


def mean_curve(curves: Sequence[ErrorCurve]) -> ErrorCurve:
    """Of several runs, at the same budgets."""
    errors = [sum(column) / len(curves) for column in zip(*(curve.errors for curve in curves), strict=True)]
    return replace(curves[0], errors=tuple(errors))


def tune(
    stretches: Sequence[Stretch],
    weights: Sequence[float],
    mean_budget: float | None,
    total: int,
    target_error: float | None = None,
) -> Tuned:
    """Spend ``mean_budget`` over all calls of these stretches, or (then None) as little as ``target_error`` needs.

    Args:
        stretches: Together the run's sparse steps.
        weights: How much an error in each of the run's ``total`` steps matters.
        mean_budget: Over the calls. Layers that were not measured get the mean too.
        total: Steps of the run.
        target_error: The total error (see :class:`Tuned`) that the schedule is to have. Where the least budgets that
            were measured err less already, they are used.
    """
    places = [(stretch, step, layer) for stretch in stretches for step in stretch.steps for layer in stretch.curves]
    calls = [replace(stretch.curves[layer], weight=weights[step]) for stretch, step, layer in places]
    chosen = spend_budget(calls, mean_budget) if target_error is None else spend_to_error(calls, target_error)
    given = {(stretch.expert, step, layer): b for (stretch, step, layer), b in zip(places, chosen, strict=True)}
    spent = sum(chosen) / len(chosen)
    points = [
        BudgetPoint(step / total, _of_layers(given, stretch, step, mean_budget or spent), stretch.expert)
        for stretch in stretches
        for step in stretch.steps
    ]
    errors = (predicted_error(calls, budgets) for budgets in ([mean_budget or spent] * len(calls), chosen))
    return Tuned(tuple(points), tuple(given), spent, *errors)


def _of_layers(given: Mapping, stretch: Stretch, step: int, otherwise: float) -> tuple[float, ...]:
    layers = range(stretch.blocks)
    return tuple(float(f"{given.get((stretch.expert, step, layer), otherwise):.4g}") for layer in layers)
