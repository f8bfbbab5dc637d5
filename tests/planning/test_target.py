"""A target error: what is left out errs no more than allowed, and the output's true error is near the target."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_diffusers import PSAConfig, build_plan, pyramid_sparse_attention
from psa_diffusers.backends.logit_variance import query_power
from psa_diffusers.planning.dispatch import choose_planner
from psa_diffusers.planning.target import FACTOR, POWER, room_for_error
from psa_diffusers.planning.value_gain import measure_row_errors, sampled_rows
from psa_diffusers.synthetic import video_like_qkv

GRID = (8, 8, 16)


def relative_error(inputs, output):
    """Root mean square over heads of each head's relative error, for each sample."""
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs)).transpose(1, 2).double()
    lost, power = (x.square().sum((1, 3)) for x in (output.double() - dense, dense))
    return (lost / power).mean(1).sqrt()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1e3)), min_size=1, max_size=12),
    st.integers(1, 9),
    st.floats(0.01, 0.9),
)
def test_as_much_is_left_out_as_the_target_allows(steps, rows, target):
    steps = sorted(steps, key=lambda step: step[1])
    spent = torch.tensor([[cost for cost, _ in steps]])
    prices = torch.tensor([price for _, price in steps], dtype=torch.float64)
    room = int(room_for_error(spent, prices, torch.tensor([rows]), target))
    allowed = (target / FACTOR) ** (2 / POWER) * rows
    left_out = [price for cost, price in steps for _ in range(cost)]  # a unit of cost each, cheapest first
    count = len(left_out) - room
    assert 0 <= count <= len(left_out)
    assert sum(left_out[:count]) <= allowed * (1 + 1e-6)
    if count < len(left_out):
        assert sum(left_out[: count + 1]) >= allowed * (1 - 1e-6)


@pytest.mark.parametrize("correction", ["covariance", "fitted", "none"])
@pytest.mark.parametrize("target", [0.05, 0.1, 0.2])
def test_the_error_is_near_the_target(target, correction):
    grid = (8, 16, 16)
    inputs = video_like_qkv(1, grid, 4, 32, seed=3, temperature=2.0)
    config = PSAConfig(target_error=target, value_correction=correction)
    plan = build_plan(*inputs, config, grid=grid)
    assert 1 / 64 < plan.compute_budget < 1
    error = float(relative_error(inputs, pyramid_sparse_attention(*inputs, config, plan=plan)))
    assert error == pytest.approx(target, rel=0.25)


def test_a_smaller_target_costs_more():
    inputs = video_like_qkv(1, (8, 16, 16), 4, 32, seed=0, temperature=2.0)
    targets = (0.02, 0.05, 0.1, 0.3)
    plans = [build_plan(*inputs, PSAConfig(target_error=target), grid=(8, 16, 16)) for target in targets]
    budgets = [plan.compute_budget for plan in plans]
    assert budgets == sorted(budgets, reverse=True) and len(set(budgets)) == 4


def test_a_target_that_nothing_misses_costs_a_centroid_a_block_and_one_that_nothing_meets_is_dense():
    inputs = video_like_qkv(1, GRID, 2, 32, seed=0, correlation=4.0, noise=0.0)
    assert build_plan(*inputs, PSAConfig(target_error=0.99), grid=GRID).compute_budget == pytest.approx(1 / 64)
    noise = tuple(torch.randn(1, 1024, 2, 32, generator=torch.Generator().manual_seed(i)) for i in range(3))
    assert build_plan(*noise, PSAConfig(target_error=1e-4), grid=GRID).compute_budget > 0.95


def test_a_samples_plan_does_not_depend_on_the_others():
    both = video_like_qkv(2, GRID, 2, 32, seed=0)
    config = PSAConfig(target_error=0.1)
    plan = build_plan(*both, config, grid=GRID)
    for sample in range(2):
        alone = build_plan(*(x[sample : sample + 1] for x in both), config, grid=GRID)
        assert torch.equal(alone.level_mask, plan.level_mask[sample : sample + 1])


def test_the_same_plan_again():
    inputs, config = video_like_qkv(1, GRID, 2, 32, seed=0), PSAConfig(target_error=0.1)
    first, second = (build_plan(*inputs, config, grid=GRID).level_mask for _ in range(2))
    assert torch.equal(first, second)


def test_padding_and_text_have_no_say():
    video = video_like_qkv(1, GRID, 2, 32, seed=0)
    text = torch.randn(1, 128, 2, 32, generator=torch.Generator().manual_seed(1))
    config = PSAConfig(target_error=0.1)
    where = {"grid": GRID, "full_tokens": slice(1024, 1152), "key_lengths": torch.tensor([1024 + 64])}
    plans = []
    for rest in (0.0, float("nan")):
        inputs = tuple(torch.cat([x, text], 1) for x in video)
        for x in inputs[1:]:
            x[:, 1024 + 64 :] = rest
        plans.append(build_plan(*inputs, config, **where))
    assert torch.equal(plans[0].level_mask, plans[1].level_mask)
    assert 1 / 64 < plans[0].compute_budget < 1


@pytest.mark.parametrize("correction", ["none", "variance"])
def test_the_error_of_rows_is_that_of_the_output(correction):
    inputs = video_like_qkv(2, GRID, 3, 32, seed=0)
    config = PSAConfig(compute_budget=0.1, logit_correction=correction, value_correction="none")
    plan = build_plan(*inputs, config, grid=GRID)
    sizes = {"query_block_size": 128, "kv_block_size": 64, "num_levels": 4, "scale": 32**-0.5}
    power = query_power(inputs[0], torch.float32) if correction == "variance" else None
    corrections = {"power": power, "value_correction": "none"}
    given = measure_row_errors(*inputs, plan.level_mask, plan.order, None, **corrections, seed=0, count=32, **sizes)
    rows = plan.order[sampled_rows(1024, 0, 32)]
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs)).transpose(1, 2)[:, rows]
    output = pyramid_sparse_attention(*inputs, config, plan=plan)[:, rows]
    expected = (output - dense).square().sum((1, 3)) / dense.square().sum((1, 3))
    torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-6)


def test_the_planning_kernels_leave_it_to_the_torch_planner_and_say_so():
    planner, reason = choose_planner(torch.empty(1, 128, 1, 32), 128, PSAConfig(target_error=0.1))
    assert planner == "torch" and "target_error=None alone, but it is 0.1" in reason
