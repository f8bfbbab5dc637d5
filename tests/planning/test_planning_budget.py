import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_diffusers.planning.budget import Limits, rung_costs, spend, step_prices

BLOCK = 64


def random_errors(*shape, num_levels=4, seed=0, monotone=True):
    """[num_levels, batch, heads, query_blocks, kv_blocks] over many orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    errors = torch.rand(num_levels, *shape, generator=generator)
    if monotone:
        errors = errors.cumsum(0)
    return errors * torch.exp(6 * torch.randn(shape, generator=generator))


def plan(errors, budget, limits=None, block=BLOCK):
    limits = Limits() if limits is None else limits
    return spend(step_prices(errors, block, limits.cap), budget, block, limits)


def costs_of(levels, num_levels=4, block=BLOCK):
    table = torch.tensor([0.0] + [2.0 ** -(level - 1) for level in range(1, num_levels + 1)] + [1 / block]).double()
    return table[levels.long()]


def error_of(levels, errors):
    padded = torch.cat([torch.zeros_like(errors[:1]), errors]).double()
    return padded.gather(0, levels[None].long() - 1)[0]


def test_rung_costs():
    assert rung_costs(64, 4) == [1, 8, 16, 32, 64]
    assert rung_costs(128, 1) == [1, 128]


def test_prices_are_the_slopes_of_the_hull():
    # Errors of levels 2, 3, 4, centroid; costs 1/64 (centroid), 1/8, 1/4, 1/2, 1 in units of 1/64: 1, 8, 16, 32, 64.
    errors = torch.tensor([32.0, 48.0 + 16.0, 96.0, 236.0]).view(4, 1, 1, 1, 1)
    prices = step_prices(errors, BLOCK).flatten()
    slopes = torch.tensor([(236 - 96) / 7, (96 - 64) / 8, (64 - 32) / 16, 32 / 32])
    assert prices.tolist() == [int(slope.view(torch.int32) >> 16) for slope in slopes]


def test_a_level_above_the_hull_is_stepped_over():
    # Level 4 hardly better than the centroid, so that level 3 comes first: both steps have the price of the line.
    errors = torch.tensor([10.0, 20.0, 99.0, 100.0]).view(4, 1, 1, 1, 1)
    prices = step_prices(errors, BLOCK).flatten().tolist()
    line = torch.tensor((100 - 20) / 15)
    assert prices[0] == prices[1] == int(line.view(torch.int32) >> 16)
    assert prices == sorted(prices, reverse=True)


@given(st.integers(0, 10_000), st.sampled_from([0.02, 0.05, 0.15, 0.25, 0.5, 0.9, 1.0]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_budget_is_met_from_both_sides(seed, budget, monotone):
    levels = plan(random_errors(2, 2, 16, 32, seed=seed, monotone=monotone), budget)
    assert int(levels.min()) >= 1
    assert int(levels.max()) <= 5
    for sample in levels:
        assert abs(float(costs_of(sample).mean()) - budget) <= max(0.02 * budget, 0.5 / sample.numel())


def test_budget_one_is_dense_and_the_least_is_all_centroids():
    errors = random_errors(1, 2, 8, 16)
    assert bool((plan(errors, 1.0) == 1).all())
    assert bool((plan(errors, 1 / BLOCK) == 5).all())
    assert bool((plan(torch.zeros_like(errors), 1.0) == 1).all())


@given(st.integers(0, 1000), st.tuples(st.floats(1 / 64, 1.0), st.floats(1 / 64, 1.0)))
@settings(max_examples=40, deadline=None)
def test_more_budget_never_coarsens_a_pair(seed, budgets):
    errors = random_errors(1, 2, 6, 10, seed=seed)
    less, more = (plan(errors, budget) for budget in sorted(budgets))
    assert bool((more <= less).all())


def test_least_error_for_its_cost_against_every_plan():
    # All 5 ** 4 plans of 4 pairs: none that costs no more may have less error, when the plan lies on the hull.
    for seed in range(20):
        errors = random_errors(1, 1, 2, 2, seed=seed)
        for budget in (0.1, 0.2, 0.4):
            levels = plan(errors, budget)
            cost, error = float(costs_of(levels).sum()), float(error_of(levels, errors).sum())
            for choice in itertools.product(range(1, 6), repeat=4):
                other = torch.tensor(choice, dtype=torch.int8).view(1, 1, 2, 2)
                if float(costs_of(other).sum()) > cost - 1:  # the last step taken may be off by its bin or its pair
                    continue
                assert float(error_of(other, errors).sum()) >= error * (1 - 1e-6)


def test_close_to_the_exact_lagrangian_choice():
    errors = random_errors(1, 4, 16, 32, seed=3)
    levels = plan(errors, 0.15)
    cost, error = float(costs_of(levels).mean()), float(error_of(levels, errors).sum())
    candidates = torch.cat([torch.zeros_like(errors[:1]), errors]).double()
    costs = torch.tensor([1.0, 0.5, 0.25, 0.125, 1 / 64]).double().view(5, 1, 1, 1, 1)
    low, high = 1e-30, 1e30
    for _ in range(200):
        middle = (low * high) ** 0.5
        chosen = (candidates + middle * costs).argmin(0)
        low, high = (low, middle) if costs.flatten()[chosen].mean() < cost else (middle, high)
    exact = float(candidates.gather(0, chosen[None]).sum())
    assert abs(float(costs.flatten()[chosen].mean()) - cost) < 1e-3
    assert error <= 1.02 * exact


def test_heads_share_one_price_and_samples_do_not():
    errors = random_errors(2, 2, 8, 16)
    errors[:, :, 1] *= 1e6  # the second head needs more
    errors[:, 1] *= 1e9  # and the second sample as a whole, which must not take from the first
    levels = plan(errors, 0.2)
    per_head = costs_of(levels).mean((2, 3))
    assert bool((per_head[:, 1] > per_head[:, 0]).all())
    for sample in range(2):
        assert torch.equal(plan(errors[:, sample : sample + 1], 0.2)[0], levels[sample])


def test_ties_are_filled_in_index_order():
    levels = plan(torch.ones(4, 1, 2, 4, 8), 0.4).flatten()
    changes = levels.diff().ne(0).sum()
    assert int(changes) <= 2  # finer pairs, then at most one between, then coarser ones
    assert bool((levels.diff() >= 0).all())


@given(st.integers(0, 1000), st.sampled_from([0.05, 0.15, 0.5]))
@settings(max_examples=30, deadline=None)
def test_cap_holds_and_the_budget_too(seed, budget):
    generator = torch.Generator().manual_seed(seed)
    cap = torch.randint(1, 5, (1, 2, 32), generator=generator, dtype=torch.int8)
    errors = random_errors(1, 2, 16, 32, seed=seed)
    levels = plan(errors, budget, Limits(cap=cap))
    assert bool(((levels <= cap[:, :, None, :]) | (levels == 5)).all())
    assert abs(float(costs_of(levels).mean()) - budget) <= max(0.02 * budget, 0.5 / levels.numel())


def test_full_pairs_are_level_one_and_paid_for():
    full = torch.zeros(8, 16, dtype=torch.bool)
    full[:, -1] = True
    full[-1] = True
    errors = random_errors(1, 4, 8, 16)
    levels = plan(errors, 0.3, Limits(full=full))
    assert bool((levels[:, :, full] == 1).all())
    assert abs(float(costs_of(levels).mean()) - 0.3) <= 0.5 / levels.numel()
    cheapest = plan(errors, 0.1, Limits(full=full))
    assert bool((cheapest[:, :, full] == 1).all())
    assert bool((cheapest[:, :, ~full] == 5).all())


def test_blocks_without_real_keys_are_skipped_and_cost_nothing():
    counted = torch.ones(3, 16, dtype=torch.bool)
    counted[0, 8:] = False
    counted[2] = False
    levels = plan(random_errors(3, 4, 8, 16), 0.2, Limits(counted=counted))
    assert not levels[0, :, :, 8:].any()
    assert not levels[2].any()
    assert abs(float(costs_of(levels[0, :, :, :8]).mean()) - 0.2) <= 0.5 / levels[0, :, :, :8].numel()
    assert abs(float(costs_of(levels[1]).mean()) - 0.2) <= 0.5 / levels[1].numel()


def test_errors_that_are_not_numbers_leave_the_rest_alone():
    errors = random_errors(1, 2, 8, 16)
    errors[:, 0, 0, 0] = float("nan")
    errors[:, 0, 0, 1] = float("inf")
    levels = plan(errors, 0.2)
    assert int(levels.min()) >= 1
    assert int(levels.max()) <= 5
    assert abs(float(costs_of(levels).mean()) - 0.2) <= 0.01


@pytest.mark.parametrize(("num_levels", "block"), [(1, 16), (2, 8), (5, 64), (6, 128)])
def test_other_ladders(num_levels, block):
    errors = random_errors(1, 2, 16, 32, num_levels=num_levels)
    levels = plan(errors, 0.25, block=block)
    assert int(levels.max()) <= num_levels + 1
    assert abs(float(costs_of(levels, num_levels, block).mean()) - 0.25) <= 0.02 * 0.25
