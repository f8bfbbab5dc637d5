"""Whole videos in the laboratory: batches are their samples, measures the package's, rows complete and resumed."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "experiments"))
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "laboratory"))

import block_policies
import policies
import video_metrics
from cases import Case
from policies import PLAIN
from video_experiments import (
    CONTROL,
    KEPT_STEPS,
    policy_settings,
    reuse_settings,
    step_settings,
    tuning_settings,
    variants,
)
from video_model import VideoModel
from video_report import draw_policies, draw_reuse, draw_steps, paired, summarise
from video_runs import Runs
from video_settings import LEAST, SCHEDULES, Planner, Setting

from psa_diffusers import PSAConfig
from psa_diffusers.integration import operations
from psa_diffusers.metrics import psnr, ssim, to_uint8
from psa_diffusers.synthetic import video_like_qkv

SCRIPT = Path(__file__).parents[2] / "scripts" / "experiments" / "videos.py"
GRID = (4, 16, 16)
CHOSEN = {"PSA-3": policies.published()["PSA-3"], "PSA threshold": policies.published()["PSA threshold"]}
CHOSEN |= {family: next(iter(group.values())) for family, group in policies.families().items()}
CHOSEN |= {"fixed blocks": policies.families()["SpargeAttn (re-implemented)"]["similarity 0.5, gilbert"]}
CHOSEN |= {"windows": policies.families()["sliding tiles (re-implemented)"]["tile (2, 4, 8), 7 windows"]}
SIZE = {"num_frames": 5, "height": 128, "width": 128, "num_inference_steps": 2}
PROMPTS = [("green square sinks down, golden background", 3), ("a yellow ball moves downwards on a blue background", 4)]


@pytest.fixture(scope="module")
def samples():
    """Two of different content, so that what fits one does not fit the other."""
    contents = ({"noise": 0.05, "temperature": 1.5}, {"noise": 0.6, "temperature": 0.5})
    tensors = [video_like_qkv(1, GRID, 2, 16, seed=i, position=0.3, **kind) for i, kind in enumerate(contents)]
    return [Case("one", "captured", *qkv, GRID) for qkv in tensors]


@pytest.mark.parametrize("name", CHOSEN)
def test_a_policy_treats_the_samples_of_a_batch_as_if_alone(samples, name):
    both = [torch.cat(parts) for parts in zip(*(case.inputs for case in samples), strict=True)]
    batch = CHOSEN[name](Case("both", "captured", *both, GRID), 0.2)
    for number, case in enumerate(samples):
        alone = CHOSEN[name](case, 0.2)
        torch.testing.assert_close(batch.output[number], alone.output[0], rtol=1e-3, atol=1e-4)
        assert float(batch.costs[number]) == pytest.approx(float(alone.costs[0]), abs=1e-6)


def test_blocks_of_unlike_tokens_are_found_sample_by_sample():
    likeness = torch.tensor([0.9, 0.2, 0.01]).view(3, 1, 1).expand(3, 2, 4)
    limits = block_policies._least_likeness([likeness, likeness], 0.5, share=0.5)
    assert limits.tolist() == [0.5, 0.125, float("-inf")]


def test_measures_are_those_of_the_package():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randint(0, 256, (2, 3, 24, 40, 3), generator=generator, dtype=torch.uint8)
    noise = torch.randint(-9, 10, reference.shape, generator=generator)
    video = (reference.int() + noise).clamp(0, 255).to(torch.uint8)
    video[1, 1:] = reference[1, 1:]
    for number, (decibels, similarity) in enumerate(
        zip(video_metrics.psnr_of_videos(reference, video), video_metrics.ssim_of_videos(reference, video), strict=True)
    ):
        pair = reference[number].numpy(), video[number].numpy()
        assert decibels == pytest.approx(psnr(*pair), abs=1e-9)
        assert similarity == pytest.approx(ssim(*pair), abs=1e-9)
    assert video_metrics.psnr_of_videos(reference, reference) == [math.inf] * 2


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_keep_to_the_mean_and_to_what_a_plan_can_cost(schedule):
    noise = [5 * left / (16 + 4 * left) for left in range(16, -1, -1)]  # flow matching, shift 5
    for budget, first, last in ((0.15, 4, 1), (0.5, 0, 0), (0.02, 4, 0)):
        found = Setting("ours", PSAConfig(), budget, first, last, schedule).budgets(noise)
        sparse = found[first : 16 - last]
        assert found[:first] == [1.0] * first and found[16 - last :] == [1.0] * last and len(found) == 16
        assert sum(sparse) / len(sparse) == pytest.approx(budget, rel=1e-6)
        assert min(sparse) >= LEAST and max(sparse) <= 1
        if schedule != "constant":
            assert max(sparse) > min(sparse)
            assert (sparse[0] > sparse[-1]) == (schedule in ("falling 3:1", "falling 8:1", "by noise level"))


def test_settings_are_at_equal_compute():
    settings = step_settings(16)
    usual = next(s for s in settings if (s.dense_first, s.dense_last, s.budget, s.schedule) == (4, 0, 0.15, "constant"))
    same_total = [s for s in settings if s.budget not in (0.15, 0.05)]
    assert len(same_total) > 15
    assert all(s.total(16) == pytest.approx(usual.total(16)) for s in same_total)
    assert {(s.dense_first, s.dense_last) for s in settings if s.budget == 0.15} >= {
        (first, last) for first in (0, 2, 4, 7) for last in (0, 1, 2)
    }
    chosen = {family: next(iter(group)) for family, group in variants().items()}
    table = policy_settings(16, (0.15, 0.25), chosen)
    names = {s.name for s in table if s.budget == 0.25}
    assert names == {s.name for s in table} - {CONTROL} and len(table) == 1 + 2 * len(names)
    assert len(tuning_settings(16)) == sum(len(group) for group in variants().values())


@pytest.fixture(scope="module")
def model():
    return VideoModel(**SIZE)


def test_dense_clips_are_the_pipelines(model):
    """In a batch too, and from each prompt's own noise."""
    frames = model.dense(*zip(*PROMPTS, strict=True)).frames
    for number, (prompt, seed) in enumerate(PROMPTS):
        noise = torch.Generator("cpu").manual_seed(seed)
        alone = model.pipe(prompt, generator=noise, output_type="np", **model.size).frames[0]
        different = (frames[number].int() - torch.from_numpy(to_uint8(alone)).int()).abs()
        assert int(different.max()) <= 1 and float((different > 0).float().mean()) < 1e-3


