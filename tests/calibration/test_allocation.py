"""Budgets of least error: against all possibilities where they can be counted, and by the properties of an optimum."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_diffusers.calibration import ErrorCurve, spend_budget, spend_to_error
from psa_diffusers.calibration.allocation import error_at, predicted_error
from psa_diffusers.calibration.tuned import Stretch, mean_curve, tune

BUDGETS = (0.05, 0.1, 0.2, 0.4)


def power_law(level: float, exponent: float = 1.2, weight: float = 1.0) -> ErrorCurve:
    return ErrorCurve(BUDGETS, tuple(level * budget**-exponent for budget in BUDGETS), weight)


curves = st.lists(
    st.builds(power_law, st.floats(1e-4, 1e-2), st.floats(0.5, 2.0), st.floats(0.1, 10.0)), min_size=1, max_size=6
)


def total(calls, budgets):
    return sum(call.weight * error_at(call, budget) for call, budget in zip(calls, budgets, strict=True))


@settings(max_examples=60, deadline=None)
@given(curves, st.floats(0.05, 1.0))
def test_the_mean_is_kept_and_nothing_is_left_that_a_step_could_use(calls, mean):
    chosen = spend_budget(calls, mean)
    assert sum(chosen) / len(chosen) <= mean + 1e-9
    assert all(0.05 <= budget <= 1 for budget in chosen)
    assert total(calls, chosen) <= total(calls, [0.05] * len(calls)) + 1e-12


@pytest.mark.parametrize("mean", [0.07, 0.1, 0.15, 0.3])
def test_no_other_choice_of_the_grid_has_less_error(mean):
    calls = [power_law(1e-3), power_law(4e-3, 0.8), power_law(1e-3, 1.5, weight=5.0)]
    chosen = spend_budget(calls, mean)
    grids = [[budget for budget, _ in call.refined()] for call in calls]
    affordable = (point for point in itertools.product(*grids) if sum(point) <= sum(chosen) + 1e-12)
    assert total(calls, chosen) <= min(total(calls, point) for point in affordable) + 1e-12


def test_more_weight_or_more_error_gets_more():
    first, second, third = spend_budget([power_law(1e-3), power_law(4e-3), power_law(1e-3, weight=4.0)], 0.15)
    assert first < min(second, third) and second == pytest.approx(third, rel=0.1)  # to a step of the grid


def test_equal_calls_get_equal_budgets_up_to_one_step():
    chosen = spend_budget([power_law(1e-3)] * 8, 0.13)
    assert max(chosen) / min(chosen) <= 2 ** (1 / 8) + 1e-9
    assert sum(chosen) / 8 == pytest.approx(0.13, rel=0.02)


def test_a_budget_below_what_was_measured_gets_the_least():
    assert spend_budget([power_law(1e-3), power_law(2e-3)], 0.01) == [0.05, 0.05]


def test_between_measured_budgets_errors_are_interpolated_in_logarithms():
    call = power_law(1e-3)
    for budget, error in call.refined()[:-1]:
        assert error == pytest.approx(1e-3 * budget**-1.2, rel=1e-9)
    assert call.refined()[-1] == (1.0, 0.0)


def test_a_curve_that_is_not_convex_is_left_on_its_hull_alone():
    call = ErrorCurve((0.1, 0.2, 0.4), (0.100, 0.099, 0.001))
    budgets = [budget for budget, _ in call.hull()]
    assert 0.2 not in budgets and 0.1 in budgets and 0.4 in budgets


def test_no_error_anywhere_needs_the_least_budget():
    assert spend_budget([ErrorCurve((0.1, 0.2), (0.0, 0.0)), power_law(1e-3)], 0.5)[0] == 0.1


@pytest.mark.parametrize("error", [0.02, 0.05, 0.1, 0.3])
def test_a_wanted_error_is_met_and_nothing_is_spent_beyond_it(error):
    calls = [power_law(1e-3), power_law(4e-3, 0.8), power_law(1e-3, 1.5, weight=5.0)]
    chosen = spend_to_error(calls, error)
    assert predicted_error(calls, chosen) <= error * (1 + 1e-9)
    if max(chosen) > 0.05:
        assert predicted_error(calls, chosen) == pytest.approx(error)
        assert spend_budget(calls, sum(chosen) / 3) == pytest.approx(chosen)


def test_a_wanted_error_is_met_where_a_curve_is_not_convex():
    calls = [ErrorCurve((0.1, 0.2, 0.4), (0.100, 0.099, 0.001)), power_law(1e-3)]
    for error in (0.25, 0.2, 0.15, 0.1, 0.05):
        assert predicted_error(calls, spend_to_error(calls, error)) <= error * (1 + 1e-9)


def test_the_mean_of_curves_is_that_of_squared_errors():
    assert mean_curve([power_law(1e-3), power_law(3e-3)]).errors == pytest.approx(power_law(2e-3).errors)


def test_a_schedule_has_a_point_a_step_and_layers_without_measurement_get_the_mean():
    stretch = Stretch("transformer", (2, 3), 3, {0: power_law(1e-3), 2: power_law(4e-3)})
    tuned = tune([stretch], [1.0, 1.0, 1.0, 9.0], 0.15, 4, by_layer=True)
    assert [(point.at, point.expert) for point in tuned.schedule] == [(0.5, "transformer"), (0.75, "transformer")]
    early, late = (point.budget for point in tuned.schedule)
    assert early[1] == late[1] == 0.15 and early[0] < early[2] < late[2] and early[0] < late[0]
    measured = [early[0], early[2], late[0], late[2]]
    assert sum(measured) / 4 == pytest.approx(0.15, rel=0.05) and sum(measured) / 4 <= 0.15 + 1e-4
    assert tuned.predicted_error < tuned.uniform_error
    assert tuned.uniform_error == pytest.approx(math.sqrt(0.5 * (1e-3 + 4e-3) * 0.15**-1.2), rel=5e-3)


def test_layers_share_the_budget_of_their_step_unless_told_otherwise():
    stretch = Stretch("transformer", (2, 3), 3, {0: power_law(1e-3), 2: power_law(4e-3)})
    weights = [1.0, 1.0, 1.0, 9.0]
    tuned = tune([stretch], weights, 0.15, 4)
    early, late = (point.budget for point in tuned.schedule)
    assert early[0] == early[2] < late[0] == late[2] and early[1] == late[1] == 0.15
    assert early[0] + late[0] == pytest.approx(0.3, rel=0.01) and tuned.mean_budget == pytest.approx(0.15, rel=0.01)
    assert tuned.predicted_error < tuned.uniform_error == pytest.approx(math.sqrt(2.5e-3 * 0.15**-1.2), rel=5e-3)
    by_layer = tune([stretch], weights, 0.15, 4, by_layer=True)
    assert by_layer.predicted_error < tuned.predicted_error
    even = [point.budget[0] for point in tune([stretch], [1.0] * 4, 0.15, 4).schedule]
    assert max(even) / min(even) <= 2 ** (1 / 8) + 1e-3 and sum(even) / 2 == pytest.approx(0.15, rel=0.01)


def test_a_schedule_of_a_wanted_error_spends_no_more_than_it_needs():
    stretch = Stretch("transformer", (2, 3), 3, {0: power_law(1e-3), 2: power_law(4e-3)})
    weights = [1.0, 1.0, 1.0, 9.0]
    tuned = tune([stretch], weights, None, 4, target_error=0.1, by_layer=True)
    assert tuned.predicted_error == pytest.approx(0.1, rel=1e-6) and tuned.uniform_error > 0.1
    assert tuned.places == (("transformer", 2, 0), ("transformer", 2, 2), ("transformer", 3, 0), ("transformer", 3, 2))
    budgets = [point.budget[layer] for point in tuned.schedule for layer in (0, 2)]
    assert sum(budgets) / 4 == pytest.approx(tuned.mean_budget, rel=1e-3)
    assert all(point.budget[1] == pytest.approx(tuned.mean_budget, rel=1e-3) for point in tuned.schedule)
    same = tune([stretch], weights, tuned.mean_budget, 4, by_layer=True)
    assert same.predicted_error == pytest.approx(0.1, rel=1e-3)
