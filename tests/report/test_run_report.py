"""psa_report: by step, layer and head, and in sum what the statistics say."""

import pytest
import torch

from psa_diffusers import disable_psa, enable_psa
from psa_diffusers.integration import operations, psa_statistics
from psa_diffusers.report.run_report import psa_report

from ..integration.tiny_wan import LAYERS, generate, pipeline, tiny_config
from .conftest import LARGE

CALLS = 2 * LAYERS  # of a step, with guidance


@pytest.fixture
def plans(monkeypatch):
    """The plans that were used, in order."""
    made, build_plan = [], operations.build_plan

    def keeping(*args, **options):
        made.append(build_plan(*args, **options))
        return made[-1]

    monkeypatch.setattr(operations, "build_plan", keeping)
    return made


def test_levels_and_budgets_are_those_of_the_plans(plans):
    pipe = enable_psa(pipeline(), tiny_config(compute_budget=0.4))
    generate(pipe, **LARGE)
    report, statistics = psa_report(pipe), psa_statistics(pipe)
    assert set(report.calls) == {(step, layer) for step in range(4) for layer in range(LAYERS)}
    cond, uncond = plans[:CALLS:LAYERS]  # layer 0 of step 1
    for head in (0, 1):
        masks = torch.stack([plan.level_mask[0, head] for plan in (cond, uncond)])
        share = report.heads[(1, 0, head)]
        assert share.pairs == {
            "skip": int((masks == 0).sum()),
            "full": int((masks == 1).sum()),
            "2x": int((masks == 2).sum()),
            "centroid": int((masks == 3).sum()),
        }
        costs = torch.tensor([0, 1, 1 / 2, 1 / 4])
        assert share.compute_budget == pytest.approx(costs[masks.long()].mean().item())
    layers = report.rows("layer")
    assert [row["layer"] for row in layers] == list(range(LAYERS))
    mean = sum(row["compute_budget"] for row in layers) / LAYERS
    assert mean == pytest.approx(statistics.compute_budget_sparse)
    planned = sum(row["planning_ms"] for row in layers) / 1000
    assert planned == pytest.approx(statistics.planning_seconds) and planned > 0
    by_head = sum(row["planning_ms"] for row in report.rows("head")) / 1000
    assert by_head == pytest.approx(planned)


def test_dense_calls_come_with_step_layer_and_reason():
    pipe = enable_psa(pipeline(), tiny_config(dense_layers=(1,)))
    generate(pipe, **LARGE)
    report = psa_report(pipe)
    steps = report.rows("step")
    assert [(row["sparse"], row["dense"]) for row in steps] == [(0, CALLS)] + [(2, 2)] * 3
    assert steps[0]["compute_budget"] is None
    assert [row["why dense"] for row in steps] == [f"dense warm-up ({CALLS})"] + ["dense layer (2)"] * 3
    assert report.rows("layer")[1]["why dense"] == "dense warm-up (2), dense layer (6)"
    assert {row["layer"] for row in report.rows("head")} == {0}


def test_an_unknown_step_is_none():
    pipe = enable_psa(pipeline().transformer, tiny_config())
    with torch.no_grad():
        pipe(torch.ones(1, 16, 3, 4, 6), torch.tensor([1]), torch.ones(1, 8, 16))
    assert [row["step"] for row in psa_report(pipe).rows("step")] == [None]


def test_tables_and_pictures():
    pipe = enable_psa(pipeline(), tiny_config(compute_budget=0.4))
    generate(pipe, **LARGE)
    report = psa_report(pipe)
    header, first, *_ = report.table("step").splitlines()
    assert header.split()[:2] == ["step", "compute_budget"] and header.endswith("why dense")
    assert first.split()[:2] == ["0", "-"] and "dense warm-up" in first
    assert str(report) == report.table("layer") and len(str(report).splitlines()) == 1 + LAYERS
    picture = report.plot().axes[0].images[0].get_array()
    assert picture.shape == (LAYERS, 4) and (picture[:, 0] == 1).all() and picture[0, 1] == pytest.approx(0.4, abs=0.05)
    with pytest.raises(ValueError, match="one of step, layer, head"):
        report.rows("block")


def test_each_run_is_reported_alone_and_a_dense_pipeline_not_at_all():
    pipe = enable_psa(pipeline(), tiny_config())
    for _ in range(2):
        generate(pipe, **LARGE)
        assert sum(row["sparse"] for row in psa_report(pipe).rows("step")) == 3 * CALLS
    with pytest.raises(ValueError, match="not enabled"):
        psa_report(disable_psa(pipe))


def test_before_a_run_there_is_nothing_to_show():
    report = psa_report(enable_psa(pipeline(), tiny_config()))
    assert report.rows("step") == [] and report.table() == ""
    with pytest.raises(ValueError, match="there are no calls of known steps to show; run the pipeline first"):
        report.plot()


def test_padding_is_in_no_level():
    from psa_diffusers import build_plan

    qkv = torch.randn(3, 2, 64, 2, 8, generator=torch.Generator().manual_seed(0))
    plan = build_plan(*qkv, tiny_config(kv_block_size=8, num_levels=3), key_lengths=torch.tensor([64, 30]))
    counts = plan.level_counts()
    assert counts.shape == (5, 2, 2) and counts.sum(0).tolist() == [[64, 64], [32, 32]]
    costs = torch.tensor([0, 1, 1 / 2, 1 / 4, 1 / 8])[:, None, None]
    assert plan.compute_budget == pytest.approx(((counts * costs).sum() / counts.sum()).item())