def test_budgets_follow_the_steps_and_the_plugin_is_left_as_it_was(model):
    before = operations.build_plan, operations.attend
    asked = []

    def policy(case: Case, budget: float):
        asked.append(round(budget, 6))
        if len(asked) > 20:
            raise ValueError("enough")
        return policies.published()["PSA-3"](case, budget)

    setting = Setting("asking", policy, 0.3, 0, schedule="falling 3:1")
    clips = model.sparse(*zip(*PROMPTS[:1], strict=True), setting)
    assert asked == [0.45] * 10 + [0.15] * 10  # 5 layers, two branches of guidance
    assert clips.costs[0] == pytest.approx(0.3, abs=0.15) and clips.dense_seconds is None
    with pytest.raises(ValueError, match="enough"):
        model.sparse(*zip(*PROMPTS[:1], strict=True), setting)
    assert (operations.build_plan, operations.attend) == before
    assert not any("PSA" in type(p).__name__ for p in model.pipe.transformer.attn_processors.values())


@pytest.mark.parametrize(("kept", "plans"), [(1, 20), (2, 10)])  # 2 steps x 5 layers, two branches of guidance
def test_plans_are_kept_for_as_many_steps_as_the_setting_says(model, monkeypatch, kept, plans):
    made, planned = [], Planner.build_plan
    monkeypatch.setattr(Planner, "build_plan", lambda *given, **more: made.append(kept) or planned(*given, **more))
    clips = model.sparse(*zip(*PROMPTS[:1], strict=True), Setting("ours", PSAConfig(), 0.3, 0, refresh_every=kept))
    assert len(made) == plans and clips.costs[0] == pytest.approx(0.3, abs=0.02)


