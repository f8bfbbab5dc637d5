"""Comparison at equal compute budgets: the factors hit their targets, and the script measures, resumes and reports."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from psa_diffusers import PSAConfig, build_plan
from psa_diffusers.report.equal_budget import BUDGET_RULE, METHODS, SCALED, calibrate, find_factor, scaled_config

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "quality.py"


@pytest.fixture(scope="module")
def calls():
    generator = torch.Generator().manual_seed(0)
    tensors = [tuple(torch.randn(1, 2048, 2, 32, generator=generator) for _ in range(3)) for _ in range(2)]
    return [lambda config, qkv=qkv: build_plan(*qkv, config, grid=(8, 16, 16)).compute_budget for qkv in tensors]


@pytest.mark.parametrize("target", [0.15, 0.25])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_reaches_the_budget_and_hardly_more(method, target, calls):
    config = calibrate(method, target, PSAConfig(), calls)
    achieved = sum(call(config) for call in calls) / len(calls)
    one_block = 1 / 32  # of a row: as far as a share of the row can be off
    assert target * 0.98 <= achieved <= target + one_block


@pytest.mark.parametrize("method", SCALED)
def test_methods_differ_in_the_rule_alone(method):
    base = PSAConfig(kv_block_size=32, importance="pooled", order="raster", dense_warmup=0.5)
    config = scaled_config(method, 0.5, base)
    own = {"rule", "compute_budget", "logit_correction", "value_correction", "level_thresholds", "level_fractions"}
    same = {name: value for name, value in base.to_dict().items() if name not in own}
    assert {name: value for name, value in config.to_dict().items() if name not in own} == same
    assert scaled_config(method, 1.0, PSAConfig()).rule == SCALED[method][0]


def test_binary_methods_know_only_full_and_skip(calls):
    for method in ("binary, top-k", "binary, threshold"):
        config = calibrate(method, 0.25, PSAConfig(), calls)
        q, k, v = (torch.randn(1, 1024, 2, 32, generator=torch.Generator().manual_seed(1)) for _ in range(3))
        assert set(build_plan(q, k, v, config, grid=(4, 16, 16)).level_mask.unique().tolist()) <= {0, 1}


def test_bisection_finds_the_smallest_factor_and_refuses_the_impossible():
    assert find_factor(lambda factor: factor / 2, 0.3, high=1.0) == pytest.approx(0.6, abs=1e-4)
    assert find_factor(lambda factor: round(factor, 1), 0.25, high=1.0) == pytest.approx(0.25, abs=1e-4)
    with pytest.raises(ValueError, match=r"reaches compute budget 0\.9"):
        find_factor(lambda factor: factor / 2, 0.9, high=1.0)
    with pytest.raises(ValueError, match="method must be one of"):
        scaled_config("guessing", 1.0, PSAConfig())


@pytest.fixture(scope="module")
def quality():
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("quality", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["quality"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["quality"]


def test_the_script_measures_resumes_and_reports(quality, saved_model, tmp_path, monkeypatch):
    file, output = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("# shape\tprompt\ncircle\ta red circle\nsquare\ta blue square\nball\ta red ball\n")
    monkeypatch.setattr(sys, "argv", ["scripts/quality.py", "--output", str(output)])

    def run(limit):
        quality.main(
            **{"output": output, "model": str(saved_model), "prompts_file": file, "limit": limit},
            **{"steps": 2, "every": 1, "budget": [0.3], "method": [BUDGET_RULE, "binary, top-k"], "quiet": True},
        )
        with (output / "quality.csv").open(newline="") as lines:
            return list(csv.DictReader(lines)), json.loads((output / "quality.json").read_text())

    rows, facts = run(limit=1)
    assert [(row["prompt"], row["method"]) for row in rows] == [
        ("a red circle", BUDGET_RULE),
        ("a red circle", "binary, top-k"),
    ]
    assert facts["prompts"] == ["a red circle"]
    assert "quality.py" in facts["command"] and facts["versions"]["torch"]
    for row, line in zip(rows, facts["table"], strict=True):
        assert float(row["psnr"]) == line["psnr"] and float(row["achieved"]) == line["achieved"] > 0.2
    assert facts["table"][0]["default_ahead_db"] == 0

    again, facts = run(limit=2)
    assert again[:2] == rows and [row["prompt"] for row in again[2:]] == ["a blue square"] * 2
    assert [line["prompts"] for line in facts["table"]] == [2, 2]
    assert len((output / "quality.md").read_text().splitlines()) == 4
