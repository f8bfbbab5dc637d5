"""What levels cost and lose, and where attention goes."""

import pytest
import torch

from psa_diffusers import PSAConfig
from psa_diffusers.report.block_mass import exact_mass, sampled_mass
from psa_diffusers.report.level_losses import THE_PLAN, level_losses, level_name, level_shares, uniform_plan

from ..integration.tiny_wan import tiny_config

SMALL = tiny_config(num_levels=3, kv_block_size=8, compute_budget=0.4)


def test_names_of_levels():
    assert [level_name(level, 4) for level in range(6)] == ["skip", "full", "2x", "4x", "8x", "centroid"]
    with pytest.raises(ValueError, match="level must be in"):
        level_name(6, 4)


def test_shares_add_up_and_are_those_of_the_mask(call):
    plan = call.plan(SMALL)
    shares = level_shares(plan)
    assert list(shares) == ["full", "2x", "4x", "centroid", "skip"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["full"] == pytest.approx((plan.level_mask == 1).double().mean().item())
    costs = {"full": 1, "2x": 1 / 2, "4x": 1 / 4, "centroid": 1 / 8, "skip": 0}
    assert sum(costs[name] * share for name, share in shares.items()) == pytest.approx(plan.compute_budget)
    one = level_shares(plan, head=1)
    assert one["full"] == pytest.approx((plan.level_mask[0, 1] == 1).double().mean().item())


def test_a_uniform_plan_costs_what_its_level_costs(call):
    plan = call.plan(SMALL)
    budgets = [uniform_plan(plan, level).compute_budget for level in range(5)]
    assert budgets == [0, 1, 1 / 2, 1 / 4, 1 / 8]
    with pytest.raises(ValueError, match="level must be in"):
        uniform_plan(plan, 5)


def test_coarser_levels_cost_less_and_lose_more(call):
    losses = {loss.reading: loss for loss in level_losses(call, SMALL)}
    assert list(losses) == ["full", "2x", "4x", "centroid", THE_PLAN]
    assert losses["full"].error < 1e-5 and losses["full"].corrected < 1e-5
    for finer, coarser in (("full", "2x"), ("2x", "4x"), ("4x", "centroid")):
        assert losses[finer].error < losses[coarser].error
        assert losses[finer].compute_budget > losses[coarser].compute_budget
    assert losses[THE_PLAN].error < losses["centroid"].error
    assert losses[THE_PLAN].compute_budget == pytest.approx(0.4, abs=0.01)


def test_other_rules_have_no_value_correction_to_show(call):
    with pytest.raises(ValueError, match="rule='budget'"):
        level_losses(call, PSAConfig.preset("psa-3"))


def test_mass_is_that_of_dense_attention(call):
    mass = exact_mass(call, SMALL, head=1)
    assert mass.shape == (15, 15)
    torch.testing.assert_close(mass.sum(1), torch.ones(15))
    order = call.plan(SMALL).order
    query, key = (tensor[0, order, 1].double() for tensor in (call.query, call.key))
    shares = torch.softmax(query @ key.T * 12**-0.5, dim=-1)
    torch.testing.assert_close(mass[3, 5].double(), shares[24:32, 40:48].sum(1).mean(), rtol=1e-4, atol=1e-7)


def test_all_samples_give_the_mass_itself(call):
    everything = tiny_config(num_levels=3, kv_block_size=8, sampled_queries=8, sampled_keys=8)
    torch.testing.assert_close(sampled_mass(call, everything, head=1), exact_mass(call, everything, head=1))
    few = tiny_config(num_levels=3, kv_block_size=8, sampled_queries=2, sampled_keys=2)
    assert not torch.allclose(sampled_mass(call, few), exact_mass(call, few), rtol=1e-3)
    with pytest.raises(ValueError, match="importance='sampled'"):
        sampled_mass(call, tiny_config(importance="pooled"))