def test_layers_may_have_budgets_of_their_own():
    planner, asked = Planner(PSAConfig(), [0.2, 0.1], layers=(0.5, 1.5)), []
    for call in range(6):
        planner.step = call // 4
        asked.append(planner.config.compute_budget)
        planner.costs.append(torch.zeros(1))
    assert asked == pytest.approx([0.1, 0.3, 0.1, 0.3, 0.05, 0.15])


def test_kept_plans_are_compared_with_fresh_ones():
    settings = reuse_settings(16)
    assert {s.refresh_every for s in settings} == set(KEPT_STEPS) and len({s.name for s in settings}) == 2
    table = summarise(
        [{**row, "variant": s.variant} for s in settings for row in rows(s.name, [40 - s.refresh_every] * 3, s)]
    )
    assert [row["fresh_ahead_db"] for row in table] == [kept - 1 for kept in KEPT_STEPS] * 2
    assert len(draw_reuse(table).axes[0].containers) == 2


def test_policies_refuse_text_tokens():
    tensors = [torch.zeros(1, 128, 1, 16)] * 3
    planner = Planner(policies.published()["PSA-3"], [0.2])
    with pytest.raises(ValueError, match="full_tokens"):
        planner.build_plan(*tensors, PSAConfig(), grid=(1, 8, 8), full_tokens=slice(64, 128))


