"""The guards: each known sign of lost quality or time is counted where it is, and only there."""

from __future__ import annotations

import logging

import pytest
import torch

from psa_diffusers import PSAConfig
from psa_diffusers.integration import enable_psa, guards, operations, psa_statistics
from psa_diffusers.integration.guards import coarse_calls, early_sparse_steps, early_warning
from psa_diffusers.integration.statistics import PSAStatistics

from .tiny_wan import LAYERS, full_plan, generate, pipeline, tiny_config


def counts(*pairs):
    """Block pairs by level, from level 0 (skipped), of 1 sample and 2 heads."""
    return torch.tensor(pairs)[:, None, None].expand(-1, 1, 2)


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (counts(0, 9, 0, 91), 1),  # 91 % at the coarsest
        (counts(0, 10, 0, 90), 0),
        (counts(0, 0, 100, 0), 1),  # the coarsest that was used
        (counts(900, 5, 6, 89), 0),  # what is skipped is not read
        (counts(50, 50, 0, 0), 0),  # in full, or not at all
        (counts(100, 0, 0, 0), 0),
    ],
)
def test_calls_at_the_coarsest_level(call, found):
    assert coarse_calls([call]) == found
    assert coarse_calls([call] * 3 + [counts(0, 50, 0, 50)]) == 3 * found


def test_early_sparse_steps():
    steps = [(0, 8, "dense"), (1, 8, "sparse"), (2, 8, "sparse"), (3, 8, "dense")]
    assert early_sparse_steps(steps) == 1
    assert early_sparse_steps([(1, 5, "sparse")]) == 1  # a quarter of 5 steps ends inside step 1
    assert early_sparse_steps([(2, 5, "sparse"), (0, 5, "skipped")]) == 0


def test_early_warning():
    assert early_warning(PSAConfig(), 50) is None
    assert "begins in step 5 of 50. Before step 13" in early_warning(PSAConfig(dense_warmup=0.1), 50)
    assert early_warning(PSAConfig(dense_warmup=0.0), 3) is None
    assert early_warning(PSAConfig(dense_warmup=0.0), 4) is not None


def run_statistics(**settings):
    pipe = enable_psa(pipeline(), tiny_config(**settings))
    generate(pipe, steps=8)
    return psa_statistics(pipe)


def test_a_run_counts_sparse_steps_in_its_first_quarter(recorder, caplog):
    caplog.set_level(logging.WARNING, logger="diffusers")
    logging.getLogger("diffusers").propagate = True
    try:
        pipe = enable_psa(pipeline(), tiny_config(dense_warmup=0.0))
        for _ in range(2):  # one warning, however many runs
            generate(pipe, steps=8)
        found = psa_statistics(pipe).warnings
    finally:
        logging.getLogger("diffusers").propagate = False
    assert found[guards.EARLY_STEPS] == 2
    assert sum("begins in step 0 of 8" in record.getMessage() for record in caplog.records) == 1
    assert guards.EARLY_STEPS not in run_statistics().warnings


def test_a_run_counts_calls_at_the_coarsest_level(recorder, monkeypatch):
    def coarse_layer(query, key, value, config, **options):
        plan = full_plan(query, key, value, config)
        plan.level_mask.fill_(3 if next(call) % LAYERS else 1)
        return plan

    call = iter(range(1000))
    monkeypatch.setattr(operations, "build_plan", coarse_layer)
    assert run_statistics().warnings[guards.COARSEST] == 6 * 2 * (LAYERS - 1)


def test_planning_that_takes_longer_than_attending(recorder):
    statistics = PSAStatistics()
    plan = full_plan(*(torch.ones(1, 18, 2, 4),) * 3, tiny_config())
    for planning, attending in [(0.5, 2.0), (2.0, 0.5), (3.0, 0.5)]:  # 1 second is the mean
        statistics._last = {"planning": planning, "attention": attending}
        statistics._seconds["attention"] += attending
        statistics.count_sparse(plan)
    assert statistics.warnings == {guards.PLANNING: 2}
    assert statistics.to_dict()["warnings"] == {guards.PLANNING: 2}


def test_nothing_to_warn_of():
    assert PSAStatistics().warnings == {}
