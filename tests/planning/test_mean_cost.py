"""Plan.mean_cost counts level by level what the definition looks up pair by pair."""

import pytest
import torch

from psa_diffusers.planning.plan import Plan


@pytest.mark.parametrize("lengths", [None, [70, 3], [128, 1]])
@pytest.mark.parametrize("ordered", [False, True])
def test_mean_cost_is_the_mean_over_pairs_with_real_keys(lengths, ordered):
    generator = torch.Generator().manual_seed(0)
    plan = Plan(
        torch.randint(0, 6, (2, 3, 9, 8), generator=generator, dtype=torch.int8),
        query_length=70,
        key_length=128,
        query_block_size=8,
        kv_block_size=16,
        num_levels=4,
        order=torch.randperm(128, generator=generator) if ordered else None,
        key_lengths=None if lengths is None else torch.tensor(lengths),
    )
    costs, tokens = plan.level_costs()[plan.level_mask.long()], plan.order if ordered else torch.arange(128)
    real = torch.ones(2, 8, dtype=torch.bool)
    if lengths is not None:
        real = (tokens[None] < torch.tensor(lengths)[:, None]).view(2, 8, 16).any(-1)
    counted = real[:, None, None, :].expand_as(costs)
    assert plan.mean_cost().dtype == torch.float64
    assert float(plan.mean_cost()) == pytest.approx(float(costs[counted].mean()), rel=1e-12)
    assert plan.compute_budget == float(plan.mean_cost())
    assert plan.density == pytest.approx(float((plan.level_mask > 0)[counted].double().mean()), rel=1e-12)
