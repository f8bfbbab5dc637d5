"""Bad input: one or two lines that say what to do, the right exit code, and nothing lost."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file

from psa_diffusers.cli import generation, machine, pipeline
from psa_diffusers.config import PSAConfig

PROMPT = ("--prompt", "a red circle")


@pytest.fixture
def refused(psa_generate, saved_model, tmp_path):
    """Run with bad input; check the form of the answer and that nothing was written; return the message."""

    def run(*arguments: object, code: int = 2, model: object = None, output: object = None) -> str:
        output = output or tmp_path / "out"
        model = ("--model", model if model is not None else saved_model)
        outcome = psa_generate(*arguments, *model, "--output", output)
        assert outcome.code == code, outcome.err
        assert outcome.out == ""
        assert outcome.err.startswith("psa-generate: ") and len(outcome.err.strip().splitlines()) <= 2
        assert "Traceback" not in outcome.err
        assert not list(tmp_path.rglob("*.mp4")) and not list(tmp_path.rglob("run.json"))
        return outcome.err

    return run


# -- what to draw ---------------------------------------------------------------------------------------------------


def test_a_prompt_of_unknown_words(refused):
    message = refused("--prompt", "a zebra dances to the moon")
    assert "unknown: zebra, dances, moon" in message
    assert "shapes: circle, square" in message and "colours: red, blue" in message
    assert "--model Wan-AI/Wan2.1-T2V-1.3B-Diffusers" in message


def test_a_prompt_that_says_nothing(refused):
    assert "none of its words says what to draw" in refused("--prompt", "to the")


def test_a_model_without_a_vocabulary_takes_any_prompt(psa_generate, broken_model, tmp_path):
    (broken_model / "vocabulary.json").unlink()
    run = psa_generate("--prompt", "zebra", "--model", broken_model, "--steps", 1, "--output", tmp_path / "out")
    assert run.code == 0


@pytest.mark.parametrize("prompt", ["", "   ", "\n"])
def test_an_empty_prompt(refused, prompt):
    assert "prompt is empty" in refused("--prompt", prompt)


def test_no_prompt_and_two_kinds_of_prompt(refused, tmp_path):
    (tmp_path / "prompts.txt").write_text("red\n")
    assert "give either --prompt" in refused()
    assert "give either --prompt" in refused(*PROMPT, "--prompts-file", tmp_path / "prompts.txt")


def test_prompts_files_that_cannot_be_used(refused, tmp_path):
    assert "there is no prompts file" in refused("--prompts-file", tmp_path / "none.txt")
    assert "must be a text file" in refused("--prompts-file", tmp_path)
    (tmp_path / "empty.txt").write_text("\n# only a remark\n\n")
    assert "holds no prompt" in refused("--prompts-file", tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refused("--prompts-file", tmp_path / "binary.txt")
    (tmp_path / "mixed.txt").write_text("a red circle\na zebra\n")
    assert "zebra" in refused("--prompts-file", tmp_path / "mixed.txt")  # before the first video is made


# -- how to compute -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", ["0", "-0.1", "1.01", "nan"])
def test_a_budget_outside_its_range(refused, budget):
    assert "--compute-budget must be in (0, 1]" in refused(*PROMPT, "--compute-budget", budget)


def test_a_budget_below_one_centroid_a_block(refused):
    assert "1 / kv_block_size = 0.015625" in refused(*PROMPT, "--compute-budget", "0.01")


def test_a_budget_with_a_rule_that_has_none(refused):
    assert "preset psa-3 has rule: topk" in refused(*PROMPT, "--preset", "psa-3", "--compute-budget", "0.2")


def test_a_budget_with_a_schedule(refused, tmp_path):
    file = tmp_path / "scheduled.yaml"
    PSAConfig(budget_schedule=[(0.25, 0.3), (1.0, 0.1)]).save(file)
    message = refused(*PROMPT, "--config", file, "--compute-budget", "0.2")
    assert f"one budget for all steps, but {file} has a budget_schedule" in message


def test_an_unknown_preset_lists_the_known(refused):
    message = refused(*PROMPT, "--preset", "psa-9")
    assert "psa-9" in message and all(name in message for name in PSAConfig.presets())


def test_config_files_that_cannot_be_used(refused, tmp_path):
    assert "cannot read the config file" in refused(*PROMPT, "--config", tmp_path / "none.yaml")
    (tmp_path / "typo.yaml").write_text("compute_bugdet: 0.2\n")
    message = refused(*PROMPT, "--config", tmp_path / "typo.yaml")
    assert "compute_bugdet" in message
    assert all(field.name in message for field in dataclasses.fields(PSAConfig))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    assert "binary.yaml is not valid YAML" in refused(*PROMPT, "--config", tmp_path / "binary.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    assert "not valid YAML" in refused(*PROMPT, "--config", tmp_path / "broken.yaml")
    (tmp_path / "config.txt").write_text("")
    assert ".yaml, .yml or .json" in refused(*PROMPT, "--config", tmp_path / "config.txt")
    (tmp_path / "fine.yaml").write_text("seed: 1\n")
    assert "not both" in refused(*PROMPT, "--config", tmp_path / "fine.yaml", "--preset", "psa-1")


def test_a_backend_that_is_not_for_this_device(refused, tmp_path):
    (tmp_path / "triton.yaml").write_text("backend: triton\n")
    assert "triton" in refused(*PROMPT, "--device", "cpu", "--config", tmp_path / "triton.yaml").lower()


@pytest.mark.parametrize("option", ["--bogus", "--stepz"])
def test_an_unknown_option(refused, option):
    assert f"No such option: {option}" in refused(*PROMPT, option, "1")


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--steps", "0", "at least 1"),
        ("--steps", "many", "valid integer"),
        ("--guidance-scale", "-1", "0 or more"),
        ("--guidance-scale", "inf", "0 or more"),
        ("--fps", "0", "above 0"),
        ("--seed", "-1", "between 0"),
        ("--num-frames", "7", "the nearest: 5 or 9"),
        ("--num-frames", "0", "the nearest: 1"),
        ("--height", "70", "the nearest: 64 or 80"),
        ("--width", "5", "the nearest: 16"),
        ("--offload", "disk", "'none', 'model', 'sequential'"),
        ("--offload", "model", "on the CPU leave it out"),
        ("--device", "cuda:99", "Use --device cpu"),
        ("--device", "abacus", "cpu, cuda, cuda:N or mps"),
        ("--device", "meta", "cpu, cuda, cuda:N or mps"),
        ("--dtype", "int8", "float32, float16 or bfloat16"),
    ],
)
def test_a_wrong_value(refused, option, value, says):
    device = () if option == "--device" else ("--device", "cpu")
    assert says in refused(*PROMPT, *device, option, value)


def test_a_dtype_that_the_device_does_not_compute(refused, monkeypatch):
    def unsupported(dtype, device):
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(machine, "_try_dtype", unsupported)
    assert "use --dtype float32" in refused(*PROMPT, "--dtype", "float16", "--device", "cpu")


def test_lpips_weights_that_are_not_there_or_not_for_this(refused, tmp_path):
    assert "there is no weights file" in refused(*PROMPT, "--compare", "--lpips-weights", tmp_path / "none.pth")
    assert "--lpips-weights is for --compare" in refused(*PROMPT, "--lpips-weights", tmp_path / "none.pth")


# -- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "nowhere", "a/b/c"])
def test_a_model_that_can_only_be_a_folder(refused, name):
    assert f"there is no model folder {name}" in refused(*PROMPT, model=name)


def test_a_model_that_the_hub_does_not_know(refused, monkeypatch):
    def unknown(model, file):
        raise hub_errors.RepositoryNotFoundError.__new__(hub_errors.RepositoryNotFoundError)

    monkeypatch.setattr(pipeline, "_download", unknown)
    assert "there is no model some/typo on the Hugging Face Hub" in refused(*PROMPT, model="some/typo")


def test_a_model_id_that_is_none(refused):
    assert "there is no model what is/this!" in refused(*PROMPT, model="what is/this!")


def test_the_hub_cannot_be_reached(refused, monkeypatch):
    def offline(model, file):
        raise hub_errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(pipeline, "_download", offline)
    assert "cannot be asked for it (LocalEntryNotFoundError)" in refused(*PROMPT, model="some/model")


def test_a_file_a_strange_folder_and_another_pipeline(refused, broken_model, tmp_path):
    (tmp_path / "weights.bin").write_text("")
    assert "is a file" in refused(*PROMPT, model=tmp_path / "weights.bin")
    (tmp_path / "folder").mkdir()
    assert "has no model_index.json" in refused(*PROMPT, model=tmp_path / "folder")
    index = json.loads((broken_model / "model_index.json").read_text())
    (broken_model / "model_index.json").write_text(json.dumps({**index, "_class_name": "LTXPipeline"}))
    assert "LTXPipeline" in refused(*PROMPT, model=broken_model)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_weight(path):
    weights = load_file(path)
    del weights[min(weights)]
    save_file(weights, path, metadata={"format": "pt"})


def change_a_shape(path):
    weights = load_file(path)
    weights[min(weights)] = torch.zeros(3, 5)
    save_file(weights, path, metadata={"format": "pt"})


WEIGHTS = {
    "transformer": "transformer/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}


@pytest.mark.parametrize("component", WEIGHTS)
@pytest.mark.parametrize("damage", [cut, drop_a_weight, change_a_shape, lambda path: path.unlink()])
def test_weights_that_are_damaged(refused, broken_model, component, damage):
    damage(broken_model / WEIGHTS[component])
    assert "is not complete or is corrupt" in refused(*PROMPT, model=broken_model)


@pytest.mark.parametrize(
    "file",
    [
        *("model_index.json", "vae/config.json", "transformer/config.json", "scheduler/scheduler_config.json"),
        *("tokenizer/tokenizer.json", "defaults.json", "vocabulary.json"),
    ],
)
def test_files_that_hold_no_json(refused, broken_model, file):
    (broken_model / file).write_text("{")
    assert "is not complete or is corrupt" in refused(*PROMPT, model=broken_model)


@pytest.mark.parametrize("text", ["[]", "null", '{"patch_size": "two"}'])
def test_settings_that_are_none(refused, broken_model, text):
    (broken_model / "transformer" / "config.json").write_text(text)
    assert "is not complete or is corrupt" in refused(*PROMPT, model=broken_model)


def test_weights_that_may_not_be_read(refused, broken_model, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    message = refused(*PROMPT, model=broken_model)
    assert "its weights cannot be read" in message and "Permission denied" in message


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"dense_layers": [0, 99]}, "dense_layers names 99, but transformer has blocks 0 to 1"),
        ({"budget_schedule": [{"at": 0, "budget": [0.2] * 7}]}, "gives 7 budgets at 0, but transformer has 2 blocks"),
        ({"budget_schedule": [{"at": 0, "budget": 0.2, "expert": "other"}]}, "names expert 'other'"),
    ],
)
def test_settings_of_another_model(refused, psa_compare, calls, saved_model, tmp_path, settings, says):
    file = tmp_path / "settings.yaml"
    file.write_text(json.dumps(settings))
    assert says in refused(*PROMPT, "--config", file)
    run = psa_compare(*PROMPT, "--model", saved_model, "--config", file, "--output", tmp_path / "compared")
    assert run.code == 2 and says in run.err and len(run.err.splitlines()) <= 2
    assert calls == []  # nor was the dense video made first


def test_a_component_that_is_not_there(refused, broken_model):
    shutil.rmtree(broken_model / "vae")
    assert "has no folder vae" in refused(*PROMPT, model=broken_model)


# -- output ---------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write to the output folder" in refused(*PROMPT, output=tmp_path / "file" / "out")
    assert "cannot write to the output folder" in refused(*PROMPT, output=tmp_path / "file")
    assert "cannot write to the output folder" in refused(*PROMPT, output="/proc/none")


def test_existing_output_stays_unless_overwrite(psa_generate, saved_model, tmp_path):
    arguments = (*PROMPT, "--model", saved_model, "--steps", 1, "--output", tmp_path / "out")
    assert psa_generate(*arguments, "--compare").code == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    run = psa_generate(*arguments)
    assert run.code == 2 and "--overwrite" in run.err and "video.mp4" in run.err
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert psa_generate(*arguments, "--seed", 1, "--overwrite").code == 0
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"video.mp4", "run.json"}  # no dense video of another run stays beside the new one
    assert json.loads((tmp_path / "out" / "run.json").read_text())["seed"] == 1


def test_a_stopped_run_is_made_again_by_the_same_command(psa_generate, saved_model, tmp_path, monkeypatch):
    arguments = (*PROMPT, "--model", saved_model, "--steps", 1, "--output", tmp_path / "out")
    with monkeypatch.context() as patch:

        def stop(*arguments):
            raise KeyboardInterrupt

        patch.setattr(generation, "write_video", stop)
        assert psa_generate(*arguments).code == 130
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["run.json"]
    other = psa_generate(*arguments, "--seed", 1)
    assert other.code == 2 and "--overwrite" in other.err
    assert psa_generate(*arguments).code == 0 and (tmp_path / "out" / "video.mp4").is_file()
    assert psa_generate(*arguments).code == 2  # it is finished now


@pytest.mark.parametrize("stopped", ["raise KeyboardInterrupt", "exec('raise KeyboardInterrupt')"])
def test_an_interrupt_at_any_moment_ends_with_its_exit_code(stopped, tmp_path):
    """Also where code that is executed from text is running, as in many libraries' imports."""
    (tmp_path / "stopped.py").write_text(f"""
import sys
sys.path.append({str(Path(pipeline.__file__).parents[2])!r})
from psa_diffusers.cli.errors import run_command
def app(**options):
    {stopped}
sys.exit(run_command("psa-generate", app, []))
""")
    done = subprocess.run([sys.executable, "-m", "stopped"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "psa-generate: stopped; finished files were kept.\n")


def test_a_failed_overwrite_loses_nothing(psa_generate, saved_model, tmp_path, monkeypatch):
    arguments = (*PROMPT, "--model", saved_model, "--steps", 1, "--output", tmp_path / "out")
    assert psa_generate(*arguments).code == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def fail(*arguments, **options):
        raise RuntimeError("something broke")

    monkeypatch.setattr(generation, "generate", fail)
    run = psa_generate(*arguments, "--overwrite")
    assert run.code == 1 and "RuntimeError: something broke" in run.err and "--debug" in run.err
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_a_disk_that_is_full(psa_generate, saved_model, tmp_path, monkeypatch):
    def full(path, *arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(generation, "write_video", full)
    run = psa_generate(*PROMPT, "--model", saved_model, "--steps", 1, "--output", tmp_path / "out")
    assert run.code == 1 and "No space left on device" in run.err


# -- the form of errors ---------------------------------------------------------------------------------------------


def test_debug_shows_the_traceback(psa_generate, saved_model):
    run = psa_generate("--prompt", "", "--model", saved_model, "--debug")
    assert run.code == 2 and "Traceback" in run.err and "prompt is empty" in run.err


def test_with_json_an_error_is_json_too(psa_generate, saved_model):
    run = psa_generate("--prompt", "", "--model", saved_model, "--json")
    assert run.code == run.json["exit_code"] == 2 and "prompt is empty" in run.json["error"]
    assert psa_generate("--bogus", "--json").json["exit_code"] == 2


def test_out_of_memory_says_what_helps(psa_generate, saved_model, tmp_path, monkeypatch):
    from diffusers import WanPipeline

    def too_large(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(WanPipeline, "__call__", too_large)
    run = psa_generate(*PROMPT, "--model", saved_model, "--output", tmp_path / "out")
    assert run.code == 1 and "--offload" in run.err
