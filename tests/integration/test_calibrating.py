"""Calibration in a run: when it measures, that dense steps stay what they were, and where the budget then goes."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from psa_diffusers import PSAConfig, disable_psa
from psa_diffusers.calibration import ErrorCurve, Probe
from psa_diffusers.calibration.tuned import Stretch
from psa_diffusers.integration import (
    PSAProcessor,
    calibrating,
    enable_psa,
    operations,
    psa_calibration,
    psa_statistics,
)
from psa_diffusers.integration.calibrating import Allocation, step_weights, tune_together

from .tiny_wan import LAYERS, generate, pipeline, tiny_config

BRANCHES = 2


@pytest.fixture
def measured(monkeypatch):
    """(expert, step, layer) of each call that is measured. Layer 1 errs four times as much as layer 0."""
    calls, probe, measure = [], calibrating.probe_call, calibrating.Calibration.measure

    def probe_call(*arguments, **options):
        found = probe(*arguments, **options)
        errors = [4.0 ** calls[-1][2] * 1e-3 * budget**-1.2 for budget in found.asked]
        power = torch.ones_like(found.power)
        return Probe(found.asked, power * torch.tensor(errors).double()[:, None, None], power)

    def noted(calibration, inputs, scale, where, expert, layer, statistics):
        calls.append((expert, calibration._last, layer))
        measure(calibration, inputs, scale, where, expert, layer, statistics)

    monkeypatch.setattr(calibrating, "probe_call", probe_call)
    monkeypatch.setattr(calibrating.Calibration, "measure", noted)
    return calls


def calibrated(kind="t2v", scheduler="euler", **settings):
    return enable_psa(pipeline(kind, scheduler), tiny_config(**settings), calibrate=True)


def total_error_config(error, **settings):
    return tiny_config(**{"compute_budget": None, "target_error": error, "dense_warmup": 0.5, **settings})


def test_the_last_dense_step_is_measured_and_the_sparse_ones_get_its_budgets(measured):
    pipe = calibrated(dense_warmup=0.5)
    generate(pipe, steps=4)
    assert measured == [("transformer", 1, layer) for _ in range(BRANCHES) for layer in range(LAYERS)]
    calibration = psa_calibration(pipe)
    (allocation,) = calibration.allocations
    assert (allocation.measured_in, allocation.stretch.steps) == (1, (2, 3))
    assert [point.at for point in calibration.schedule] == [0.5, 0.75]
    for point in calibration.schedule:
        assert len(point.budget) == LAYERS and len(set(point.budget)) == 1
    budgets = [budget for point in calibration.schedule for budget in point.budget]
    assert sum(budgets) / len(budgets) == pytest.approx(0.5, rel=1e-3)


def test_plans_are_made_with_these_budgets(measured, monkeypatch):
    asked, before = [], operations.build_plan
    monkeypatch.setattr(
        operations, "build_plan", lambda q, k, v, c, **o: asked.append(c.compute_budget) or before(q, k, v, c, **o)
    )
    pipe = calibrated(dense_warmup=0.5)
    generate(pipe, steps=4, guidance_scale=1.0)
    calibration = psa_calibration(pipe)
    probes = len(calibration.budgets) * LAYERS
    assert asked[:probes] == list(calibration.budgets) * LAYERS
    given = [budget for point in calibration.schedule for budget in point.budget]
    assert asked[probes:] == [budget for budget in given if budget < 1] and len(set(given)) > 1
    assert psa_statistics(pipe).dense_reasons.get("dense budget", 0) == given.count(1.0)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_dense_steps_are_what_they_were(guidance_scale):
    pipe = pipeline("t2v", "euler")
    expected = generate(pipe, steps=2, guidance_scale=guidance_scale)
    enable_psa(pipe, tiny_config(dense_warmup=1.0), calibrate=True)
    assert torch.equal(generate(pipe, steps=2, guidance_scale=guidance_scale), expected)
    statistics = psa_statistics(pipe)
    assert statistics.dense_calls == 2 * LAYERS * (2 if guidance_scale > 1 else 1) and statistics.sparse_calls == 0
    assert set(statistics.dense_reasons) == {"dense warm-up"} and statistics.calibration_seconds > 0
    assert psa_calibration(pipe).allocations == []
    assert torch.equal(generate(disable_psa(pipe), steps=2, guidance_scale=guidance_scale), expected)


def test_without_a_dense_step_the_first_one_is_measured_at_the_configs_budget(measured):
    pipe = calibrated(dense_warmup=0.0)
    generate(pipe, steps=4, guidance_scale=1.0)
    assert {step for _, step, _ in measured} == {0}
    calibration = psa_calibration(pipe)
    assert calibration.allocations[0].stretch.steps == (1, 2, 3)
    budgets = [budget for point in calibration.schedule for budget in point.budget]
    assert sum(budgets) / len(budgets) == pytest.approx(0.5, rel=1e-3)  # step 0 had it too


def test_each_expert_is_measured_and_the_second_gets_what_the_first_left(measured):
    pipe = calibrated("experts", dense_warmup=0.25)
    generate(pipe, steps=8, guidance_scale=1.0)
    experts = {expert: step for expert, step, _ in measured}
    assert list(experts) == ["transformer", "transformer_2"] and experts["transformer"] == 1
    _, second = psa_calibration(pipe).allocations
    begins = experts["transformer_2"]
    assert second.measured_in == begins and second.stretch.steps == tuple(range(begins + 1, 8))
    used = psa_calibration(pipe)._spent
    assert sum(used.values()) / len(used) == pytest.approx(0.5, rel=0.01) and set(used) == set(range(2, 8))


def test_tuned_settings_serve_other_runs(measured, tmp_path):
    pipe = calibrated(dense_warmup=0.5)
    calibration = psa_calibration(pipe)
    with pytest.raises(ValueError, match=r"Calibration\.tuned: nothing was measured yet; run the pipeline once"):
        _ = calibration.tuned
    expected = generate(pipe, steps=4)
    assert calibration.tuned == PSAConfig(**{**calibration.config.to_dict(), "budget_schedule": calibration.schedule})
    calibration.tuned.save(tmp_path / "tuned.yaml")
    count = len(measured)
    enable_psa(pipe, PSAConfig.load(tmp_path / "tuned.yaml"))
    assert torch.equal(generate(pipe, steps=4), expected) and len(measured) == count


def test_each_run_is_measured_anew(measured):
    pipe = calibrated(dense_warmup=0.5)
    generate(pipe, steps=4, guidance_scale=1.0)
    first = psa_calibration(pipe).schedule
    count = len(measured)
    generate(pipe, steps=4, guidance_scale=1.0)
    assert len(measured) == 2 * count and psa_calibration(pipe).schedule == first
    assert len(psa_calibration(pipe).allocations) == 1


def test_dense_layers_are_neither_measured_nor_counted_in_the_mean(measured):
    pipe = calibrated(dense_warmup=0.5, dense_layers=(0,))
    generate(pipe, steps=4, guidance_scale=1.0)
    assert {layer for *_, layer in measured} == {1}
    for point in psa_calibration(pipe).schedule:
        assert point.budget[0] == 0.5
    assert psa_statistics(pipe).dense_reasons == {"dense warm-up": 2 * LAYERS, "dense layer": 2}


def test_what_it_found_is_in_the_statistics(measured):
    pipe = calibrated(dense_warmup=0.5)
    generate(pipe, steps=4)
    values = json.loads(json.dumps(psa_statistics(pipe).to_dict()))
    assert values["calibration_seconds"] > 0
    (allocation,) = values["calibration"]["allocations"]
    assert allocation["measured_in"] == 1 and allocation["predicted_error"] < allocation["uniform_error"]
    assert allocation["layers"]["0"]["errors"][0] == pytest.approx((1e-3 * 0.25**-1.2) ** 0.5)
    assert len(values["calibration"]["budget_schedule"]) == 2


def test_a_copied_pipeline_calibrates_too(measured):
    twin = copy.deepcopy(calibrated(dense_warmup=0.5))
    generate(twin, steps=4, guidance_scale=1.0)
    assert measured and psa_calibration(twin).schedule


def test_compiled_blocks_are_measured_in_the_first_sparse_step(measured):
    pipe = calibrated(dense_warmup=0.5)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    generate(pipe, steps=4, guidance_scale=1.0)
    assert {step for _, step, _ in measured} == {2}
    assert psa_calibration(pipe).allocations[0].stretch.steps == (3,)


def test_a_target_error_is_a_total_over_the_runs_sparse_calls(measured):
    pipe = enable_psa(pipeline("t2v", "euler"), total_error_config(0.1), calibrate=True)
    generate(pipe, steps=4, guidance_scale=1.0)
    calibration = psa_calibration(pipe)
    (allocation,) = calibration.allocations
    assert allocation.predicted_error == pytest.approx(0.1) and allocation.uniform_error > 0.1
    budgets = [point.budget for point in calibration.schedule]
    assert all(row[0] == row[1] for row in budgets)
    # By the errors that the fixture gives: weights of the two steps, and 1e-3 or 4e-3 times budget ** -1.2.
    weights = step_weights(pipe.scheduler, 4)[2:]
    errors = [
        w * 4.0**layer * 1e-3 * row[layer] ** -1.2 for w, row in zip(weights, budgets, strict=True) for layer in (0, 1)
    ]
    assert (sum(errors) / (2 * sum(weights))) ** 0.5 == pytest.approx(0.1, rel=0.01)
    spent = [budget for row in budgets for budget in row]
    assert allocation.mean_budget == pytest.approx(sum(spent) / 4, rel=1e-3)
    assert psa_statistics(pipe).compute_budget_sparse == pytest.approx(allocation.mean_budget, abs=0.03)
    assert calibration.tuned.target_error is None and calibration.tuned.budget_schedule == calibration.schedule
    assert json.loads(json.dumps(calibration.to_dict()))["allocations"][0]["mean_budget"] == allocation.mean_budget


def test_a_smaller_target_error_costs_more(measured):
    spent = []
    for wanted in (0.08, 0.04, 0.02):
        pipe = enable_psa(pipeline("t2v", "euler"), total_error_config(wanted), calibrate=True)
        generate(pipe, steps=4, guidance_scale=1.0)
        spent.append(psa_calibration(pipe).allocations[0].mean_budget)
    assert spent == sorted(spent) and spent[0] < spent[2]


def test_with_a_target_error_each_expert_meets_it(measured):
    pipe = enable_psa(pipeline("experts"), total_error_config(0.05, dense_warmup=0.125), calibrate=True)
    generate(pipe, steps=8, guidance_scale=1.0)
    assert [allocation.stretch.expert for allocation in psa_calibration(pipe).allocations] == [
        "transformer",
        "transformer_2",
    ]
    for allocation in psa_calibration(pipe).allocations:
        assert allocation.predicted_error == pytest.approx(0.05)


def test_other_rules_and_schedules_are_refused():
    with pytest.raises(ValueError, match=r"sets the budgets of rule='budget' itself, but the config has rule='topk'"):
        PSAProcessor(pipeline(), PSAConfig(rule="topk"), calibrate=True)
    with pytest.raises(ValueError, match="has a budget_schedule; leave one out"):
        enable_psa(pipeline(), tiny_config(budget_schedule=[(0.0, 0.5)]), calibrate=True)


def test_context_parallel_is_refused_with_a_way_out(monkeypatch):
    pipe = calibrated()
    monkeypatch.setattr(PSAProcessor, "_context_of", lambda processor, patch: object())
    with pytest.raises(ValueError, match=r"calibrate=True does not run under context parallel.*psa-tune"):
        generate(pipe, steps=2)


def test_calls_that_cannot_be_measured_keep_the_budget_and_that_is_said(measured, monkeypatch):
    monkeypatch.setattr(calibrating, "can_probe", lambda full_tokens, key_lengths: False)
    pipe = calibrated(dense_warmup=0.5)
    generate(pipe, steps=4, guidance_scale=1.0)
    assert psa_calibration(pipe).schedule == () and calibrating.NOT_MEASURED in psa_statistics(pipe).notes
    assert psa_statistics(pipe).sparse_calls == 2 * LAYERS


def test_asking_for_what_was_not_measured():
    with pytest.raises(ValueError, match=r"call enable_psa\(pipe, calibrate=True\)"):
        psa_calibration(enable_psa(pipeline(), tiny_config()))


def test_steps_weigh_as_much_as_they_move_the_video():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler.set_timesteps(8)
    weights = step_weights(scheduler, 8, least=0.6)
    shares = (scheduler.sigmas[:-1] - scheduler.sigmas[1:]).tolist()
    assert sum(weights) / 8 == pytest.approx(1.0)
    assert weights[-2] / weights[-3] == pytest.approx((shares[-2] / shares[-3]) ** 2)
    assert weights[0] == weights[1] == min(weights)
    assert max(weights) / min(weights) == pytest.approx((max(shares) * 8 / 0.6) ** 2, rel=1e-5)


def test_the_schedulers_sigmas_tell_on_any_device():
    """A scheduler may keep them where the model is."""

    class OnDevice(torch.Tensor):
        device = torch.device("cuda")

    class Scheduler:
        sigmas = torch.tensor([1.0, 0.9, 0.0]).as_subclass(OnDevice)

    first, last = step_weights(Scheduler(), 2, least=0.1)
    assert last / first == pytest.approx(81, rel=1e-4)


@pytest.mark.parametrize("sigmas", [None, torch.tensor([14.6, 3.0, 0.0]), torch.tensor([0.0, 0.5, 1.0]), torch.ones(2)])
def test_where_the_scheduler_does_not_tell_all_steps_weigh_the_same(sigmas):
    class Scheduler:
        pass

    Scheduler.sigmas = sigmas
    assert step_weights(Scheduler(), 2) == [1.0, 1.0] and step_weights(None, 2) == [1.0, 1.0]


def test_several_runs_and_experts_make_one_schedule():
    def allocation(expert, measured_in, steps, level):
        curve = ErrorCurve((0.1, 0.2, 0.4), tuple(level * b**-1.2 for b in (0.1, 0.2, 0.4)))
        return Allocation(measured_in, Stretch(expert, steps, 1, {0: curve}), 0.2, 0.0, 0.0)

    runs = [[allocation("a", 1, (2, 3, 4, 5), level), allocation("b", 4, (5,), 3 * level)] for level in (1e-3, 3e-3)]
    tuned = tune_together(runs, [1.0] * 6, 0.2, 6)
    assert [(point.expert, round(point.at * 6)) for point in tuned.schedule] == [("a", 2), ("a", 3), ("b", 4), ("b", 5)]
    budgets = [point.budget[0] for point in tuned.schedule]
    assert sum(budgets) / 4 == pytest.approx(0.2, rel=1e-3) and budgets[3] > budgets[0]
