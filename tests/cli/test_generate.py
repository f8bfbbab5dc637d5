"""psa-generate from prompt to files, on a tiny random Wan model."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from psa_diffusers.cli import generation, pipeline
from psa_diffusers.metrics import read_video
from psa_diffusers.report.comparison import side_by_side

PROMPT = "a red circle moves left"


@pytest.fixture(scope="module")
def compared(saved_model, tmp_path_factory):
    """One run with --compare: its folder, its record and what it printed."""
    from psa_diffusers.cli.errors import run_command
    from psa_diffusers.cli.generate import app

    folder = tmp_path_factory.mktemp("compared") / "out"
    arguments = ["--prompt", PROMPT, "--model", str(saved_model), "--compare", "--output", str(folder), "--quiet"]
    assert run_command("psa-generate", app, arguments) == 0
    return folder, json.loads((folder / "run.json").read_text())


@pytest.fixture
def frames_made(monkeypatch):
    """Collects the frames of every pipeline call before they are encoded."""
    made = []
    real = generation.generate

    def watching(*arguments, **options):
        made.append(real(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(generation, "generate", watching)
    return made


def test_compare_writes_three_videos_and_the_record(compared):
    folder, record = compared
    assert sorted(file.name for file in folder.iterdir()) == ["dense.mp4", "run.json", "side_by_side.mp4", "video.mp4"]
    assert record["finished"] is True
    assert read_video(folder / "video.mp4").shape == read_video(folder / "dense.mp4").shape == (5, 64, 64, 3)
    both = read_video(folder / "side_by_side.mp4")
    assert both.shape[0] == 5 and both.shape[1] > 64 and both.shape[2] == 128


def test_the_record_is_complete(compared):
    _, record = compared
    assert record["config"]["compute_budget"] == 0.15
    assert record["dense_steps"] == 1 and record["sparse_steps"] == 3
    assert record["kinds_of_steps"] == ["dense", "sparse", "sparse", "sparse"]
    assert len(record["seconds_of_steps"]) == 4 and min(record["seconds_of_steps"]) > 0
    assert sum(record["seconds_of_steps"]) < record["seconds_total"]
    assert 0 < record["compute_budget_sparse_calls"] < record["compute_budget_all_calls"] < 1
    assert 0 < record["estimator_share"] < 1
    assert record["fallbacks"] == [] and record["dense_reasons"] == {"dense warm-up": 2}
    assert record["backend"] == "torch" and record["backend_reason"]
    assert record["device"] == "cpu" and record["dtype"] == "float32" and record["threads"] >= 1
    assert record["seed"] == 0 and record["steps"] == 4 and record["prompt"] == PROMPT
    assert len(record["model"]["weights_sha256"]) == 64
    assert record["command"].startswith(f"psa-generate --prompt '{PROMPT}'")
    assert {"psa_diffusers", "commit", "python", "torch", "triton", "diffusers"} <= set(record["versions"])


def test_the_comparison_is_complete(compared):
    _, record = compared
    assert 20 < record["psnr"] < 100 and 0.5 < record["ssim"] < 1 and record["identical"] is False
    assert record["lpips"] is None and record["lpips_reason"]
    assert record["speedup"] == record["dense_run"]["seconds_total"] / record["seconds_total"]
    dense = np.median(record["dense_run"]["seconds_of_steps"][1:])  # the steps that are sparse in the sparse run
    assert record["speedup_sparse_steps"] == pytest.approx(dense / record["seconds_per_sparse_step"])


def test_the_record_repeats_the_run_exactly(compared, psa_generate, frames_made, tmp_path):
    """From run.json alone: its config as a file, its settings as options, and the same frames come out."""
    folder, record = compared
    config = tmp_path / "config.json"
    config.write_text(json.dumps(record["config"]))
    settings = {
        "--prompt": record["prompt"],
        "--model": record["model"]["name"],
        "--config": config,
        "--output": tmp_path / "again",
        **{f"--{n}": record[n] for n in ("steps", "height", "width", "fps", "seed", "dtype", "device", "offload")},
        "--num-frames": record["num_frames"],
        "--guidance-scale": record["guidance_scale"],
    }
    assert psa_generate(*[part for pair in settings.items() for part in pair]).code == 0
    assert (tmp_path / "again" / "video.mp4").read_bytes() == (folder / "video.mp4").read_bytes()


def test_the_same_seed_gives_identical_frames_and_another_does_not(psa_generate, saved_model, frames_made, tmp_path):
    for number, seed in enumerate((3, 3, 4)):
        run = psa_generate(
            "--prompt", PROMPT, "--model", saved_model, "--seed", seed, "--output", tmp_path / str(number)
        )
        assert run.code == 0, run.err
    first, again, other = (made.frames for made in frames_made)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_dense_and_sparse_start_from_the_same_noise(psa_generate, saved_model, frames_made, tmp_path):
    """With every step dense the two runs of --compare are one and the same, to the bit."""
    (tmp_path / "dense.yaml").write_text("dense_warmup: 1.0\n")
    run = psa_generate(
        *("--prompt", PROMPT, "--model", saved_model, "--compare", "--config", tmp_path / "dense.yaml"),
        *("--output", tmp_path / "out", "--json"),
    )
    record = run.json
    assert np.array_equal(frames_made[0].frames, frames_made[1].frames)
    assert record["identical"] is True and record["psnr"] is None and record["ssim"] == pytest.approx(1)
    assert record["sparse_steps"] == 0 and record["seconds_per_sparse_step"] is None
    assert record["speedup_sparse_steps"] is None and record["compute_budget_all_calls"] == 1


def test_json_is_all_there_is_on_stdout_and_the_bar_is_on_stderr(psa_generate, saved_model, tmp_path):
    run = psa_generate("--prompt", PROMPT, "--model", saved_model, "--json", "--output", tmp_path / "out")
    assert run.json == json.loads((tmp_path / "out" / "run.json").read_text())
    assert "PSA" in run.err and "4/4" in run.err
    assert re.search(r"sparse, compute budget 0\.\d+", run.err)


def test_the_bar_says_dense_too(psa_generate, saved_model, tmp_path):
    run = psa_generate("--prompt", PROMPT, "--model", saved_model, "--compare", "--output", tmp_path / "out")
    assert "dense, compute budget 1.00" in run.err
    assert "PSNR" in run.out and "speedup of the whole run" in run.out and "LPIPS" in run.out


def test_quiet_says_nothing(psa_generate, saved_model, tmp_path):
    run = psa_generate("--prompt", PROMPT, "--model", saved_model, "--quiet", "--output", tmp_path / "out")
    assert (run.code, run.out, run.err) == (0, "", "")


def test_options_reach_the_pipeline(psa_generate, saved_model, tmp_path):
    run = psa_generate(
        *("--prompt", PROMPT, "--negative-prompt", "blue", "--model", saved_model, "--steps", 2, "--fps", 5),
        *("--height", 32, "--width", 48, "--num-frames", 9, "--guidance-scale", 2, "--preset", "psa-3", "--json"),
        *("--output", tmp_path / "out"),
    )
    record = run.json
    assert read_video(tmp_path / "out" / "video.mp4").shape == (9, 32, 48, 3)
    assert record["steps"] == 2 and record["dense_steps"] + record["sparse_steps"] == 2
    assert record["dense_calls"] + record["sparse_calls"] == 2 * 2 * 2  # steps, layers, with and without the prompt
    assert record["config"]["rule"] == "topk" and record["preset"] == "psa-3" and record["negative_prompt"] == "blue"


def test_a_compute_budget_on_top_of_the_default(psa_generate, saved_model, tmp_path):
    run = psa_generate(
        *("--prompt", PROMPT, "--model", saved_model, "--compute-budget", 0.6, "--json", "--output", tmp_path / "out")
    )
    assert run.json["config"]["compute_budget"] == 0.6
    assert run.json["compute_budget_sparse_calls"] == pytest.approx(0.6, abs=0.1)


def test_calls_that_fall_back_are_reported_with_their_reason(psa_generate, saved_model, tmp_path):
    """32 x 32 pixels are 32 tokens, less than one block of keys."""
    run = psa_generate(
        *("--prompt", PROMPT, "--model", saved_model, "--height", 32, "--width", 32, "--output", tmp_path / "out")
    )
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["fallbacks"] == [{"reason": "one block of keys", "calls": 6}]
    assert "Stayed dense in 6 calls: one block of keys" in run.out
    assert "nothing was sparse" in " ".join(run.out.split()) and "None" not in run.out


def test_words_that_the_model_does_not_know_are_named(psa_generate, saved_model, tmp_path):
    run = psa_generate(*("--prompt", "a red zebra", "--model", saved_model, "--steps", 1, "--output", tmp_path / "out"))
    assert run.code == 0 and "ignores them: zebra" in run.err


def test_side_by_side_holds_both_videos_under_their_labels():
    left, right = np.zeros((2, 20, 30, 3), np.uint8), np.full((2, 20, 30, 3), 200, np.uint8)
    both = side_by_side(left, right, ("dense", "a label that is far too long for thirty pixels"))
    bar = both.shape[1] - 20
    assert bar > 0 and bar % 2 == 0 and both.shape == (2, 20 + bar, 60, 3)
    assert np.array_equal(both[:, bar:, :30], left) and np.array_equal(both[:, bar:, 30:], right)
    assert both[0, :bar, :30].max() > 200  # something is written


def test_help_has_an_example(psa_generate):
    run = psa_generate("--help")
    assert run.code == 0 and "Example: psa-generate --prompt" in run.out


@pytest.mark.parametrize(
    ("offload", "expected"),
    [("none", "to"), ("model", "enable_model_cpu_offload"), ("sequential", "enable_sequential_cpu_offload")],
)
def test_offload_takes_the_pipelines_own_way(saved_model, monkeypatch, offload, expected):
    from diffusers import WanPipeline

    called = []
    for name in ("to", "enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        monkeypatch.setattr(
            WanPipeline, name, lambda self, *a, _name=name, **k: called.append((_name, *a, *k.values()))
        )
    pipeline.load_pipeline(pipeline.find_model(str(saved_model)), "float32", "cpu", offload)
    assert called == [(expected, "cpu")]
