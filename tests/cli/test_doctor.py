"""psa-doctor: what it predicts is what a run then does; what it measures is of this machine; what it refuses."""

from __future__ import annotations

import json
import shutil

import diffusers
import pytest
import torch

from psa_diffusers.cli.doctor import app
from psa_diffusers.cli.errors import run_command
from psa_diffusers.config import PSAConfig
from psa_diffusers.integration.example_inputs import EXAMPLES, Example
from psa_diffusers.integration.forecast import expected_budget, forecast, measure_layer, speedup_ceiling

WAN_1_3B = {
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "in_channels": 16,
    "num_attention_heads": 12,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "text_dim": 4096,
}
TINY = {**WAN_1_3B, "attention_head_dim": 16, "num_attention_heads": 2, "num_layers": 3, "ffn_dim": 32, "text_dim": 8}


@pytest.fixture
def doctor(capsys, saved_model):
    def run(*arguments, model=saved_model):
        capsys.readouterr()
        code = run_command("psa-doctor", app, [str(part) for part in ("--model", model, *arguments)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def diagnosis(doctor):
    def run(*arguments, code=0, **options):
        found, out, err = doctor(*arguments, "--json", **options)
        assert found == code, err
        return json.loads(out)

    return run


def test_the_report_in_words(doctor):
    code, out, _ = doctor()
    assert code == 0
    for part in (f"torch {torch.__version__}", "cpu: ", "Backend on cpu in float32: torch. Triton is not used"):
        assert part in out
    assert "(WanPipeline), 5 frames of 64x64, 4 steps" in out
    assert "2 self-attention calls sparse in a sparse step, over 128 tokens (grid 2 x 8 x 8), 2 heads x 32" in out
    assert "Steps: 1 dense, 3 sparse." in out
    assert "(counted, not measured). Were all equally fast, the ceiling by Amdahl's law would be" in out
    assert "Measured" not in out and "Problem" not in out


def test_what_it_predicts_is_what_a_run_does(diagnosis, psa_generate, saved_model, tmp_path):
    options = ["--steps", 5, "--compute-budget", 0.4]
    found = diagnosis(*options)
    folder = tmp_path / "out"
    run = psa_generate("--prompt", "a red circle", "--model", saved_model, *options, "--output", folder, "--json")
    record = run.json
    (transformer,) = found["transformers"]
    steps = found["steps"]
    assert (steps["dense"], steps["sparse"]) == (record["dense_steps"], record["sparse_steps"]) == (2, 3)
    assert record["sparse_calls"] == transformer["sparse_calls"] * steps["sparse"]
    assert record["dense_calls"] == transformer["sparse_calls"] * steps["dense"]
    assert (record["backend"], record["backend_reason"]) == (found["backend"], found["backend_reason"])
    assert record["config"] == found["config"] and steps["note"] in record["notes"]
    assert abs(record["compute_budget_sparse_calls"] - found["estimate"]["compute_budget"]) < 0.1


def test_the_numbers_are_amdahls(diagnosis):
    found = diagnosis("--steps", 8)
    estimate, share = found["estimate"], found["estimate"]["attention_share"]
    assert 0 < share < 1
    assert estimate["free_attention_step"] == pytest.approx(1 / (1 - share))
    assert estimate["step"] == pytest.approx(1 / (1 - share * 0.85))
    assert estimate["run"] == pytest.approx(8 / (2 + 6 * (1 - share * 0.85)))
    assert 1 < estimate["run"] < estimate["step"] < estimate["free_attention_step"]
    assert "not measured" in estimate["kind"] and "planning" in estimate["not_counted"]


@pytest.mark.parametrize(("preset", "budget"), [("psa-3", 0.25), ("psa-threshold", None)])
def test_presets(preset, budget, diagnosis, doctor):
    estimate = diagnosis("--preset", preset)["estimate"]
    assert estimate["compute_budget"] == (budget and pytest.approx(budget))
    assert (estimate["step"] is None) == (budget is None)
    assert "if attention cost nothing" in doctor("--preset", preset)[1]


def test_it_measures_a_layer(diagnosis, doctor):
    measured = diagnosis("--measure")["measured"]
    assert 0 < measured["dense_attention"] < measured["dense"] and 0 < measured["attention_share"] < 1
    assert 0 < measured["planning"] + measured["attention"] < measured["sparse"]
    assert measured["step"] == pytest.approx(measured["dense"] / measured["sparse"])
    assert measured["run"] == pytest.approx(4 / (1 + 3 / measured["step"]))
    assert "Measured here, one layer with random weights" in doctor("--measure")[1]


def test_it_does_not_measure_what_takes_minutes(diagnosis):
    measured = diagnosis("--measure", "--num-frames", 81, "--height", 480, "--width", 832)["measured"]
    assert set(measured) == {"skipped"} and "more than seconds on cpu; take a smaller size" in measured["skipped"]


# -- where nothing is sparse ------------------------------------------------------------------------------------------


def test_too_few_tokens(diagnosis, doctor):
    options = ["--num-frames", 1, "--height", 64, "--width", 64]
    found = diagnosis(*options, code=1)
    assert found["sparse"] is False and found["estimate"] is None
    assert found["problems"] == ["all self-attention of transformer stays dense: one block of keys (2 calls)."]
    assert "Problem: all self-attention of transformer stays dense" in doctor(*options)[1]


def test_all_steps_dense(diagnosis):
    found = diagnosis("--steps", 1, code=1)
    assert found["problems"] == ["all 1 steps are dense; lower dense_warmup, or take more steps."]
    assert "so that nothing is sparse" in found["steps"]["note"]


def test_a_backend_that_cannot_run_here(diagnosis, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    PSAConfig(backend="triton").save(tmp_path / "config.yaml")
    found = diagnosis("--config", tmp_path / "config.yaml", code=1)
    assert found["backend"] is None and "use backend='auto'" in found["backend_reason"]
    assert found["problems"] == [found["backend_reason"]]


def rewritten(folder, component, **changes):
    path = folder / component
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_other_pipelines(diagnosis, broken_model):
    rewritten(broken_model, "model_index.json", _class_name="WanImageToVideoPipeline")
    rewritten(broken_model, "transformer/config.json", in_channels=12, image_dim=16, added_kv_proj_dim=64)
    found = diagnosis(model=broken_model)
    assert found["pipeline"] == "WanImageToVideoPipeline" and found["transformers"][0]["sparse_calls"] == 2


def test_two_experts(diagnosis, broken_model):
    shutil.copytree(broken_model / "transformer", broken_model / "transformer_2")
    rewritten(broken_model, "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"])
    assert [part["component"] for part in diagnosis(model=broken_model)["transformers"]] == [
        "transformer",
        "transformer_2",
    ]


def test_pipelines_that_psa_does_not_know(diagnosis, broken_model):
    rewritten(broken_model, "model_index.json", transformer=["diffusers", "FluxTransformer2DModel"])
    settings = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1, "attention_head_dim": 16}
    (broken_model / "transformer" / "config.json").write_text(json.dumps(settings))
    found = diagnosis(model=broken_model, code=1)
    assert "FluxTransformer2DModel" in found["problems"][0] and found["transformers"][0]["sparse_layers"] == 0


def other_transformer(folder, name, **settings):
    rewritten(folder, "model_index.json", transformer=["diffusers", name])
    (folder / "transformer" / "config.json").write_text(json.dumps(settings))
    return folder


def test_a_model_with_nothing_to_make_sparse(diagnosis, broken_model):
    if not hasattr(diffusers, "SanaVideoTransformer3DModel"):
        pytest.skip("this diffusers has no SanaVideo")
    found = diagnosis(model=other_transformer(broken_model, "SanaVideoTransformer3DModel", num_layers=2), code=1)
    (problem,) = found["problems"]
    assert problem.startswith("SanaVideoTransformer3DModel stays dense: its attention is linear")


def test_a_model_without_an_estimate(diagnosis, doctor, broken_model, monkeypatch):
    monkeypatch.delitem(EXAMPLES, "MochiTransformer3DModel")
    model = other_transformer(broken_model, "MochiTransformer3DModel", num_layers=2)
    found = diagnosis(model=model)
    assert found["sparse"] is True and found["estimate"] is found["measured"] is None
    out = doctor(model=model)[1]
    assert "2 layers would be sparse. psa-doctor cannot tell the tokens" in out and "No estimate" in out


def test_an_estimate_that_fails_says_why(diagnosis, doctor, monkeypatch):
    def fails(*_):
        raise RuntimeError("a mode of its own")

    monkeypatch.setitem(EXAMPLES, "WanTransformer3DModel", Example(fails))
    found = diagnosis()
    assert found["sparse"] is True and found["estimate"] is None
    assert "a trial forward of WanTransformer3DModel without data fails: a mode of its own" in doctor()[1]


def test_a_class_of_another_diffusers(diagnosis, broken_model):
    rewritten(broken_model, "model_index.json", transformer=["diffusers", "FutureTransformer3DModel"])
    assert "has no class FutureTransformer3DModel" in diagnosis(model=broken_model, code=1)["problems"][0]


def test_a_unet_pipeline(diagnosis, broken_model):
    (broken_model / "unet").mkdir()
    parts = {"transformer": [None, None], "unet": ["diffusers", "UNet3DConditionModel"]}
    rewritten(broken_model, "model_index.json", _class_name="TextToVideoSDPipeline", **parts)
    (problem,) = diagnosis(model=broken_model, code=1)["problems"]
    assert problem.endswith("(TextToVideoSDPipeline) has no transformer.")


# -- wrong usage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "70"], "--height must be a multiple of 16"),
        (["--num-frames", "6"], "the nearest: 5 or 9"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--compute-budget", "2"], "--compute-budget must be in (0, 1]"),
        (["--preset", "psa-9"], "no preset 'psa-9'"),
        (["--device", "tpu"], "--device takes cpu, cuda"),
        (["--dtype", "int8"], "--dtype takes float32"),
        (["--model", "no/such/folder"], "there is no model folder"),
        (["--speed"], "No such option"),
    ],
)
def test_wrong_usage(arguments, message, doctor):
    code, out, err = doctor(*arguments)
    assert code == 2 and out == ""
    assert message in err and len(err.strip().splitlines()) <= 2
    code, out, _ = doctor(*arguments, "--json")
    assert json.loads(out)["exit_code"] == code == 2


