"""The experiments on calibrated budgets: a row a prompt and setting, paired with one budget, at the wanted compute."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "experiments"))
SMALL = {"steps": 2, "num_frames": 9, "height": 128, "width": 128, "device": "cpu", "dtype": "float32"}


def run(name, folder, monkeypatch, **options):
    script = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"scripts/experiments/{name}.py"])
    script.main(folder, **SMALL, **options)
    with (folder / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file)), json.loads((folder / f"{name}.json").read_text())


def test_calibrated_budgets_are_compared_with_one_budget(tmp_path, monkeypatch):
    rows, facts = run(
        "calibration", tmp_path, monkeypatch, tuning=1, selecting=0, reported=1, budget=[0.3], least=[2.0]
    )
    assert [row["setting"] for row in rows] == ["one budget", "in the run", "tuned, 2"]
    assert all(float(row["compute_budget"]) == pytest.approx(0.3, abs=0.05) for row in rows)
    assert facts["table"][0]["ahead_db"]["value"] == 0
    assert (tmp_path / "calibration.png").stat().st_size > 1000


def test_a_total_error_is_measured_in_every_run(tmp_path, monkeypatch):
    rows, facts = run("total_error", tmp_path, monkeypatch, tuning_prompts=1, reported=1, target=[0.1])
    assert [row["setting"] for row in rows] == ["tuned", "in the run", "one budget"]
    assert all(0 < float(row["total_error"]) < 0.5 for row in rows)
    tuned, _, uniform = (float(row["compute_budget"]) for row in rows)
    assert 0.015 < tuned <= 1 and 0.015 < uniform <= 1
    assert facts["tuned"]["0.1"]["target_error"] == 0.1 and facts["table"][0]["mean_ratio"] > 0
    assert (tmp_path / "total_error.png").stat().st_size > 1000
