"""Tiny pipelines that want more than embeddings: images, sound, guiders, or a video made window by window."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from .tiny_models import TINY
from .tiny_parts import REAL, TEXT, noise, padding_mask
from .tiny_wan import vae as wan_vae

FLOW = "FlowMatchEulerDiscreteScheduler"
PROMPTS = {"prompt_embeds": noise(1, TEXT, 16), "negative_prompt_embeds": noise(1, TEXT, 16, seed=1)}
SHORT_PROMPTS = {"prompt_embeds": noise(1, TEXT, 8), "negative_prompt_embeds": noise(1, TEXT, 8, seed=1)}
SIZE = {"height": 64, "width": 80, "num_frames": 9}
IMAGE = Image.new("RGB", (80, 64), (200, 40, 90))


@dataclass(frozen=True)
class TinyPipeline:
    """A pipeline around a tiny transformer.

    Attributes:
        pipeline, scheduler: Class names in diffusers.
        run: Arguments of a call.
        calls: Video self-attention calls of a step.
        tiny: The transformer's row in ``TINY``.
        schedule: The scheduler's settings.
        changes: To the transformer's configuration.
        parts: Makes parts that the pipeline cannot do without.
        after: Changes to the finished pipeline.
        windows: How often the steps are gone through.
    """

    pipeline: str
    scheduler: str
    run: dict[str, Any]
    calls: int
    tiny: str
    schedule: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)
    parts: Callable[[], dict[str, Any]] = dict
    after: Callable[[Any], None] = lambda pipe: None
    windows: int = 1

    def build(self):
        if not hasattr(diffusers, self.pipeline) or not hasattr(diffusers, self.scheduler):
            pytest.skip(f"this diffusers has no {self.pipeline}")
        cls, row = getattr(diffusers, self.pipeline), TINY[self.tiny]
        model = type(row)(row.model, row.config | self.changes, row.inputs, row.calls).build()
        needed = inspect.signature(cls).parameters.values()
        parts = {part.name: None for part in needed if part.default is inspect.Parameter.empty}
        scheduler = getattr(diffusers, self.scheduler)(**self.schedule)
        try:
            pipe = cls(**{**parts, **self.parts(), "transformer": model, "scheduler": scheduler})
        except ImportError as error:  # ConsisID wants OpenCV
            pytest.skip(str(error).strip())
        if pipe.vae is None:
            pipe.vae = Codec()
        self.after(pipe)
        pipe.set_progress_bar_config(disable=True)
        return pipe


class Codec(torch.nn.Module):
    """Stands in for an autoencoder of four latent channels: latents are means of pixels."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, temporal: int = 4, spatial: int = 8) -> None:
        super().__init__()
        self.temporal_compression_ratio, self.spatial_compression_ratio = temporal, spatial
        self.latents_mean, self.latents_std = torch.zeros(4), torch.ones(4)
        self.config = SimpleNamespace(
            latent_channels=4,
            z_dim=4,
            scaling_factor=1.0,
            invert_scale_latents=False,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )

    def encode(self, video):
        frames = (video.shape[2] - 1) // self.temporal_compression_ratio + 1
        size = (frames, *(side // self.spatial_compression_ratio for side in video.shape[3:]))
        latents = torch.nn.functional.interpolate(video[:, [0, 1, 2, 0]], size)
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda generator=None: latents, mode=lambda: latents))

    def decode(self, latents, return_dict=False):
        return (latents[:, :3].repeat_interleave(self.temporal_compression_ratio, 2),)


def guider() -> dict[str, Any]:
    return {"guider": diffusers.guiders.ClassifierFreeGuidance(guidance_scale=4.0)}


class Checker:
    """Cosmos refuses to run without one; what is given as embeddings is not looked at."""

    def to(self, device) -> None:
        pass


def checker() -> dict[str, Any]:
    return {"safety_checker": Checker()}


def masks(*names: str, lengths=REAL, tokens: int = TEXT) -> dict[str, Any]:
    return {name: padding_mask(lengths[index:], tokens, 1, torch.long) for index, name in enumerate(names)}


GLYPHS = {"prompt_embeds_2": noise(1, 5, 14), "negative_prompt_embeds_2": noise(1, 5, 14, seed=1)}
SOUND = {"audio_in_channels": 128, "audio_out_channels": 128}
LTX_2 = {**PROMPTS, **masks("prompt_attention_mask", "negative_prompt_attention_mask"), "height": 128, "width": 160}
LTX_2 |= {"num_frames": 17, "modality_scale": 1.0, "audio_modality_scale": 1.0}


