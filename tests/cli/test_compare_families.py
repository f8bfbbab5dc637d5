"""psa-compare on pipelines of other families than Wan: tiny ones with random weights, from folders."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest

from psa_diffusers.cli import comparing, pipeline, text_to_video
from psa_diffusers.cli.denoise import Generated
from psa_diffusers.cli.settings import WAN_DEFAULTS
from psa_diffusers.metrics import read_video

from .tiny_families import FAMILIES, save_family

OPTIONS = {name: [word for pair in sizes.items() for word in pair] for name, (_, sizes) in FAMILIES.items()}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """The folder of a tiny pipeline, made once a family."""
    folder = tmp_path_factory.mktemp("families")

    def find(name):
        return folder / name if (folder / name).exists() else save_family(name, folder / name)

    return find


@pytest.fixture
def compare(psa_compare, family, tmp_path):
    """A comparison of one prompt and four steps; later options win."""

    def run(name, *arguments):
        given = ("--model", family(name), "--prompt", "a red circle", "--steps", 4, *OPTIONS[name])
        return psa_compare(*given, "--output", tmp_path / "out", *arguments)

    return run


@pytest.fixture
def changed(family, tmp_path):
    """A folder of the LTX pipeline whose index names other classes; its weights are not read."""

    def make(**classes):
        index = json.loads((family("ltx") / "model_index.json").read_text())
        for part, kind in classes.items():
            index[part] = kind if part == "_class_name" else ["diffusers", kind]
        folder = tmp_path / "changed"
        for part, value in index.items():
            if isinstance(value, list):
                (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_compared(name, compare, tmp_path):
    run = compare(name, "--preset", "default,psa-3", "--json")
    assert run.code == 0, run.err
    rows = {row["setting"]: row for row in run.json["clips"]}
    assert list(rows) == ["dense", "default", "psa-3"]
    sizes = FAMILIES[name][1]
    shape = (sizes["--num-frames"], sizes["--height"], sizes["--width"], 3)
    folder = tmp_path / "out" / "videos" / "001-seed0"
    for setting in ("default", "psa-3"):
        record = json.loads((folder / f"{setting}.json").read_text())
        assert record["kinds_of_steps"] == ["dense", "sparse", "sparse", "sparse"]
        assert record["sparse_calls"] > 0 and record["fallbacks"] == [] and record["masks"]
        assert 20 < record["psnr"] < 99 and not record["identical"]  # sparse, and of the same noise
        assert read_video(folder / f"{setting}.mp4").shape == read_video(folder / "dense.mp4").shape == shape
    assert (tmp_path / "out" / "report.html").is_file()


def test_it_goes_on_where_it_was_and_keeps_the_dense_video(compare, calls, tmp_path):
    calls.fail_at = 3
    assert compare("ltx", "--preset", "default,psa-3").code == 130
    made = [kind for _, _, kind in calls]
    calls.clear()
    calls.fail_at = None
    assert compare("ltx", "--preset", "default,psa-3").code == 0
    assert made == ["dense", "default", "psa-3"] and [kind for _, _, kind in calls] == ["psa-3"]
    calls.clear()
    assert compare("ltx", "--compute-budget", 0.4, "--output", tmp_path / "other").code == 0
    assert [kind for _, _, kind in calls] == ["budget-0.4"]
    calls.clear()
    assert compare("ltx", "--compute-budget", 0.4, "--output", tmp_path / "third", "--fps", 30).code == 0
    assert [kind for _, _, kind in calls] == ["dense", "budget-0.4"]  # this model is told the frame rate


def test_sizes_are_the_pipelines_own_where_none_are_given(family):
    found = text_to_video.video_defaults(pipeline.find_model(str(family("ltx")), any_pipeline=True))
    taken = text_to_video.arguments_of(diffusers.LTXPipeline.__call__)
    for name in ("height", "width", "num_frames", "num_inference_steps", "guidance_scale"):
        assert found[name] == taken[name].default is not None
    assert (found["fps"], found["negative_prompt"]) == (taken["frame_rate"].default, "")
    bundled = text_to_video.video_defaults(pipeline.find_model(None))
    assert set(bundled) == set(WAN_DEFAULTS) == set(found)


def test_the_call_has_what_the_pipeline_takes_and_no_more(family):
    ltx = diffusers.LTXPipeline.from_pretrained(family("ltx"))
    values = {"negative_prompt": "", "height": 64, "width": 32, "num_frames": 5, "steps": 2, "fps": 12.0}
    settings = SimpleNamespace(**values, guidance_scale=None)
    assert text_to_video.call_arguments(ltx, "a", settings) == {
        **{"prompt": "a", "height": 64, "width": 32, "num_frames": 5, "num_inference_steps": 2, "frame_rate": 12.0}
    }
    wan = type("Pipe", (), {"__call__": diffusers.WanPipeline.__call__})()
    settings = SimpleNamespace(**{**values, "negative_prompt": "fog"}, guidance_scale=3.0)
    found = text_to_video.call_arguments(wan, "a", settings)
    assert "frame_rate" not in found and (found["negative_prompt"], found["guidance_scale"]) == ("fog", 3.0)


def test_pipelines_without_a_callback_are_watched_at_their_scheduler():
    class Scheduler:
        def step(self, output, timestep, sample):
            return sample + output

    class Pipe:
        scheduler = Scheduler()

        def __call__(self, prompt):
            return [self.scheduler.step(1, time, 10) for time in (900, 500)]

    pipe, seen = Pipe(), []
    with text_to_video.steps_watched(pipe, lambda *given: seen.append(given)) as added:
        assert added == {} and pipe("a") == [11, 11]
    assert seen == [(pipe, 0, 900, {}), (pipe, 1, 500, {})]
    pipe("a")
    assert len(seen) == 2 and "step" not in vars(pipe.scheduler)


def test_a_size_that_the_pipeline_rounds_is_told():
    run = Generated(np.zeros((9, 64, 48, 3), np.uint8), [], [], 1.0)
    asked = SimpleNamespace(num_frames=10, height=64, width=50)
    assert comparing.size_notes(run, asked) == [
        "The pipeline made 9 frames of 48x64, where 10 frames of 50x64 were asked for."
    ]
    assert comparing.size_notes(run, SimpleNamespace(num_frames=9, height=64, width=48)) == []


# -- errors -----------------------------------------------------------------------------------------------------------


def refusal(run):
    assert run.code == 2 and run.out == "" and "Traceback" not in run.err, run.err
    return run.err


def test_a_size_that_the_pipeline_refuses(compare):
    assert "LTXPipeline refuses this: `height` and `width` have to be divisible by 32" in refusal(
        compare("ltx", "--height", 60)
    )


def test_a_pipeline_that_names_no_size(psa_compare, family, tmp_path):
    run = psa_compare("--model", family("cogvideox"), "--prompt", "a", "--height", 64, "--output", tmp_path / "out")
    assert "CogVideoXPipeline has no default for --width, --num-frames: name it." in refusal(run)


def test_the_libraries_remarks_are_not_in_front_of_the_refusal(changed, tmp_path):
    """In a process of its own, where the pipeline's module is imported for the first time."""
    words = ["--model", changed(_class_name="FluxPipeline"), "--prompt", "a", "--output", tmp_path / "out"]
    command = [sys.executable, "-m", "psa_diffusers.cli.compare", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("psa-compare: ") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "classes, said",
    [
        ({"_class_name": "LTXImageToVideoPipeline"}, "is a LTXImageToVideoPipeline, whose first input is 'image'"),
        ({"_class_name": "FluxPipeline"}, "psa-compare makes videos from text"),
        ({"_class_name": "NoSuchPipeline"}, "does not have; a newer one may"),
        ({"_class_name": ["mine.py", "Pipe"]}, "does not have; a newer one may"),
        ({"transformer": "LatteTransformer3DModel"}, "its transformer stays dense: its attention is factorised"),
        ({"transformer": "DiTTransformer2DModel"}, "it has none of the transformers that PSA knows"),
    ],
)
def test_what_cannot_be_compared(classes, said, changed, psa_compare, tmp_path):
    arguments = ("--model", changed(**classes), "--prompt", "a", "--output", tmp_path / "out")
    assert said in refusal(psa_compare(*arguments))
    assert not (tmp_path / "out").exists()


def test_an_option_that_the_pipeline_does_not_take(changed, psa_compare, tmp_path):
    kind = "HunyuanVideo15Pipeline"
    if not hasattr(diffusers, kind):
        pytest.skip(f"diffusers {diffusers.__version__} has no {kind}")
    arguments = ("--model", changed(_class_name=kind), "--prompt", "a", "--guidance-scale", 3)
    run = psa_compare(*arguments, "--output", tmp_path / "out")
    assert f"{kind} does not take --guidance-scale; leave it out." in refusal(run)
