"""psa-doctor on every family of models: by hand at full size, and as a command on a tiny configuration of each."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch

from psa_diffusers.cli.doctor import app
from psa_diffusers.cli.errors import run_command
from psa_diffusers.cli.model_files import compression
from psa_diffusers.config import PSAConfig
from psa_diffusers.integration.example_inputs import EXAMPLES
from psa_diffusers.integration.forecast import forecast, measure_layer
from psa_diffusers.integration.models import ROWS

from ..integration.tiny_models import TINY

FRAMEPACK = {"has_image_proj": True, "has_clean_x_embedder": True, "num_layers": 2, "num_single_layers": 4}
EASYANIMATE = {"in_channels": 16, "out_channels": 16, "patch_size": 2, "num_layers": 6}
CONSISID = {"is_train_face": True}

# Of usual sizes; where few layers tell as much, there are few. Class, settings beside its defaults, latents; then the
# tokens with text and conditioning, layers, and heads x head_dim, by hand.
OTHERS = {
    "HunyuanVideo 720p": (
        ("HunyuanVideoTransformer3DModel", {"guidance_embeds": True}, (33, 90, 160)),
        (33 * 45 * 80 + 256, 20 + 40, 24 * 128),
    ),
    "CogVideoX 5B": (
        ("CogVideoXTransformer3DModel", {"num_attention_heads": 48, "num_layers": 42}, (13, 60, 90)),
        (13 * 30 * 45 + 226, 42, 48 * 64),
    ),
    "CogVideoX 1.5": (
        (
            "CogVideoXTransformer3DModel",
            {"num_attention_heads": 48, "patch_size_t": 2, "sample_frames": 81},
            (21, 60, 90),
        ),
        (11 * 30 * 45 + 226, 30, 48 * 64),
    ),
    "LTX": (("LTXVideoTransformer3DModel", {}, (21, 16, 22)), (21 * 16 * 22, 28, 32 * 64)),
    "ChronoEdit": (("ChronoEditTransformer3DModel", {}, (2, 60, 104)), (2 * 30 * 52, 40, 40 * 128)),
    "SkyReels-V2": (("SkyReelsV2Transformer3DModel", {}, (25, 68, 120)), (25 * 34 * 60, 32, 16 * 128)),
    "AnyFlow": (("AnyFlowTransformer3DModel", {}, (21, 60, 104)), (21 * 30 * 52, 40, 40 * 128)),
    "Kandinsky 5": (
        ("Kandinsky5Transformer3DModel", {"visual_cond": True, "num_visual_blocks": 30}, (31, 64, 96)),
        (31 * 32 * 48, 30, 2048),
    ),
    "Motif-Video": (("MotifVideoTransformer3DModel", {}, (31, 92, 160)), (31 * 46 * 80 + 512, 20 + 40, 24 * 128)),
    "Wan-Animate": (("WanAnimateTransformer3DModel", {"num_layers": 5}, (21, 90, 160)), (21 * 45 * 80, 5, 40 * 128)),
    # Two clean frames, two at half and sixteen at a quarter of the resolution; then image and text.
    "Framepack": (
        ("HunyuanVideoFramepackTransformer3DModel", FRAMEPACK, (9, 90, 160)),
        (11 * 45 * 80 + 23 * 40 + 4 * 12 * 20 + 729 + 256, 2 + 4, 24 * 128),
    ),
    "HunyuanVideo-1.5": (
        ("HunyuanVideo15Transformer3DModel", {"num_layers": 6}, (31, 30, 53)),
        (31 * 30 * 53 + 729 + 256 + 1000, 6, 16 * 128),
    ),
    "ConsisID": (
        ("ConsisIDTransformer3DModel", {"num_attention_heads": 48, "num_layers": 6, **CONSISID}, (13, 60, 90)),
        (13 * 30 * 45 + 226, 6, 48 * 64),
    ),
    "LTX-2": (("LTX2VideoTransformer3DModel", {"num_layers": 6}, (16, 16, 24)), (16 * 16 * 24, 6, 32 * 128)),
    "Mochi": (("MochiTransformer3DModel", {"num_layers": 6}, (15, 60, 106)), (15 * 30 * 53 + 256, 6, 24 * 128)),
    "Cosmos": (("CosmosTransformer3DModel", {"num_layers": 6}, (24, 88, 160)), (24 * 44 * 80, 6, 32 * 128)),
    "Kandinsky 6": (("Kandinsky6Transformer3DModel", {"num_visual_blocks": 6}, (31, 64, 96)), (31 * 32 * 48, 6, 4096)),
    "Allegro": (("AllegroTransformer3DModel", {"num_layers": 6}, (22, 90, 160)), (22 * 45 * 80, 6, 24 * 96)),
    "EasyAnimate": (
        (
            "EasyAnimateTransformer3DModel",
            {"in_channels": 16, "out_channels": 16, "patch_size": 2, "num_layers": 6},
            (13, 64, 64),
        ),
        (13 * 32 * 32 + 256, 6, 48 * 64),
    ),
    # Two frames of the history as they are, two at half and sixteen at a quarter of the resolution.
    "Helios": (
        ("HeliosTransformer3DModel", {"num_layers": 6}, (9, 48, 80)),
        (11 * 24 * 40 + 12 * 20 + 4 * 6 * 10, 6, 40 * 128),
    ),
    # 124 frames: 207 latents of sound in each of two channels.
    "MiniMax-H3": (
        ("MiniMaxH3Transformer3DModel", {"num_layers": 6}, (37, 48, 84)),
        (37 * 24 * 42 + 512 + 2 * 207, 6, 56 * 128),
    ),
}


@pytest.mark.parametrize("model", OTHERS)
def test_other_families(model):
    (name, settings, latents), (tokens, layers, width) = OTHERS[model]
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    if name.startswith(("Cog", "Cons")):
        settings = {**settings, "use_rotary_positional_embeddings": True}
    seen = forecast(name, settings, latents, PSAConfig())
    assert (seen.tokens, seen.sparse_calls, seen.heads * seen.head_dim) == (tokens, layers, width)
    assert seen.attention_flops == layers * 4 * tokens**2 * width
    assert seen.other_flops > layers * 2 * tokens * 4 * width**2 and seen.dense_reasons == {}
    (row,) = [row for row in ROWS if name in row.transformers]
    for preset in map(PSAConfig.preset, row.presets):
        assert seen.least_budget(preset) < preset.compute_budget / 1.15  # something is left for the video


SMALL = {
    "HunyuanVideoTransformer3DModel": {"num_single_layers": 1, "num_refiner_layers": 1, "rope_axes_dim": [4, 4, 8]},
    "CogVideoXTransformer3DModel": {"use_rotary_positional_embeddings": True},
    "LTXVideoTransformer3DModel": {"cross_attention_dim": 32},
    "AnyFlowTransformer3DModel": {"freq_dim": 32},
    "Kandinsky5Transformer3DModel": {"model_dim": 32, "ff_dim": 32, "axes_dims": [4, 4, 8], "num_text_blocks": 1},
    "MotifVideoTransformer3DModel": {"num_single_layers": 4, "rope_axes_dim": [4, 4, 8], "text_embed_dim": 16},
}


@pytest.mark.parametrize("name", SMALL)
def test_other_families_can_be_measured(name):
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    settings = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, **SMALL[name]}
    times = measure_layer(name, settings, (5, 16, 16), PSAConfig(backend="torch"))
    assert 0 < times.dense_attention < times.dense and 0 < times.planning < times.sparse


VAES = {
    "AutoencoderKLWan": (4, 8),
    "AutoencoderKLHunyuanVideo": (4, 8),
    "AutoencoderKLCogVideoX": (4, 8),
    "AutoencoderKLLTXVideo": (8, 32),
    "AutoencoderKLMochi": (6, 8),
    "AutoencoderKLCosmos": (8, 8),
    "AutoencoderKLAllegro": (4, 8),
    "AutoencoderKLMagvit": (4, 8),
    "AutoencoderKLHunyuanVideo15": (4, 16),
    "AutoencoderKLMiniMaxH3": (4, 16),
}


@pytest.mark.parametrize("name", VAES)
def test_compression_of_vaes(name):
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    with torch.device("meta"):
        settings = {"_class_name": name, **getattr(diffusers, name)().config}
    assert compression(settings) == VAES[name]


def test_a_compression_that_is_said_goes_before_one_that_is_worked_out():
    said = {"temporal_compression_ratio": 8, "spatial_compression_ratio": 32, "spatio_temporal_scaling": [True] * 4}
    assert compression(said) == (8, 32)


@pytest.mark.parametrize(
    ("name", "frames", "latents"),
    [
        ("WanTransformer3DModel", 81, 21),
        ("AllegroTransformer3DModel", 88, 22),
        ("HunyuanVideoFramepackTransformer3DModel", 129, 9),
        ("HeliosTransformer3DModel", 132, 9),
        ("WanAnimateTransformer3DModel", 200, 21),  # 77 frames and the reference
        ("MiniMaxH3Transformer3DModel", 124, 37),
        ("MiniMaxH3Transformer3DModel", 120, 37),  # rounded up
        ("MiniMaxH3Transformer3DModel", 5, 2),
    ],
)
def test_latent_frames(name, frames, latents):
    assert EXAMPLES[name].latent_frames(frames, 4) == latents


# -- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def doctor(capsys, tmp_path):
    """psa-doctor on a folder with the configuration files of a tiny pipeline, and no weights."""

    def run(name, *arguments, index="model_index.json"):
        tiny, folder = TINY[name], tmp_path / name
        config = {key: value for key, value in tiny.build().config.items() if not key.startswith("_")}
        part = ["diffusers", tiny.model]
        if index != "model_index.json":
            part = [None, None, {"type_hint": part, "subfolder": "transformer"}]
        files = {
            index: {"_class_name": "SomePipeline", "transformer": part, "vae": [None, None]},
            "transformer/config.json": config,
            "vae/config.json": {"temporal_compression_ratio": 4, "spatial_compression_ratio": 8},
        }
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(json.dumps(content))
        capsys.readouterr()
        size = ["--num-frames", "29", "--height", "256", "--width", "256", "--steps", "8"]
        code = run_command("psa-doctor", app, ["--model", str(folder), *size, *arguments])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("name", TINY)
def test_every_family_gets_its_ceiling(name, doctor):
    code, out, err = doctor(name, "--json")
    assert code == 0, err
    found = json.loads(out)
    (part,), estimate, calls = found["transformers"], found["estimate"], TINY[name].calls
    assert (part["sparse_calls"], part["dense_reasons"], part["no_forecast"]) == (calls, {}, None)
    share, budget = part["attention_share"], estimate["compute_budget"]
    assert estimate["run"] == pytest.approx(8 / (2 + 6 * (1 - share + share * budget)))
    assert 1 < estimate["run"] < estimate["step"] < estimate["free_attention_step"]
    assert budget == max(0.15, part["least_budget"])
    code, out, _ = doctor(name)
    assert code == 0 and f"{calls} self-attention calls sparse in a sparse step" in out
    assert f"{estimate['step']:.2f}x for a sparse step and {estimate['run']:.2f}x for all steps" in out
    assert (f"a forward is taken to see {part['counted']}." in out) == bool(EXAMPLES[TINY[name].model].counted)


def test_a_history_that_costs_more_than_the_budget(doctor):
    found = json.loads(doctor("helios", "--json")[1])
    assert found["estimate"]["compute_budget"] > found["estimate"]["above_asked"] == 0.15
    out = doctor("helios")[1]
    assert "above the 0.15 asked for: text and conditioning stay at full resolution." in out
    assert "asked for" not in doctor("helios", "--compute-budget", "0.9")[1]


def test_frames_of_other_numbers(doctor):
    assert doctor("allegro", "--num-frames", "88")[0] == 0
    code, _, err = doctor("chronoedit", "--num-frames", "88")
    assert code == 2 and "the nearest: 85 or 89" in err


def test_a_modular_pipeline(doctor):
    code, out, err = doctor("minimax", "--json", index="modular_model_index.json")
    assert code == 0, err
    assert json.loads(out)["transformers"][0]["class"] == "MiniMaxH3Transformer3DModel"


def test_layers_that_are_not_alike_are_not_timed(doctor):
    measured = json.loads(doctor("wan-animate", "--measure", "--json")[1])["measured"]
    assert measured == {
        "skipped": "the layers of WanAnimateTransformer3DModel are not alike, so that one tells little of the others."
    }


def test_a_newer_ltx_2():
    """Text that comes ready projected, and modulation of cross-attention."""
    tiny = TINY["ltx-2"]
    config = dict(tiny.build().config)
    changes = {"use_prompt_embeddings": False, "cross_attn_mod": True, "audio_cross_attn_mod": True}
    if not changes.keys() <= config.keys():
        pytest.skip("this diffusers has none")
    assert forecast(tiny.model, {**config, **changes}, (5, 12, 12), PSAConfig()).sparse_calls == tiny.calls


def test_the_readme_names_no_family_without_a_ceiling():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    section = readme.split("## psa-doctor\n")[1].split("\n## ")[0]
    assert "every family of the table" in " ".join(section.split())