class SoundCodec:
    """Stands in for an autoencoder of sound."""

    config = SimpleNamespace(mel_bins=64, latent_channels=8, sample_rate=16000, mel_hop_length=160)
    mel_compression_ratio = temporal_compression_ratio = 4
    latents_mean, latents_std = torch.zeros(128), torch.ones(128)


def connected(pipe) -> None:
    pipe.audio_vae = SoundCodec()
    pipe.connectors = lambda embeds, mask, padding_side: (embeds, embeds, mask)


def sounding(pipe) -> None:
    pipe.audio_vae = pipe.vocoder = SoundCodec()


def face_of_nobody(pipe) -> None:
    pipe.encode_image = lambda image, device: noise(1, 5, 6)


WAN = {"in_channels": 36, "out_channels": 16}
PIPELINES = {
    "hunyuan-1.5": TinyPipeline(
        "HunyuanVideo15Pipeline",
        FLOW,
        {
            **PROMPTS,
            **GLYPHS,
            **masks("prompt_embeds_mask", "negative_prompt_embeds_mask"),
            **masks("prompt_embeds_mask_2", "negative_prompt_embeds_mask_2", lengths=(2, 4), tokens=5),
            "height": 80,
            "width": 112,
            "num_frames": 9,
        },
        calls=2 * 2,
        tiny="hunyuan-1.5",
        changes={"in_channels": 9},
        parts=lambda: {**guider(), "vae": Codec(spatial=16)},
    ),
    "framepack": TinyPipeline(
        "HunyuanVideoFramepackPipeline",
        FLOW,
        {
            "image": IMAGE,
            "prompt_embeds": noise(1, TEXT, 16),
            "pooled_prompt_embeds": noise(1, 8),
            **masks("prompt_attention_mask"),
            "height": 64,
            "width": 80,
            "num_frames": 20,
            "latent_window_size": 3,
        },
        calls=3,
        tiny="framepack",
        after=lambda pipe: setattr(pipe, "encode_image", lambda image, device: noise(1, 3, 10)),
        windows=3,
    ),
    "motif": TinyPipeline(
        "MotifVideoPipeline",
        FLOW,
        {**SIZE, **PROMPTS, **masks("prompt_attention_mask", "negative_prompt_attention_mask")},
        calls=4 * 2,
        tiny="motif",
        changes={"in_channels": 9},
        parts=guider,
    ),
    "ltx-2": TinyPipeline(
        "LTX2Pipeline",
        FLOW,
        {**LTX_2, "stg_scale": 0.0, "audio_stg_scale": 0.0},
        calls=2,
        tiny="ltx-2",
        changes=SOUND,
        after=connected,
    ),
    "ltx-2 with all its guidance": TinyPipeline(
        "LTX2Pipeline",
        FLOW,
        {**LTX_2, "spatio_temporal_guidance_blocks": [0], "modality_scale": 3.0},
        calls=2 + 1 + 2,  # in the perturbed forward one block leaves its attention out
        tiny="ltx-2-perturbed",
        changes=SOUND,
        after=connected,
    ),
    "kandinsky-6": TinyPipeline(
        "Kandinsky6TI2VAPipeline",
        FLOW,
        {**SIZE, **PROMPTS, "pooled_prompt_embeds": noise(1, 8), "negative_pooled_prompt_embeds": noise(1, 8, seed=1)},
        calls=2 * 2,
        tiny="kandinsky-6",
        after=sounding,
    ),
    "kandinsky-5-i2v": TinyPipeline(
        "Kandinsky5I2VPipeline",
        FLOW,
        {
            **SIZE | {"num_frames": 25},  # its first four take the brightness of the others
            "image": IMAGE,
            **{f"{sign}prompt_embeds_qwen": noise(1, TEXT, 16, seed=i) for i, sign in enumerate(("", "negative_"))},
            **{f"{sign}prompt_embeds_clip": noise(1, 8, seed=i) for i, sign in enumerate(("", "negative_"))},
            **{f"{sign}prompt_cu_seqlens": torch.tensor([0, TEXT], dtype=torch.int32) for sign in ("", "negative_")},
        },
        calls=2 * 2,
        tiny="kandinsky-5",
        changes={"visual_cond": True},
    ),
    "easyanimate-inpaint": TinyPipeline(
        "EasyAnimateInpaintPipeline",
        FLOW,
        {
            **SIZE,
            **PROMPTS,
            **masks("prompt_attention_mask", "negative_prompt_attention_mask"),
            "video": noise(1, 3, 9, 64, 80),
            "mask_video": torch.full((1, 1, 9, 64, 80), 255.0),  # all of it is to be drawn
        },
        calls=2,
        tiny="easyanimate",
        changes={"in_channels": 9},
    ),
    "cosmos": TinyPipeline(
        "CosmosTextToWorldPipeline",
        "EDMEulerScheduler",
        {**SIZE, **PROMPTS},
        calls=2 * 2,
        tiny="cosmos",
        parts=checker,
    ),
    "cosmos-2.5": TinyPipeline(
        "Cosmos2_5_PredictBasePipeline",
        "UniPCMultistepScheduler",
        {**SIZE, **PROMPTS},
        calls=2 * 2,
        tiny="cosmos",
        changes={"in_channels": 17, "out_channels": 16},
        parts=lambda: {**checker(), "vae": wan_vae()},
    ),
    "helios": TinyPipeline(
        "HeliosPipeline",
        "HeliosScheduler",
        {**PROMPTS, "height": 64, "width": 80, "num_frames": 18, "num_latent_frames_per_chunk": 3},
        calls=2 * 2,
        tiny="helios",
        schedule={"stages": 1},
        windows=2,
    ),
    # Three stages, each of a larger size than the one before, and each with timesteps of its own.
    "helios-pyramid": TinyPipeline(
        "HeliosPyramidPipeline",
        "HeliosScheduler",
        {
            **PROMPTS,
            "height": 128,
            "width": 192,
            "num_frames": 9,
            "num_latent_frames_per_chunk": 3,
            "pyramid_num_inference_steps_list": [4, 4, 4],
        },
        calls=2 * 2,
        tiny="helios",
        schedule={"gamma": 0.3},  # of its default the noise's covariance is singular by rounding
        windows=3,
    ),
    "chronoedit": TinyPipeline(
        "ChronoEditPipeline",
        FLOW,
        {**SIZE, **PROMPTS, "image": IMAGE},
        calls=2 * 2,
        tiny="chronoedit",
        changes=WAN | {"image_dim": 6, "added_kv_proj_dim": 24},
        parts=lambda: {"vae": wan_vae()},
        after=face_of_nobody,
    ),
    "wan-animate": TinyPipeline(
        "WanAnimatePipeline",
        "UniPCMultistepScheduler",
        {
            **PROMPTS,
            "image": IMAGE,
            "pose_video": [IMAGE] * 15,
            "face_video": [IMAGE.resize((16, 16))] * 15,
            "height": 64,
            "width": 80,
            "segment_frame_length": 9,
            "prev_segment_conditioning_frames": 1,
            "guidance_scale": 3.0,
        },
        calls=2 * 2,
        tiny="wan-animate",
        changes=WAN | {"latent_channels": 16, "image_dim": 6, "added_kv_proj_dim": 24},
        parts=lambda: {"vae": wan_vae()},
        after=face_of_nobody,
        windows=2,
    ),
    "cogvideox-i2v": TinyPipeline(
        "CogVideoXImageToVideoPipeline",
        "CogVideoXDDIMScheduler",
        {**SIZE, **SHORT_PROMPTS, "image": IMAGE},
        calls=2,
        tiny="cogvideox",
        changes={"in_channels": 8, "out_channels": 4},
    ),
    "consisid": TinyPipeline(
        "ConsisIDPipeline",
        "CogVideoXDDIMScheduler",
        {
            **SIZE,
            **SHORT_PROMPTS,
            "image": IMAGE,
            "id_cond": noise(1, 6),
            "id_vit_hidden": [noise(1, 4, 6)],
        },
        calls=2,
        tiny="consisid",
        changes={"in_channels": 8, "out_channels": 4},
    ),
    "ltx-i2v": TinyPipeline(
        "LTXImageToVideoPipeline",
        FLOW,
        {
            **PROMPTS,
            **masks("prompt_attention_mask", "negative_prompt_attention_mask"),
            "image": IMAGE,
            "height": 128,
            "width": 160,
            "num_frames": 17,
        },
        calls=2,
        tiny="ltx",
        parts=lambda: {"vae": Codec(8, 32)},
    ),
}
