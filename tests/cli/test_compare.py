"""psa-compare from prompts to tables, on a tiny random Wan model."""

from __future__ import annotations

import csv
import json
import shlex
import shutil

import numpy as np
import pytest

from psa_diffusers import PSAConfig
from psa_diffusers.cli import comparing
from psa_diffusers.cli.compare import app
from psa_diffusers.cli.errors import run_command
from psa_diffusers.metrics import psnr, read_video, ssim, temporal_flicker
from psa_diffusers.prompt_sets import prompt_set, prompt_sets

SETTINGS = ("default", "psa-3")


def rows_of(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def record_of(folder, clip, setting):
    return json.loads((folder / "videos" / clip / f"{setting}.json").read_text())


def stamps(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in sorted(folder.rglob("*.*"))}


@pytest.fixture
def small(psa_compare, saved_model, tmp_path):
    """A comparison of one prompt, two steps, one setting."""

    def run(*arguments):
        given = ("--model", saved_model, "--steps", 2, "--output", tmp_path / "out", *arguments)
        return psa_compare(*given) if "--prompt" in given else psa_compare("--prompt", "a red circle", *given)

    return run


def test_every_clip_has_its_videos_and_records(compared):
    assert sorted(path.name for path in compared.iterdir()) == [
        "clips.csv",
        "compare.json",
        "frames.csv",
        "report.html",
        "totals.csv",
        "videos",
    ]
    clips = sorted((compared / "videos").iterdir())
    assert [clip.name for clip in clips] == ["001-seed0", "001-seed1", "002-seed0", "002-seed1"]
    for number, clip in enumerate(clips):
        names = {f"{setting}{end}" for setting in SETTINGS for end in (".mp4", ".json", ".difference.mp4")}
        masks = {f"{setting}.masks.npz" for setting in SETTINGS if number == 0}
        assert {file.name for file in clip.iterdir()} == {"dense.mp4"} | names | masks
        assert all(read_video(file).shape == (5, 64, 64, 3) for file in clip.glob("*.mp4"))


def test_the_measures_are_of_the_frames_before_they_are_encoded(compared, saved_model, monkeypatch, tmp_path):
    """Made once more with what comes out of the pipeline caught."""
    made, real = {}, comparing.generate

    def catching(*arguments, **options):
        run = real(*arguments, **options)
        made[options.get("label")] = run.frames
        return run

    monkeypatch.setattr(comparing, "generate", catching)
    arguments = ["--prompt", "a red circle", "--model", saved_model, "--output", tmp_path / "out", "--preset", "psa-3"]
    assert run_command("psa-compare", app, [*map(str, arguments), "--quiet"]) == 0
    record = record_of(tmp_path / "out", "001-seed0", "psa-3")
    dense, sparse = made[None], made["psa-3"]
    assert record["psnr"] == pytest.approx(psnr(dense, sparse))
    assert record["ssim"] == pytest.approx(ssim(dense, sparse))
    assert record["flicker"] == pytest.approx(temporal_flicker(dense, sparse))
    assert record["lpips"] is None and record["lpips_reason"]
    frames = record["frames"]
    assert np.mean(frames["ssim"]) == pytest.approx(record["ssim"])
    assert frames["psnr"][2] == pytest.approx(psnr(dense[2:3], sparse[2:3]))
    assert frames["flicker"][0] is None and np.mean(frames["flicker"][1:]) == pytest.approx(record["flicker"])
    # From run to run a tiny model's frames are the same on one machine.
    assert record["psnr"] == pytest.approx(record_of(compared, "001-seed0", "psa-3")["psnr"], abs=0.5)


def test_tables_agree_with_the_records(compared):
    results = json.loads((compared / "compare.json").read_text())
    rows = rows_of(compared / "clips.csv")
    assert [row["setting"] for row in rows] == ["dense"] * 4 + ["default"] * 4 + ["psa-3"] * 4
    assert len(rows_of(compared / "frames.csv")) == 2 * 4 * 5
    for row in rows[4:]:
        record = record_of(compared, row["clip"], row["setting"])
        assert float(row["psnr"]) == pytest.approx(record["psnr"], rel=1e-4)
        assert float(row["speedup"]) == pytest.approx(
            record["dense_run"]["seconds_total"] / record["seconds_total"], rel=1e-4
        )
    dense, default, psa3 = results["totals"]
    assert (dense["setting"], dense["speedup"]["value"], dense["psnr"]["value"]) == ("dense", 1, None)
    values = [float(row["psnr"]) for row in rows if row["setting"] == "default"]
    assert default["psnr"]["value"] == pytest.approx(np.mean(values), rel=1e-4)
    assert default["clips"] == 4 and default["prompts"] == 2
    assert "at least 3 prompts" in default["psnr"]["reason"]  # and no interval is made up
    assert psa3["compute_budget_sparse"]["value"] == pytest.approx(0.25, abs=0.15)
    assert rows_of(compared / "totals.csv")[1]["psnr"] == f"{default['psnr']['value']:.6g}"


def test_the_results_say_how_to_repeat_them(compared, psa_compare):
    results = json.loads((compared / "compare.json").read_text())
    words = shlex.split(results["command"])
    assert words[0] == "psa-compare" and results["versions"]["torch"] and results["threads"] >= 1
    assert results["settings"]["psa-3"] == PSAConfig.preset("psa-3").to_dict()
    assert results["model"]["weights_sha256"] and results["made_by"] and len(results["made_by"]) == 1
    run = psa_compare(*words[1:])
    assert run.code == 0 and run.out == ""


def test_the_summary_and_json(small, tmp_path):
    run = small()
    assert run.code == 0 and "1 clip of 1 prompt; means" in run.out and "No LPIPS" in run.out
    assert "1 of 1: 001-seed0" in run.err and "report.html" in run.out
    run = small("--json")
    assert run.json == json.loads((tmp_path / "out" / "compare.json").read_text())
    assert "1 of 1 sparse videos are there already" in run.err


def test_vbench_finds_every_video_and_nothing_else(compared):
    """A folder a model; VBench's standard mode asks for <prompt>-<index>.mp4 and reads whatever suffix comes first."""
    folder = compared.parent / "vbench"
    expected = {
        f"{prompt}-{index}.mp4" for prompt in ("a red circle", "a blue square moves left") for index in range(2)
    }
    assert {path.name for path in folder.iterdir()} == {"dense", *SETTINGS}
    for model in ("dense", *SETTINGS):
        assert {path.name for path in (folder / model).iterdir()} == expected
        copy, own = folder / model / "a red circle-1.mp4", compared / "videos" / "001-seed1" / f"{model}.mp4"
        assert copy.read_bytes() == own.read_bytes()


def test_dense_videos_are_kept_by_content(small, calls, tmp_path):
    assert small("--compute-budget", 0.5).code == 0
    assert [call[2] for call in calls] == ["dense", "budget-0.5"]
    calls.clear()
    assert small("--compute-budget", 0.3, "--output", tmp_path / "other").code == 0  # beside the first
    assert [call[2] for call in calls] == ["budget-0.3"]
    kept = {file: file.read_bytes() for file in (tmp_path / "dense-cache").rglob("*.mkv")}
    assert len(kept) == 1
    for change in (("--seeds", 1), ("--guidance-scale", 2.0), ("--prompt", "a blue square"), ("--num-frames", 9)):
        calls.clear()
        assert small("--compute-budget", 0.5, "--output", tmp_path / "changed", "--overwrite", *change).code == 0
        assert [call[2] for call in calls] == ["dense", "budget-0.5"], change
    assert len(list((tmp_path / "dense-cache").iterdir())) == 5
    assert all(file.read_bytes() == content for file, content in kept.items())


def test_a_damaged_dense_video_is_made_anew(small, calls, tmp_path):
    assert small().code == 0
    (entry,) = (tmp_path / "dense-cache").iterdir()
    record = json.loads((entry / "run.json").read_text())
    (entry / "run.json").write_text(json.dumps({**record, "frames_sha256": "0" * 64}))
    calls.clear()
    assert small("--output", tmp_path / "other").code == 0
    assert [call[2] for call in calls] == ["dense", "default"]
    assert json.loads((entry / "run.json").read_text())["frames_sha256"] == record["frames_sha256"]


@pytest.mark.parametrize(
    "fail_at, error, code",
    [(1, RuntimeError("broken"), 1), (2, KeyboardInterrupt, 130), (3, KeyboardInterrupt, 130), (4, MemoryError(), 1)],
)
def test_a_stopped_run_goes_on_where_it_was(small, calls, tmp_path, fail_at, error, code):
    order = [("a red circle", seed, kind) for seed in (0, 1) for kind in ("dense", "default")]
    calls.fail_at, calls.error = fail_at, error
    run = small("--seeds", "0,1")
    assert run.code == code and "Traceback" not in run.err and calls == order[:fail_at]
    assert not list(tmp_path.rglob("*partial*")) and not list((tmp_path / "dense-cache").glob(".*"))
    before = {name: stamp for name, stamp in stamps(tmp_path).items() if "dense.mp4" not in str(name)}
    calls.clear()
    calls.fail_at = None
    assert small("--seeds", "0,1").code == 0
    assert calls == order[fail_at - 1 :]
    after = stamps(tmp_path)
    assert {name: after[name] for name in before} == before
    calls.clear()
    assert small("--seeds", "0,1").code == 0 and calls == []


def test_settings_and_seeds_can_be_added(small, calls):
    assert small().code == 0
    calls.clear()
    assert small("--preset", "default,psa-3", "--seeds", "0,1").code == 0
    assert calls == [
        ("a red circle", 0, "psa-3"),
        *(("a red circle", 1, kind) for kind in ("dense", "default", "psa-3")),
    ]


def test_overwrite_makes_sparse_videos_anew_and_a_missing_video_is_made(small, calls, tmp_path):
    assert small().code == 0
    calls.clear()
    assert small("--overwrite").code == 0 and [call[2] for call in calls] == ["default"]
    calls.clear()
    (tmp_path / "out" / "videos" / "001-seed0" / "default.mp4").unlink()
    assert small().code == 0 and [call[2] for call in calls] == ["default"]
    calls.clear()
    (tmp_path / "out" / "videos" / "001-seed0" / "dense.mp4").unlink()
    assert small().code == 0 and calls == []  # from the store
    shutil.rmtree(tmp_path / "dense-cache")
    assert small().code == 0 and calls == []  # what is there needs no store


def test_the_record_comes_last(small, calls, tmp_path, monkeypatch):
    """Stopped between the sparse video and its heat-map: the next run makes both."""

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(comparing, "difference_video", stop)
        assert small().code == 130
    folder = tmp_path / "out" / "videos" / "001-seed0"
    assert {file.name for file in folder.iterdir()} == {"dense.mp4", "default.mp4"}
    calls.clear()
    assert small().code == 0 and [call[2] for call in calls] == ["default"]
    assert (folder / "default.difference.mp4").is_file()


def test_another_request_in_the_folder_is_refused(small, calls, tmp_path):
    assert small().code == 0
    before = stamps(tmp_path)
    calls.clear()
    run = small("--steps", 3)
    assert run.code == 2 and "another request" in run.err and "--overwrite" in run.err
    assert calls == [] and stamps(tmp_path) == before


def test_lpips_is_added_when_its_weights_come(small, calls, tmp_path, monkeypatch):
    from psa_diffusers.metrics import LPIPSResult
    from psa_diffusers.report import measures

    assert small().code == 0
    calls.clear()
    weights = tmp_path / "alexnet.pth"
    weights.touch()
    monkeypatch.setattr(measures, "lpips", lambda a, b, file: LPIPSResult(0.25, frames=[0.25] * len(a)))
    assert small("--lpips-weights", weights).code == 0
    assert [call[2] for call in calls] == ["default"]
    results = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert results["totals"][1]["lpips"]["value"] == 0.25 and not any("LPIPS" in note for note in results["notes"])
    assert {row["lpips"] for row in rows_of(tmp_path / "out" / "frames.csv")} == {"0.25"}


def test_identical_videos_are_counted_and_not_averaged(small, tmp_path):
    (tmp_path / "dense.yaml").write_text("dense_warmup: 1.0\n")
    run = small("--config", tmp_path / "dense.yaml", "--json", "--quiet")
    assert run.code == 2 and "called dense" in run.err
    (tmp_path / "dense.yaml").rename(tmp_path / "all steps dense.yaml")
    run = small("--config", tmp_path / "all steps dense.yaml", "--json", "--quiet")
    entry = run.json["totals"][1]
    assert entry["setting"] == "all-steps-dense" and entry["identical"] == 1 and entry["psnr"]["value"] is None
    assert "1 of 1 clips are identical" in (tmp_path / "out" / "report.html").read_text()


def test_settings_that_say_the_same_are_made_once(small, calls):
    run = small("--preset", "default", "--compute-budget", "0.15,0.3")
    assert run.code == 0 and "Left out, as they say the same as another setting: budget-0.15" in run.err
    assert [call[2] for call in calls] == ["dense", "default", "budget-0.3"]


def test_without_matplotlib_all_but_the_page_is_made(small, tmp_path, monkeypatch):
    from psa_diffusers.cli import comparison_files

    real = comparison_files.importlib.util.find_spec
    monkeypatch.setattr(
        comparison_files.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name)
    )
    run = small()
    assert run.code == 0 and "matplotlib missing" in run.out and "psa-diffusers[report]" in run.out
    assert not (tmp_path / "out" / "report.html").exists() and (tmp_path / "out" / "totals.csv").is_file()


