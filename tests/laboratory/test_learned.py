"""The learned level generator: with whole weights its relaxation is the plan's output, its price the budget's."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "experiments"))
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "laboratory"))

import harness
import learned_rule
from block_policies import budget_rule
from cases import Case
from learned_rule import CONFIG, Correction, Sample, observe, price_at, rung_weights
from learned_rule import learned_rule as rule_of

from psa_diffusers import PSAConfig, build_plan
from psa_diffusers.planning import build
from psa_diffusers.synthetic import video_like_qkv

SCRIPT = Path(__file__).parents[2] / "scripts" / "experiments" / "learned_levels.py"
GRID = (4, 16, 16)


@pytest.fixture(scope="module")
def case():
    return Case("small", "captured", *video_like_qkv(1, GRID, 2, 16, seed=5, position=0.3), GRID)


@pytest.fixture(scope="module")
def sample(case):
    """All queries of all blocks."""
    return Sample.of(case, CONFIG, 8, 128, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("budget", [0.1, 0.3])
def test_whole_weights_give_the_plans_output(case, sample, budget):
    levels = build_plan(*case.inputs, PSAConfig(compute_budget=budget), grid=GRID).level_mask[0]
    chosen = sample.of_rows(levels[None])[0]
    weights = torch.stack([(chosen == 5 - rung).float() for rung in range(5)], 1)
    error = harness.errors(case, budget_rule(CONFIG)(case, budget))["error"]
    assert float(sample.lost(weights).sqrt()) == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_the_price_is_that_at_which_the_expected_cost_is_the_budget(sample, temperature):
    errors = sample.features[..., -1].requires_grad_(True)
    price, costs = price_at(errors, 0.15, 64, temperature)
    weights = rung_weights(errors, price, costs, temperature)
    cost = (weights * costs.view(-1, 1, 1, 1)).sum(0).mean() / 64
    assert float(cost.detach()) == pytest.approx(0.15, rel=1e-3)
    # It moves with the errors so that the cost stays: no error can fall by spending more.
    (gradient,) = torch.autograd.grad(cost, errors)
    assert float(gradient.abs().max()) < 1e-5


def test_a_factor_that_all_errors_have_changes_nothing(sample):
    errors, factor = sample.features[..., -1], torch.zeros(1, requires_grad=True)
    price, costs = price_at(errors + factor, 0.15, 64, 2.0)
    weights = rung_weights(errors + factor, price, costs, 2.0)
    (slope,) = torch.autograd.grad(sample.lost(sample.of_rows(weights).transpose(0, 1)).log(), factor)
    assert abs(float(slope)) < 1e-3


def test_a_new_correction_is_the_rule_itself_and_leaves_planning_as_it_was(case):
    before = build.pair_errors
    for hidden in (0, 8):
        own = rule_of(Correction(hidden))(case, 0.2)
        assert torch.equal(own.output, budget_rule(CONFIG)(case, 0.2).output)
    assert build.pair_errors is before and observe(case, CONFIG).shape == (
        4,
        1,
        2,
        8,
        16,
        len(learned_rule.FEATURES),
    )


def test_the_first_order_errors_are_the_oracles(case, sample):
    import oracle

    plan = build_plan(*case.inputs, PSAConfig(), grid=GRID)
    exact = oracle.exact_errors(case, plan)[:, 0]
    torch.testing.assert_close(sample.exact, sample.of_rows(exact), rtol=1e-3, atol=1e-9)


def test_the_script_trains_on_some_prompts_and_reports_on_the_others(tmp_path):
    for prompt in range(2):
        tensors = zip(("query", "key", "value"), video_like_qkv(1, GRID, 2, 16, seed=prompt), strict=True)
        call = {**dict(tensors), "grid": GRID, "step": 2, "layer": 0, "prompt": "a red circle"}
        torch.save([call], tmp_path / f"prompt{prompt}.pt")
    spec = importlib.util.spec_from_file_location("learned_levels", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    small = ["--train", "1", "--epochs", "2", "--blocks", "4", "--queries", "4", "--budgets", "0.2", "--seeds", "0"]
    script.main(["--captures", str(tmp_path), "--output", str(tmp_path / "out"), *small])
    with (tmp_path / "out" / "learned_levels_summary.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert {row["part"] for row in table} == {"seen", "unseen"}
    assert {row["policy"] for row in table} == {"budget rule", *script.VARIANTS}
    assert {float(row["ratio"]) for row in table if row["policy"] == "budget rule"} == {1.0}
    linear = next(row for row in table if (row["part"], row["policy"]) == ("seen", "linear"))
    assert float(linear["ratio"]) < 1.02 and abs(float(linear["compute_budget"]) - 0.2) < 0.01
    assert (tmp_path / "out" / "learned_levels.png").stat().st_size > 1000