def test_a_broken_model(doctor, broken_model):
    (broken_model / "transformer" / "config.json").write_text("{")
    code, _, err = doctor(model=broken_model)
    assert code == 2 and "transformer/config.json is missing or cannot be read" in err
    (broken_model / "transformer" / "config.json").write_text('{"patch_size": "large"}')
    code, _, err = doctor(model=broken_model)
    assert code == 2 and "is not complete or is corrupt" in err
    (broken_model / "transformer" / "config.json").write_text('{"num_layers": "two"}')
    code, _, err = doctor(model=broken_model)
    assert code == 2 and "no WanTransformer3DModel comes of transformer/config.json" in err


def test_help_has_an_example(capsys):
    assert run_command("psa-doctor", app, ["--help"]) == 0
    assert "Example: psa-doctor --model" in " ".join(capsys.readouterr().out.split())


# -- the forecast itself ----------------------------------------------------------------------------------------------


def test_flops_of_a_large_model_by_hand():
    """Wan 2.1 1.3B, 81 frames of 832x480: every product of matrices of a forward, counted by hand."""
    tokens, text, width, ffn, layers = 21 * 30 * 52, 512, 1536, 8960, 30
    seen = forecast("WanTransformer3DModel", WAN_1_3B, (21, 60, 104), PSAConfig())
    assert (seen.grid, seen.tokens, seen.heads, seen.head_dim) == ((21, 30, 52), tokens, 12, 128)
    assert seen.sparse_calls == layers and seen.dense_reasons == {}
    assert seen.attention_flops == layers * 4 * tokens**2 * width
    linear = 2 * tokens * (6 * width**2 + 2 * width * ffn)  # projections of both attentions' queries, and so on
    cross = 2 * text * 2 * width**2 + 4 * tokens * text * width
    patches = 2 * tokens * width * 2 * 16 * 4  # into tokens and back
    embeddings = 2 * text * (4096 * width + width**2) + 2 * (256 * width + width**2 + 6 * width**2)
    assert seen.other_flops == layers * (linear + cross) + patches + embeddings


