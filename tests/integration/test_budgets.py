"""Budget schedules: which compute budget each step, layer and expert of a run is planned with."""

from __future__ import annotations

import json

import pytest

from psa_diffusers import PSAConfig, disable_psa
from psa_diffusers.budget_schedule import BudgetPoint, budget_at, mean_budget, points_of
from psa_diffusers.integration import PSAProcessor, enable_psa, operations, psa_statistics
from psa_diffusers.integration.forecast import expected_budget

from .tiny_wan import LAYERS, full_plan, generate, pipeline, tiny_config, transformer


@pytest.fixture
def planned(recorder, monkeypatch):
    """The budgets that plans are asked for, in order."""
    budgets = []

    def build_plan(query, key, value, config, **options):
        assert config.budget_schedule is None, "a plan has one budget"
        budgets.append(config.compute_budget)
        return full_plan(query, key, value, config)

    monkeypatch.setattr(operations, "build_plan", build_plan)
    return budgets


def by_step(budgets, calls):
    return [budgets[start : start + calls] for start in range(0, len(budgets), calls)]


def test_budgets_change_linearly_between_points_and_stay_beyond_them():
    points = list(PSAConfig(budget_schedule=[(0.75, 0.1), (0.25, 0.5)]).budget_schedule)
    assert [budget_at(points, at, 0) for at in (0.0, 0.25, 0.75, 1.0)] == [0.5, 0.5, 0.1, 0.1]
    assert budget_at(points, 0.5, 0) == pytest.approx(0.3, rel=0.011)
    assert mean_budget(points, [0.0, 1.0]) == pytest.approx(0.3)


def test_interpolated_budgets_are_few_and_within_their_neighbours():
    points = [BudgetPoint(0.0, 0.31), BudgetPoint(1.0, 0.05)]
    budgets = [budget_at(points, at / 1000, 0) for at in range(1001)]
    assert len(set(budgets)) <= 2 + 32 * 2.7
    assert budgets == sorted(budgets, reverse=True) and budgets[0] == 0.31 and budgets[-1] == 0.05
    for at, budget in enumerate(budgets):
        assert budget == pytest.approx(0.31 - 0.26 * at / 1000, rel=0.011)


def test_experts_have_their_own_points_or_those_of_all():
    points = PSAConfig(budget_schedule=[(0, 0.2), {"at": 0, "budget": 0.1, "expert": "b"}]).budget_schedule
    assert points_of(points, "a") == [BudgetPoint(0.0, 0.2)]
    assert points_of(points, "b") == [BudgetPoint(0.0, 0.1, "b")]


def test_a_run_follows_its_schedule(planned):
    config = tiny_config(budget_schedule=[(0.5, (0.5, 0.75)), (0.75, (0.25, 0.75))])
    pipe = enable_psa(pipeline(), config)
    generate(pipe, steps=4, guidance_scale=1.0)
    assert by_step(planned, LAYERS) == [[0.5, 0.75], [0.5, 0.75], [0.25, 0.75]]


def test_a_budget_of_one_is_dense(planned, recorder):
    pipe = enable_psa(pipeline(), tiny_config(dense_warmup=0.0, budget_schedule=[(0.0, 1.0), (0.5, 1.0), (0.75, 0.25)]))
    generate(pipe, steps=4, guidance_scale=1.0)
    assert recorder.steps(LAYERS) == "ddds"
    assert psa_statistics(pipe).dense_reasons == {"dense budget": 3 * LAYERS}
    assert planned == [0.25] * LAYERS


def test_layers_that_are_dense_by_budget_are_beside_sparse_ones(planned):
    pipe = enable_psa(pipeline(), tiny_config(budget_schedule=[(0.0, (1.0, 0.5))]))
    generate(pipe, steps=4, guidance_scale=1.0)
    statistics = psa_statistics(pipe)
    assert planned == [0.5] * 3 and statistics.dense_reasons == {"dense warm-up": LAYERS, "dense budget": 3}


