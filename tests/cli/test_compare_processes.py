"""psa-compare in several processes, and the paper's protocol."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path

import pytest

from psa_diffusers import PSAConfig
from psa_diffusers.cli import comparison_job

from .test_generate_processes import Two, finish, start

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "paper_protocol.py"


def test_clips_are_shared_and_one_process_sums_up(saved_model, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na red ball\n")
    arguments = ["--prompts-file", tmp_path / "prompts.txt", "--model", saved_model, "--steps", 2]
    arguments += ["--output", tmp_path / "out", "--json"]
    code, printed, said = finish(start(*arguments, command="compare"))
    assert code == 0, said
    results = json.loads(printed)
    assert results == json.loads((tmp_path / "out" / "compare.json").read_text())
    assert results["processes"] == 2 and results["totals"][1]["clips"] == 3
    assert any("shared the CPU" in note for note in results["notes"])
    assert said.count("2 processes make 3 videos") == 1 and "2 of 2: 003-seed0" in said and "002-seed0" not in said
    words = shlex.split(results["command"])
    assert words[:5] == ["accelerate", "launch", "--multi_gpu", "--num_processes", "2"]
    assert words[5:7] == ["-m", "psa_diffusers.cli.compare"] and "--prompts-file" in words
    low = results["totals"][1]["psnr"]["low"]
    assert low <= results["totals"][1]["psnr"]["value"] <= results["totals"][1]["psnr"]["high"]


def test_a_device_for_each_process():
    with pytest.raises(comparison_job.WrongUsageError, match="--device cuda: leave it out"):
        comparison_job.own_device(Two(), ("cuda", None, "none"))


@pytest.fixture
def protocol():
    spec = importlib.util.spec_from_file_location("paper_protocol", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_protocol_is_the_papers(protocol, monkeypatch):
    model = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    words = protocol.arguments(["--model", model, "--width", "640"])
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert options["--height"] == "768" and options["--num-frames"] == "69" and options["--width"] == "640"
    names = options["--preset"].split(",")
    assert names == ["default", "psa-1", "psa-2", "psa-3", "psa-4", "psa-5", "psa-threshold"]
    assert {PSAConfig.preset(name).dense_warmup for name in names} == {0.25}
    assert "--height" not in protocol.arguments([])  # the bundled model has a size of its own
    monkeypatch.setattr(protocol.PSAConfig, "preset", lambda name: PSAConfig(dense_warmup=0.5))
    with pytest.raises(SystemExit, match=r"dense_warmup 0\.5, the protocol 0\.25"):
        protocol.arguments([])


def test_the_protocol_runs(protocol, saved_model, tmp_path):
    given = ["--model", saved_model, "--prompt", "a red circle", "--steps", 4, "--output", tmp_path / "out", "--quiet"]
    words = protocol.arguments([str(part) for part in given])
    assert protocol.run_command("psa-compare", protocol.app, words) == 0
    results = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [entry["setting"] for entry in results["totals"]][:3] == ["dense", "default", "psa-1"]
    assert len(results["totals"]) == 8
    dense_steps = [row["dense_steps"] for row in results["clips"] if row["setting"] != "dense"]
    assert dense_steps == [1] * 7  # of four
