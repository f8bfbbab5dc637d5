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
    """Of several runs, or layers, at the same budgets."""
    errors = [sum(column) / len(curves) for column in zip(*(curve.errors for curve in curves), strict=True)]
    return replace(curves[0], errors=tuple(errors))


def tune(
    stretches: Sequence[Stretch],
    weights: Sequence[float],
    mean_budget: float | None,
    total: int,
    target_error: float | None = None,
    by_layer: bool = False,
) -> Tuned:
    """Spend ``mean_budget`` over all calls of these stretches, or (then None) as little as ``target_error`` needs.

    Args:
        stretches: Together the run's sparse steps.
        weights: How much an error in each of the run's ``total`` steps matters.
        mean_budget: Over the calls. Layers that were not measured get the mean too.
        total: Steps of the run.
        target_error: The total error (see :class:`Tuned`) that the schedule is to have. Where the least budgets that
            were measured err less already, they are used.
        by_layer: Spread over the layers too, by their relative errors. Else all layers of a step have one budget: how
            much a relative error matters differs between layers, and what it does to the video these errors do not say.
    """
    steps = [(stretch, step) for stretch in stretches for step in stretch.steps]
    if by_layer:
        shared = [[(stretch, step, layer)] for stretch, step in steps for layer in stretch.curves]
    else:
        shared = [[(stretch, step, layer) for layer in stretch.curves] for stretch, step in steps]
    calls = [_curve_of(places, weights) for places in shared]
    chosen = spend_budget(calls, mean_budget) if target_error is None else spend_to_error(calls, target_error)
    given = {
        (stretch.expert, step, layer): budget
        for places, budget in zip(shared, chosen, strict=True)
        for stretch, step, layer in places
    }
    spent = sum(given.values()) / len(given)
    points = [
        BudgetPoint(step / total, _of_layers(given, stretch, step, mean_budget or spent), stretch.expert)
        for stretch, step in steps
    ]
    errors = (predicted_error(calls, budgets) for budgets in ([mean_budget or spent] * len(calls), chosen))
    return Tuned(tuple(points), tuple(given), spent, *errors)


def _curve_of(places: Sequence[tuple[Stretch, int, int]], weights: Sequence[float]) -> ErrorCurve:
    """Of calls of one step that share a budget."""
    curve = mean_curve([stretch.curves[layer] for stretch, _, layer in places])
    return replace(curve, weight=weights[places[0][1]])


def _of_layers(given: Mapping, stretch: Stretch, step: int, otherwise: float) -> tuple[float, ...]:
    layers = range(stretch.blocks)
    return tuple(float(f"{given.get((stretch.expert, step, layer), otherwise):.4g}") for layer in layers)