def test_a_setting_that_fails_is_reported_and_the_others_run(model, tmp_path):
    def broken(case: Case, budget: float):
        raise RuntimeError("it breaks")

    settings = [Setting("broken", broken, 0.3, 1), Setting("ours", PSAConfig(), 0.3, 1)]
    runs = Runs(model, tmp_path / "rows.csv", "run-a", batch=1)
    assert runs.run_all(settings, PROMPTS[:1])
    assert len(runs.failures) == 1 and "it breaks" in runs.failures[0]
    assert [row["policy"] for row in read(tmp_path / "rows.csv")] == ["ours"]
    late = Runs(model, tmp_path / "rows.csv", "run-a", batch=1, deadline=0.0)
    assert not late.run_all([Setting("other", PSAConfig(), 0.4, 1)], PROMPTS[:1])


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture
def script():
    """scripts/experiments/videos.py, as a module."""
    spec = importlib.util.spec_from_file_location("videos_experiment", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_measures_resumes_and_reports(script, tmp_path, monkeypatch):
    small = ["--steps", "2", "--size", "5", "128", "128", "--output", str(tmp_path), "--budgets", "0.5", "--batch", "2"]
    chosen = ["--policies", PLAIN, "PSA-3", "SVG-EAR", CONTROL]
    monkeypatch.setattr(sys, "argv", ["scripts/experiments/videos.py", *small])
    assert script.main([*small, *chosen, "--experiments", "policies", "--prompts", "1"]) == 0
    rows = read(tmp_path / "videos.csv")
    assert {row["policy"] for row in rows} == {
        CONTROL,
        PLAIN,
        "PSA-3",
        "SVG-EAR (re-implemented)",
    } and len(rows) == 4
    by_name = {row["policy"]: row for row in rows}
    assert float(by_name[CONTROL]["psnr"]) > 60 and float(by_name[CONTROL]["achieved"]) == 1
    for row in rows:
        assert row["prompt"] == "green square sinks down, golden background"  # the first is for tuning
        assert math.isfinite(float(row["ssim"])) and float(row["sparse_step_seconds"]) > 0
        assert row["lpips"] or row["lpips_reason"]
        dense = int(row["dense_first"]) / 2
        assert float(row["achieved_all"]) == pytest.approx(dense + (1 - dense) * float(row["achieved"]), abs=1e-5)
    facts = json.loads((tmp_path / "videos.json").read_text())[rows[0]["run"]]
    assert facts["num_frames"] == 5 and facts["versions"]["torch"] == torch.__version__

    made = []
    sparse = VideoModel.sparse
    monkeypatch.setattr(VideoModel, "sparse", lambda *given: made.append(given[-1].name) or sparse(*given))
    assert script.main([*small, *chosen, "--experiments", "policies", "--prompts", "1"]) == 0
    assert made == [] and read(tmp_path / "videos.csv") == rows
    again = ["--policies", PLAIN, "--experiments", "policies", "--prompts", "2"]
    assert script.main([*small, *again]) == 0 and made == [PLAIN]
    again = read(tmp_path / "videos.csv")
    assert again[:4] == rows and [row["policy"] for row in again[4:]] == [PLAIN]
    assert len({row["prompt"] for row in again}) == 2

    table = read(tmp_path / "videos_summary.csv")
    ours = next(row for row in table if row["policy"] == PLAIN)
    assert int(ours["clips"]) == 2 and float(ours["plain_ahead_db"]) == 0
    assert (tmp_path / "videos.png").stat().st_size > 1000


def rows(policy, values, setting=None):
    """As they are read from the file."""
    setting = setting or Setting(policy, PSAConfig(), 0.15, 4)
    same = {"run": "run-a", "variant": "", "budget": setting.budget, "schedule": setting.schedule, "policy": policy}
    same |= {
        "experiment": setting.experiment,
        "dense_first": float(setting.dense_first),
        "dense_last": float(setting.dense_last),
        "steps": 16.0,
    }
    same |= {"achieved": setting.budget, "achieved_all": setting.total(16), "estimator": 0.01, "ssim": 0.9}
    same |= {"sparse_step_seconds": 0.1, "dense_step_seconds": 0.2}
    return [{**same, "prompt": f"p{i}", "seed": float(i), "psnr": float(value)} for i, value in enumerate(values)]


def test_steps_are_compared_with_the_usual_ones_and_drawn():
    settings = step_settings(16)
    table = summarise([row for s in settings for row in rows(s.name, [30 + s.dense_first, 33, 34], s)])
    assert len(table) == len(settings)
    usual = [row for row in table if row["usual_ahead_db"] == 0 and row["dense_first"] == 4]
    assert any((row["budget"], row["dense_last"], row["schedule"]) == (0.15, 0, "constant") for row in usual)
    assert {row["usual_ahead_db"] for row in table if row["dense_first"] == 7} == {-1.0}
    figure = draw_steps(table)
    assert len(figure.axes[0].containers) == 6  # 0, 1, 2 last steps, at one budget and at one total
    assert len(figure.axes[1].patches) == 3 * len(SCHEDULES)


def test_policies_are_drawn_as_bars_or_as_curves():
    table = summarise([*rows(PLAIN, [38, 39, 40]), *rows("PSA-3", [30, 31, 32]), *rows("PSA-4", [31, 32, 33])])
    bars = draw_policies(table).axes[0]
    assert sorted(patch.get_width() for patch in bars.patches) == [31, 32, 39]
    more = [{**row, "budget": 0.25, "achieved": 0.25} for row in table]
    labels = draw_policies([*table, *more]).axes[0].get_legend_handles_labels()[1]
    assert labels == [PLAIN, "best published PSA setting"]


def test_differences_are_paired_clip_by_clip():
    ours, theirs = rows(PLAIN, [30, 40, 50, 60]), rows("PSA-3", [29, 38, 47, math.inf])
    assert paired("x", ours, list(reversed(theirs[:3]))) == {
        "x_db": 2.0,
        "x_db_low": 1.0,
        "x_db_high": pytest.approx(2.67, abs=0.5),
        "x_in": 3,
    }
    line = next(row for row in summarise([*ours, *theirs]) if row["policy"] == "PSA-3")
    assert line["psnr"] == 38 and line["plain_ahead_db"] == 2 and line["clips"] == 4