def test_dense_layers_are_not_in_the_forecast():
    seen = forecast("WanTransformer3DModel", TINY, (5, 16, 16), PSAConfig(dense_layers=(0, 2)))
    whole = forecast("WanTransformer3DModel", TINY, (5, 16, 16), PSAConfig())
    assert seen.sparse_calls == 1 and seen.dense_reasons == {"dense layer": 2}
    assert seen.attention_flops == whole.attention_flops / 3
    assert seen.attention_flops + seen.other_flops == whole.attention_flops + whole.other_flops


def test_vace_blocks_are_in_the_forecast():
    settings = {**TINY, "vace_layers": [0, 1], "vace_in_channels": 96}
    seen = forecast("WanVACETransformer3DModel", settings, (5, 16, 16), PSAConfig())
    assert seen.sparse_calls == 5
    assert measure_layer("WanVACETransformer3DModel", settings, (5, 16, 16), PSAConfig()).dense > 0


def test_models_without_a_forecast_are_named():
    with pytest.raises(ValueError, match="no forecast for OtherModel; there is one for WanTransformer3DModel"):
        forecast("OtherModel", {}, (1, 1, 1), PSAConfig())


def test_ceilings():
    assert speedup_ceiling(0.0, 0.1) == 1.0
    assert speedup_ceiling(0.5, 1.0) == 1.0
    assert speedup_ceiling(0.5, 0.0) == 2.0
    assert speedup_ceiling(0.5, 0.0, dense_steps=2, steps=4) == pytest.approx(4 / 3)
    assert speedup_ceiling(0.9, 0.1, dense_steps=4, steps=4) == 1.0


def test_expected_budgets():
    assert expected_budget(PSAConfig(compute_budget=0.3)) == 0.3
    assert expected_budget(PSAConfig.preset("psa-1")) == pytest.approx(0.25)
    assert expected_budget(PSAConfig.preset("psa-threshold")) is None