def test_the_standard_sets():
    assert set(prompt_sets()) == {"scenes", "shapes"}
    with pytest.raises(ValueError, match="there are scenes, shapes"):
        prompt_set("nothing")
    from psa_diffusers import demo

    vocabulary = demo.model_vocabulary(demo.model_folder())
    lines = [line for line in prompt_set("shapes").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == 16 and all(vocabulary.split(line)[0] and not vocabulary.split(line)[1] for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts-file", "x.txt"], "give one of --prompt, --prompts-file and --prompt-set"),
        (["--limit", 0], "--limit must be at least 1, but is 0"),
        (["--seeds", "a"], "--seeds must be whole numbers separated by commas, but is 'a'"),
        (["--seeds", "1,1"], "--seeds must differ"),
        (["--seeds", "-1"], "--seed must be between 0"),
        (["--preset", "nothing"], "no preset 'nothing'"),
        (["--compute-budget", "2"], "--compute-budget must be in (0, 1]"),
        (["--compute-budget", "a"], "--compute-budget must be numbers separated by commas"),
        (["--config", "missing.yaml"], "cannot read the config file missing.yaml"),
        (["--confidence", "1"], "--confidence must be at least 0.5 and below 1"),
        (["--lpips-weights", "missing.pth"], "no weights file missing.pth"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--height", "65"], "--height must be a multiple of 16"),
        (["--vbench", "v", "--seeds", "0,1,2,3,4,5"], "VBench reads 5 videos a prompt"),
        (["--vbench", "v", "--prompt", "a red circle/ball"], "cannot be in a file's name"),
        (["--device", "cuda:99"], "--device cuda:99"),
    ],
)
def test_wrong_usage(small, calls, arguments, message, tmp_path):
    run = small(*arguments)
    assert run.code == 2 and message in run.err and "Traceback" not in run.err
    assert calls == [] and not (tmp_path / "out").exists()


def test_errors_of_prompts_and_models(psa_compare, saved_model, tmp_path):
    (tmp_path / "twice.txt").write_text("a red circle\na red circle\n")
    run = psa_compare("--model", saved_model, "--prompts-file", tmp_path / "twice.txt")
    assert run.code == 2 and "more than once" in run.err
    run = psa_compare("--prompt-set", "nothing")
    assert run.code == 2 and "there are scenes, shapes" in run.err
    run = psa_compare("--model", tmp_path / "missing", "--json")
    assert run.code == 2 and run.json["exit_code"] == 2
    (tmp_path / "file").touch()
    run = psa_compare("--model", saved_model, "--prompt", "a red circle", "--output", tmp_path / "file" / "out")
    assert run.code == 2 and "cannot write to the output folder" in run.err


def test_a_full_disk_is_said(small, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(comparing, "write_video", full)
    run = small()
    assert run.code == 1 and "No space left on device" in run.err and "Traceback" not in run.err


def test_kernels_are_compiled_before_anything_is_timed(saved_model, monkeypatch):
    """On a GPU: two steps of every setting, one dense and one sparse, first."""
    from types import SimpleNamespace

    done = []
    monkeypatch.setattr(comparing.pipeline, "load_pipeline", lambda *arguments: "pipe")
    monkeypatch.setattr(comparing.plugin, "switch_on", lambda *arguments: None)
    monkeypatch.setattr(comparing.plugin, "switch_off", lambda *arguments: None)
    monkeypatch.setattr(comparing.run_record, "describe_environment", lambda *arguments: {})
    monkeypatch.setattr(comparing, "generate", lambda pipe, prompt, settings, **options: done.append(settings))
    from psa_diffusers.cli.generation import resolve_settings

    source = comparing.pipeline.find_model(str(saved_model))
    settings = resolve_settings(source, PSAConfig(), {}, ("cpu", None, "none"), 0)
    for device, expected in (("cpu", 0), ("cuda", 2)):
        object.__setattr__(settings, "device", device)
        configs = {"default": PSAConfig(), "psa-3": PSAConfig.preset("psa-3")}
        job = SimpleNamespace(
            source=source, settings=settings, configs=configs, command="", clips=[SimpleNamespace(prompt="a")]
        )
        assert comparing._Maker(job, None, lambda text: None, True).pipe == "pipe"
        assert len(done) == expected
    assert [one.steps for one in done] == [2, 2] and all(one.config.dense_warmup == 0.5 for one in done)


@pytest.mark.parametrize(
    ("settings", "steps", "expected"),
    [({}, 16, [4, 10, 15]), ({}, 2, [1]), ({"dense_warmup": 1.0}, 8, []), ({"refresh_every": 4}, 16, [4, 8, 12])],
)
def test_level_masks_are_of_the_first_middle_and_last_sparse_step(settings, steps, expected):
    assert comparing.masked_steps(steps, PSAConfig(**settings)) == expected
