"""Where compute is best spent: of all calls' error curves, the steps that lower the error most for what they cost.

At one price lambda every call takes the budget with the least weight x error + lambda x budget: a vertex of its curve's
lower convex hull. So the steps from vertex to vertex are taken in the order of what they gain a unit of cost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

BUDGETS_AN_OCTAVE = 8  # between the measured ones, where errors are interpolated


@dataclass(frozen=True)
class ErrorCurve:
    """The squared relative error of a call (or of several alike) by compute budget.

    Attributes:
        budgets: Rising; dense (1, without error) is not among them.
        errors: Squared relative errors at these.
        weight: How much a unit of this error matters.
    """

    budgets: tuple[float, ...]
    errors: tuple[float, ...]
    weight: float = 1.0

    def refined(self) -> list[tuple[float, float]]:
        """(budget, error) on a fine grid: between measured budgets linear in their logarithms, at the end dense."""
        tiny = 1e-30
        points = [(self.budgets[0], self.errors[0])]
        for (low, first), (high, last) in pairwise(zip(self.budgets, self.errors, strict=True)):
            parts = max(1, round(math.log2(high / low) * BUDGETS_AN_OCTAVE))
            for part in range(1, parts + 1):
                share = part / parts
                error = math.exp((1 - share) * math.log(max(first, tiny)) + share * math.log(max(last, tiny)))
                points.append((low ** (1 - share) * high**share if part < parts else high, error))
        return [*points, (1.0, 0.0)]

    def hull(self) -> list[tuple[float, float]]:
        """The lower convex hull of the refined curve."""
        kept: list[tuple[float, float]] = []
        for point in self.refined():
            while len(kept) > 1 and _slope(kept[-2], kept[-1]) >= _slope(kept[-1], point):
                kept.pop()
            kept.append(point)
        while len(kept) > 1 and kept[-1][1] >= kept[-2][1]:
            kept.pop()
        return kept


def _slope(first: tuple[float, float], second: tuple[float, float]) -> float:
    return (second[1] - first[1]) / (second[0] - first[0])


def spend_budget(curves: Sequence[ErrorCurve], mean_budget: float) -> list[float]:
    """The budget of each call, with the least weighted error, of a mean of at most ``mean_budget``.

    Where the least that was measured costs more on average already, every call gets that.
    """
    left = mean_budget * len(curves) - sum(curve.budgets[0] for curve in curves)
    chosen = [curve.budgets[0] for curve in curves]
    for _, number, low, high in _steps(curves):
        cost = high[0] - low[0]
        if cost > left:
            chosen[number] = low[0] + max(left, 0.0)  # part of a step has that part of its gain
            break
        left -= cost
        chosen[number] = high[0]
    return chosen


def spend_to_error(curves: Sequence[ErrorCurve], error: float) -> list[float]:
    """The budget of each call, with the least mean, so that the weighted mean of the squared errors is ``error**2``.

    Or less: where a curve is not convex, the last step is taken in full.
    """
    excess = sum(curve.weight * (curve.errors[0] - error**2) for curve in curves)
    chosen = [curve.budgets[0] for curve in curves]
    for _, number, low, high in _steps(curves):
        if excess <= 0:
            break
        gain = curves[number].weight * (low[1] - high[1])
        part = min(1.0, excess / gain)
        between = low[0] + part * (high[0] - low[0])
        on_the_way = low[1] + part * (high[1] - low[1])
        chosen[number] = between if error_at(curves[number], between) <= on_the_way * (1 + 1e-9) else high[0]
        excess -= gain
    return chosen


def predicted_error(curves: Sequence[ErrorCurve], budgets: Sequence[float]) -> float:
    """The root of the weighted mean of the squared errors at these budgets."""
    total = sum(curve.weight * error_at(curve, budget) for curve, budget in zip(curves, budgets, strict=True))
    return math.sqrt(total / sum(curve.weight for curve in curves))


def error_at(curve: ErrorCurve, budget: float) -> float:
    """The squared error at a budget, between the points of the refined curve linear, before the first as there."""
    points = curve.refined()
    if budget >= points[-1][0]:
        return points[-1][1]
    for low, high in pairwise(points):
        if low[0] <= budget <= high[0]:
            return low[1] + _slope(low, high) * (budget - low[0])
    return points[0][1]


def _steps(curves: Sequence[ErrorCurve]) -> list[tuple[float, int, tuple[float, float], tuple[float, float]]]:
    """All hull steps, (gain a unit of cost, call, from, to), the best first; of one call in its order."""
    steps = [
        (-_slope(low, high) * curve.weight, number, low, high)
        for number, curve in enumerate(curves)
        for low, high in pairwise(curve.hull())
    ]
    return sorted(steps, key=lambda step: (-step[0], step[1], step[2][0]))
