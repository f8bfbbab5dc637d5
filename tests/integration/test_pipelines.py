"""Whole pipelines of the families: their steps are found, and dense and sparse calls fall where they should."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import diffusers
import pytest
import torch

from psa_diffusers.integration import disable_psa, enable_psa, psa_statistics, schedule

from .tiny_models import TINY
from .tiny_parts import REAL, TEXT, noise, padding_mask
from .tiny_wan import tiny_config

SIZE = {"height": 64, "width": 80, "num_frames": 9}
PROMPTS = {"prompt_embeds": noise(1, TEXT, 16), "negative_prompt_embeds": noise(1, TEXT, 16, seed=1)}
MASKS = {
    "prompt_attention_mask": padding_mask(REAL, TEXT, 1),
    "negative_prompt_attention_mask": padding_mask(REAL[1:], TEXT, 1),
}
FLOW = "FlowMatchEulerDiscreteScheduler"
# Tiny model: pipeline, scheduler, arguments of a call, video self-attention calls of a step.
PIPELINES = {
    "hunyuan": (
        "HunyuanVideoPipeline",
        FLOW,
        {**SIZE, **MASKS, **PROMPTS, "pooled_prompt_embeds": noise(1, 8), "negative_prompt_embeds": None},
        3,
    ),
    "cogvideox": (
        "CogVideoXPipeline",
        "CogVideoXDDIMScheduler",
        {**SIZE, "prompt_embeds": noise(1, TEXT, 8), "negative_prompt_embeds": noise(1, TEXT, 8, seed=1)},
        2,
    ),
    "ltx": ("LTXPipeline", FLOW, {**PROMPTS, **MASKS, "height": 128, "width": 160, "num_frames": 17}, 2),
    # Two samples, each in a call of its own.
    "mochi": ("MochiPipeline", FLOW, {**SIZE, **PROMPTS, **MASKS, "num_frames": 13}, 2 * 2),
    "allegro": (
        "AllegroPipeline",
        "EulerAncestralDiscreteScheduler",
        {**SIZE, **PROMPTS, **MASKS, "negative_prompt": None},
        2,
    ),
    "skyreels": ("SkyReelsV2Pipeline", "UniPCMultistepScheduler", {**SIZE, **PROMPTS}, 2 * 2),
    # These copy their timesteps.
    "easyanimate": ("EasyAnimatePipeline", FLOW, {**SIZE, **PROMPTS, **MASKS}, 2),
    "kandinsky-5": (
        "Kandinsky5T2VPipeline",
        FLOW,
        {
            **SIZE,
            "prompt_embeds_qwen": noise(1, TEXT, 16),
            "prompt_embeds_clip": noise(1, 8),
            "prompt_cu_seqlens": torch.tensor([0, TEXT], dtype=torch.int32),
            "guidance_scale": 1.0,
        },
        2,
    ),
    "anyflow": ("AnyFlowPipeline", "FlowMapEulerDiscreteScheduler", {**SIZE, **PROMPTS}, 2),
}


def make(name):
    pipeline, scheduler, _, _ = PIPELINES[name]
    transformer = TINY[name].build()
    cls = getattr(diffusers, pipeline)
    needed = inspect.signature(cls).parameters.values()
    parts = {part.name: None for part in needed if part.default is inspect.Parameter.empty}
    pipe = cls(**{**parts, "transformer": transformer, "scheduler": getattr(diffusers, scheduler)()})
    pipe.vae = SimpleNamespace(config=SimpleNamespace(latent_channels=4), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, name, steps=4):
    inputs = {"num_inference_steps": steps, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipe(**inputs, **PIPELINES[name][2]).frames


@pytest.mark.parametrize("readable", [True, False], ids=["cpu", "as on a gpu"])
@pytest.mark.parametrize("name", PIPELINES)
def test_steps_and_calls(name, readable, monkeypatch):
    if not readable:
        monkeypatch.setattr(schedule, "_is_readable", lambda *_: False)
    pipe, calls = make(name), PIPELINES[name][3]
    native = generate(pipe, name)
    enable_psa(pipe, tiny_config(backend="reference", dense_last=0.25))
    sparse = generate(pipe, name)
    statistics = psa_statistics(pipe)
    assert [kind for *_, kind in statistics.steps] == ["dense", "sparse", "sparse", "dense"]
    assert statistics.sparse_calls == 2 * calls
    assert statistics.dense_reasons == {"dense warm-up": calls, "dense last steps": calls}
    assert (sparse - native).abs().max() > 1e-5
    assert torch.equal(generate(disable_psa(pipe), name), native)
