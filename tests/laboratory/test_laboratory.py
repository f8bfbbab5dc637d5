"""The laboratory: every policy keeps to its budget and is dense attention at budget 1; its pieces do what they say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "laboratory"))

import cluster_policies
import equal_compute
import harness
import oracle
import policies
import static_policies
from block_policies import attend
from cases import Case

from psa_diffusers import PSAConfig, build_plan
from psa_diffusers.synthetic import video_like_qkv

GRID = (4, 16, 16)
EVERY = {
    **{f"published {name}": policy for name, policy in policies.published().items()},
    **{f"{family}: {name}": policy for family, group in policies.families().items() for name, policy in group.items()},
}
# One of each family, and what differs in kind.
CHOSEN = [name for name in EVERY if name.startswith("published")] + [
    next(name for name in EVERY if name.startswith(family)) for family in policies.families()
]
CHOSEN += [name for name in EVERY if "similarity 0.5, gilbert" in name or "7 windows" in name or "sink True" in name]


@pytest.fixture(scope="module")
def case():
    return Case("small", "synthetic", *video_like_qkv(1, GRID, 2, 16, seed=5, position=0.3), GRID)


@pytest.mark.parametrize("name", CHOSEN)
def test_policies_keep_to_the_budget(case, name):
    result = EVERY[name](case, 0.2)
    assert 0.17 <= result.compute_budget <= 0.2 + 1 / 128  # a pair more: 8 x 16 block pairs a head
    assert result.output.shape == case.query.shape and result.output.isfinite().all()
    assert 0 < harness.errors(case, result)["error"] < 1.5


# A quantile of presets that never read in full, and thresholds that stop at a share, are not dense at budget 1.
DENSE = [name for name in CHOSEN if "PSA" not in name]


@pytest.mark.parametrize("name", DENSE)
def test_at_budget_1_they_are_dense_attention(case, name):
    assert harness.errors(case, EVERY[name](case, 1.0))["error"] < 1e-3


def test_ranked_levels_meet_any_budget_by_rounding_rows_in_turn():
    score = torch.rand(1, 4, 32, 50, generator=torch.Generator().manual_seed(0))
    for budget in (0.05, 0.113, 0.27):
        levels = equal_compute.shares_at(score, (0.15, 0.10, 0.20, 0.0), budget)
        assert float(equal_compute.mean_cost(levels, 64, 4)) == pytest.approx(budget, rel=0.02)
        kept = (levels == 1).sum(-1)
        assert int(kept.max() - kept.min()) <= 1
        best = score.argmax(-1, keepdim=True)
        assert (levels.gather(-1, best) == 1).all()


def test_lowest_pairs_are_the_lowest():
    priority = torch.rand(20, 40, generator=torch.Generator().manual_seed(1))
    kept = equal_compute.lowest_pairs(priority, 0.25) > 0
    assert int(kept.sum()) == 200 and kept.any(1).all()
    outside = priority[~kept].min()
    assert (priority[kept] > outside).sum() <= 20  # but for the rows' own best


def test_tile_order_fills_blocks_with_tiles():
    order = static_policies.tile_order((5, 16, 16), (4, 4, 4))
    assert torch.equal(order.sort().values, torch.arange(5 * 256))
    frame, rest = order[:64] // 256, order[:64] % 256
    assert frame.unique().tolist() == [0, 1, 2, 3]
    assert (rest // 16).unique().tolist() == [0, 1, 2, 3] and (rest % 16).unique().tolist() == [0, 1, 2, 3]
    assert (order[1024:] // 256 == 4).all()  # what the frames leave over is last
    with pytest.raises(ValueError, match="not whole tiles"):
        static_policies.tile_order((4, 10, 16), (4, 4, 4))


def test_kmeans_finds_clusters_that_are_there():
    centres = 10 * torch.eye(4, 8)
    truth = torch.arange(200) % 4
    tokens = centres[truth] + 0.1 * torch.randn(200, 8, generator=torch.Generator().manual_seed(2))
    # As many starts as it takes for one in each; a start is drawn from the seed alone.
    found = [cluster_policies.kmeans(tokens, 4, seed=seed) for seed in range(8)]
    assert any(len({(int(a), int(b)) for a, b in zip(truth, label, strict=True)}) == 4 for label in found)


def test_exact_errors_are_those_of_the_output(case):
    """Of a plan that is full but for one pair, to first order."""
    plan = build_plan(*case.inputs, PSAConfig(compute_budget=0.2), grid=GRID)
    exact = oracle.exact_errors(case, plan)
    for level in (2, 4, 5):
        levels = torch.ones_like(plan.level_mask)
        levels[0, 1, 3, 5] = level
        config = PSAConfig(logit_correction="none", value_correction="none")
        found = attend(case, equal_compute.make_plan(case, config, levels, plan.order), config, 0.0)
        lost = (found.output - case.dense)[0, :, 1].square().sum() / 128 / case.dense[0, :, 1].square().sum(-1).mean()
        # The mass that the pair loses changes the denominator too, by second order.
        assert float(exact[level - 2, 0, 1, 3, 5]) == pytest.approx(float(lost), rel=0.1)
