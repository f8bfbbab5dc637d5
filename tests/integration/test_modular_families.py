"""Modular pipelines of other families than Wan: their steps are found from guiders, schedulers or timesteps."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import diffusers
import pytest
import torch

from psa_diffusers.integration import disable_psa, enable_psa, psa_statistics, schedule
from psa_diffusers.integration.schedule import Step, StepClock

from .tiny_models import TINY
from .tiny_parts import TEXT, noise
from .tiny_pipelines import GLYPHS, PROMPTS, SoundCodec, masks
from .tiny_wan import tiny_config

FLOW = "FlowMatchEulerDiscreteScheduler"
MINIMAX = "minimax_h3.modular_blocks_minimax_h3"
MINIMAX_SIZE = {"height": 128, "width": 160, "num_frames": 124}  # 37 latent frames
PACKED = {"prompt_embeds": noise(1, TEXT, 16), "text_token_tags": torch.zeros(TEXT, dtype=torch.long), **MINIMAX_SIZE}
REFERENCES = {
    "normalized_references": [SimpleNamespace(kind="image"), SimpleNamespace(kind="audio")],
    "condition_latents": [noise(1, 24, 1, 8, 10)],
    "audio_condition_latents": [noise(2 * 6, 32)],
}
KEYFRAME = {"keyframe_anchors": ("first",), "condition_latents": [noise(1, 24, 1, 8, 10)]}
CONNECTED = {
    f"{sign}connector_{name}": noise(1, TEXT, 16, seed=seed)
    for seed, sign in enumerate(("", "negative_"))
    for name in ("prompt_embeds", "audio_prompt_embeds")
}
WIDE = {"in_channels": 128, "out_channels": 128}
H3 = {"in_channels": 24, "audio_in_channels": 32}
SMALL = {"height": 128, "width": 160, "num_frames": 17}

# Module and class of the denoising blocks, tiny model, changes to it, arguments, schedulers, calls of a step.
FAMILIES = {
    "hunyuan-1.5": (
        "hunyuan_video1_5.modular_blocks_hunyuan_video1_5",
        "HunyuanVideo15CoreDenoiseStep",
        ("hunyuan-1.5", {"in_channels": 65, "out_channels": 32}),
        {
            **PROMPTS,
            **GLYPHS,
            **masks("prompt_embeds_mask", "negative_prompt_embeds_mask"),
            **masks("prompt_embeds_mask_2", "negative_prompt_embeds_mask_2", lengths=(2, 4), tokens=5),
            "height": 80,
            "width": 112,
            "num_frames": 9,
        },
        {"scheduler": (FLOW, {})},
        2 * 2,
    ),
    "ltx": (
        "ltx.modular_blocks_ltx",
        "LTXCoreDenoiseStep",
        ("ltx", WIDE),
        {**PROMPTS, **masks("prompt_attention_mask", "negative_prompt_attention_mask"), **SMALL},
        {"scheduler": (FLOW, {})},
        2 * 2,
    ),
    "ltx-2": (
        "ltx2.modular_blocks_ltx2",
        "LTX2CoreDenoiseStep",
        ("ltx-2", WIDE | {"audio_in_channels": 128, "audio_out_channels": 128}),
        {
            **CONNECTED,
            **masks("connector_attention_mask", "negative_connector_attention_mask"),
            **SMALL,
            "batch_size": 1,
            "dtype": torch.float32,
        },
        {"scheduler": (FLOW, {})},
        None,  # as many forwards as its guider asks for
    ),
    "helios": (
        "helios.modular_blocks_helios",
        "HeliosCoreDenoiseStep",
        ("helios", {"in_channels": 16, "out_channels": 16}),
        {**PROMPTS, "height": 64, "width": 80, "num_frames": 18, "num_latent_frames_per_chunk": 3},
        {"scheduler": ("HeliosScheduler", {"stages": 1})},
        2 * 2,
    ),
    "minimax": (
        MINIMAX,
        "MiniMaxH3CoreDenoiseStep",
        ("minimax", H3),
        PACKED,
        {"scheduler": ("MiniMaxH3Scheduler", {}), "audio_scheduler": ("MiniMaxH3Scheduler", {"shift": 3.0})},
        2,
    ),
    "minimax with a keyframe": (
        MINIMAX,
        "MiniMaxH3FL2VACoreDenoiseStep",
        ("minimax", H3),
        PACKED | KEYFRAME,
        {"scheduler": ("MiniMaxH3Scheduler", {}), "audio_scheduler": ("MiniMaxH3Scheduler", {"shift": 3.0})},
        2,
    ),
    "minimax with references": (
        MINIMAX,
        "MiniMaxH3Ref2VACoreDenoiseStep",
        ("minimax", H3),
        PACKED | REFERENCES,
        {"scheduler": ("MiniMaxH3Scheduler", {}), "audio_scheduler": ("MiniMaxH3Scheduler", {"shift": 3.0})},
        2,
    ),
}


def make(name):
    module, cls, (tiny, changes), _, schedulers, _ = FAMILIES[name]
    try:
        blocks = getattr(importlib.import_module(f"diffusers.modular_pipelines.{module}"), cls)()
    except (ImportError, AttributeError):
        pytest.skip(f"this diffusers has no {cls}")
    row = TINY[tiny]
    model = type(row)(row.model, row.config | changes, row.inputs, row.calls).build()
    pipe = blocks.init_pipeline()
    made = {part: getattr(diffusers, kind)(**settings) for part, (kind, settings) in schedulers.items()}
    pipe.update_components(**{"transformer_ref" if "references" in name else "transformer": model}, **made)
    if name == "ltx-2":
        pipe.audio_vae = SoundCodec()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, name):
    inputs = {"num_inference_steps": 8, "generator": torch.Generator().manual_seed(0), "output": "latents"}
    return pipe(**FAMILIES[name][3], **inputs)


@pytest.mark.parametrize("readable", [True, False], ids=["cpu", "as on a gpu"])
@pytest.mark.parametrize("name", FAMILIES)
def test_steps_and_calls(name, readable, monkeypatch):
    if not readable:
        monkeypatch.setattr(schedule, "_is_readable", lambda *_: False)
    pipe, calls = make(name), FAMILIES[name][5]
    native = run(pipe, name)
    enable_psa(pipe, tiny_config(backend="reference"))
    sparse = run(pipe, name)
    statistics = psa_statistics(pipe)
    total = len(pipe.scheduler.timesteps)  # MiniMax-H3's is one less than was asked for
    assert [step[:2] for step in statistics.steps] == [(index, total) for index in range(total)]
    assert [kind for *_, kind in statistics.steps] == ["dense"] * 2 + ["sparse"] * (total - 2)
    assert set(statistics.dense_reasons) == {"dense warm-up"}
    if calls is not None:
        assert (statistics.dense_calls, statistics.sparse_calls) == (2 * calls, (total - 2) * calls)
    assert (sparse - native).abs().max() > 1e-5
    assert torch.equal(run(disable_psa(pipe), name), native)


@pytest.mark.parametrize("others", [[], [0.6], [0.999]], ids=["alone", "sound", "keyframe"])
def test_timesteps_that_count_upwards(others):
    """The video's is the least of a call's: sound is ahead of it, and keyframes are held near the clean end."""

    class Pipe:
        class scheduler:
            timesteps = torch.tensor([0.0, 0.0137, 0.0323, 0.0588, 0.1, 0.1724, 0.3333])

    clock = StepClock()
    steps = [clock.locate(Pipe, torch.tensor([float(t), *others]))[0] for t in Pipe.scheduler.timesteps]
    assert steps == [Step(index, 7) for index in range(7)]