def test_each_expert_has_its_own_budget(planned):
    schedule = [{"at": 0, "budget": 0.75}, {"at": 0, "budget": 0.25, "expert": "transformer_2"}]
    pipe = enable_psa(pipeline("experts"), tiny_config(budget_schedule=schedule, dense_warmup=0.0))
    generate(pipe, steps=4, guidance_scale=1.0)
    steps = by_step(planned, LAYERS)
    assert set(planned) == {0.75, 0.25} and steps == sorted(steps, reverse=True)


def test_what_the_schedule_leaves_out_gets_the_compute_budget(planned):
    schedule = [{"at": 0, "budget": 0.25, "expert": "transformer_2"}]
    pipe = enable_psa(pipeline("experts"), tiny_config(budget_schedule=schedule, dense_warmup=0.0))
    generate(pipe, steps=4, guidance_scale=1.0)
    assert set(planned) == {0.5, 0.25}


def test_achieved_budgets_are_reported_by_step():
    config = tiny_config(kv_block_size=4, dense_warmup=0.25, budget_schedule=[(0.25, 1.0), (0.5, 0.9), (0.75, 0.3)])
    pipe = enable_psa(pipeline(), config)
    generate(pipe, steps=4)
    statistics = psa_statistics(pipe)
    steps, budgets = zip(*statistics.compute_budget_by_step, strict=True)
    assert steps == (2, 3) and budgets[0] > 0.8 and budgets[1] < 0.5
    assert statistics.compute_budget_sparse == pytest.approx(sum(budgets) / 2)
    values = json.loads(json.dumps(statistics.to_dict()))
    assert values["compute_budget_by_step"] == [[2, budgets[0]], [3, budgets[1]]]


def test_a_schedule_that_does_not_fit_the_transformers_is_refused():
    other = tiny_config(budget_schedule=[{"at": 0, "budget": 0.5, "expert": "transformer_3"}])
    with pytest.raises(ValueError, match="names expert 'transformer_3', but the transformers here are transformer"):
        enable_psa(pipeline("experts"), other)
    with pytest.raises(ValueError, match=r"gives 3 budgets at 0\.5, but transformer has 2 blocks"):
        PSAProcessor(transformer(), tiny_config(budget_schedule=[(0.5, (0.5, 0.5, 0.5))]))


def test_a_refused_schedule_changes_nothing(planned, recorder):
    pipe = pipeline()
    with pytest.raises(ValueError, match="names expert"):
        enable_psa(pipe, tiny_config(budget_schedule=[{"at": 0, "budget": 0.5, "expert": "x"}]))
    generate(disable_psa(pipe), steps=2)
    assert set(recorder.calls) == {"dense"}


def test_without_a_schedule_plans_get_the_processors_own_config(recorder, monkeypatch):
    seen, config = [], tiny_config()
    before = operations.build_plan
    monkeypatch.setattr(operations, "build_plan", lambda q, k, v, c, **o: seen.append(c) or before(q, k, v, c, **o))
    generate(enable_psa(pipeline(), config), steps=2)
    assert seen and all(one is config for one in seen)


def test_a_forecast_takes_the_mean_of_the_sparse_steps():
    config = PSAConfig(budget_schedule=[(0.5, 0.4), (0.75, 0.2)], dense_warmup=0.5)
    assert expected_budget(config, 4) == pytest.approx(0.3)
    assert expected_budget(PSAConfig(budget_schedule=[(0.5, 0.4)], dense_warmup=1.0), 4) is None


def test_a_run_spends_what_each_call_needs_and_reports_it():
    pipe = enable_psa(pipeline(), tiny_config(compute_budget=None, target_error=0.02))
    generate(pipe, steps=4)
    statistics = psa_statistics(pipe)
    assert 0.25 < statistics.compute_budget_sparse < 1 and len(statistics.compute_budget_by_step) == 3
    assert "target_error" in statistics.planner_reason
