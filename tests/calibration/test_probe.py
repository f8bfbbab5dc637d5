"""A probe measures what the whole call would: exactly where it takes all blocks, and nearly with some of them.

With the logit correction it is near with all of them too: what the head's mean query is, the probed ones say.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from psa_diffusers import PSAConfig, pyramid_sparse_attention
from psa_diffusers.calibration import can_probe, candidate_budgets, probe, probe_call
from psa_diffusers.integration import operations
from psa_diffusers.synthetic import video_like_qkv

GRID = (4, 8, 16)
SETTINGS = [
    {},
    {"order": "raster"},
    {"value_correction": "fitted"},
    {"value_correction": "none"},
    {"query_block_size": 64, "backend": "reference"},
]


def measure(inputs, config, budgets, **where):
    do = {"build_plan": operations.build_plan, "attend": operations.attend}
    return probe_call(*inputs, config, budgets, scale=None, **do, **where)


def dense(query, key, value, mask=None):
    heads_first = (x.transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2).double()


@pytest.fixture
def all_blocks(monkeypatch):
    """Every block of queries is measured."""
    monkeypatch.setattr(probe, "chosen_blocks", lambda whole: list(range(whole)))


@pytest.mark.parametrize("settings", SETTINGS)
def test_of_all_blocks_it_is_the_error_of_the_call(settings, all_blocks):
    inputs = video_like_qkv(2, GRID, 3, 32, seed=0)
    config, budgets = PSAConfig(**settings, logit_correction="none"), (0.05, 0.15, 0.4)
    found = measure(inputs, config, budgets, grid=GRID)
    expected = dense(*inputs)
    torch.testing.assert_close(found.power, expected.square().sum((1, 3)))
    for lost, budget in zip(found.lost, budgets, strict=True):
        output = pyramid_sparse_attention(*inputs, dataclasses.replace(config, compute_budget=budget), grid=GRID)
        torch.testing.assert_close(lost, (output - expected).square().sum((1, 3)), rtol=2e-4, atol=1e-9)


def test_with_padded_text_at_the_end(all_blocks):
    inputs = video_like_qkv(2, GRID, 2, 32, seed=1)
    inputs = tuple(
        torch.cat([x, torch.randn(2, 128, 2, 32, generator=torch.Generator().manual_seed(2))], 1) for x in inputs
    )
    lengths = torch.tensor([512 + 100, 512 + 7])
    where = {"grid": GRID, "full_tokens": slice(512, 640), "key_lengths": lengths}
    config = PSAConfig(compute_budget=0.4, logit_correction="none")
    found = measure(inputs, config, (0.4,), **where)
    mask = (torch.arange(640) < lengths[:, None])[:, None, None, :]
    expected = dense(*inputs, mask)
    output = pyramid_sparse_attention(*inputs, config, **where)
    torch.testing.assert_close(found.lost[0], (output - expected).square().sum((1, 3)), rtol=2e-4, atol=1e-9)


def test_of_some_blocks_it_is_near():
    grid = (8, 16, 32)
    inputs = video_like_qkv(1, grid, 2, 32, seed=0)
    found = measure(inputs, PSAConfig(), (0.1,), grid=grid)
    expected = dense(*inputs)
    output = pyramid_sparse_attention(*inputs, PSAConfig(compute_budget=0.1), grid=grid)
    whole = float((output - expected).norm() / expected.norm())
    part = float((found.lost.sum() / found.power.sum()).sqrt())
    assert part == pytest.approx(whole, rel=0.15)


def test_it_takes_an_eighth_of_the_blocks_at_most_and_at_least_one():
    assert probe.chosen_blocks(1) == [0] and probe.chosen_blocks(7) == [3]
    assert probe.chosen_blocks(16) == [4, 12]
    assert len(probe.chosen_blocks(1000)) == probe.BLOCKS and max(probe.chosen_blocks(1000)) < 1000


def test_candidates_are_budgets_that_a_plan_can_have():
    assert candidate_budgets(0.16, 64) == pytest.approx((0.04, 0.08, 0.16, 0.32, 0.64))
    assert candidate_budgets(0.02, 64)[0] == 1 / 64 and max(candidate_budgets(0.5, 64)) < 1


def test_what_padding_it_takes():
    lengths = torch.tensor([3])
    assert can_probe(None, None) and can_probe(slice(0, 4), None) and can_probe(None, lengths)
    assert can_probe(slice(8, 12), lengths)
    assert not can_probe(slice(0, 4), lengths) and not can_probe(torch.ones(4, dtype=torch.bool), lengths)
