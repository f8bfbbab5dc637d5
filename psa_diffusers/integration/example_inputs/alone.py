"""Transformers whose self-attention sees the video alone, or the video after what was made before."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .parts import Inputs, Size

# Tokens that the pipelines give by default.
WAN_TEXT, WAN_IMAGE, LTX_TEXT, LTX_2_TEXT, COSMOS_TEXT, ALLEGRO_TEXT = 512, 257, 128, 1024, 512, 512
KANDINSKY_5_TEXT, KANDINSKY_6_TEXT = 256, 1024  # the second is padded to that
ANIMATE_FRAMES = 77  # of a segment
HISTORY = {"short": 2, "mid": 2, "long": 16}  # latent frames
HELIOS_WINDOW = 9
FPS = 24


def wan(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = Inputs(model), model.config
    inputs = {
        "hidden_states": make.noise(1, config.in_channels, *size),
        "timestep": make.timestep(),
        "encoder_hidden_states": make.noise(1, WAN_TEXT, config.text_dim),
    }
    if config.image_dim is not None:
        inputs["encoder_hidden_states_image"] = make.noise(1, WAN_IMAGE, config.image_dim)
    if "vace_in_channels" in config:
        inputs["control_hidden_states"] = make.noise(1, config.vace_in_channels, *size)
    return inputs


def animate_frames(frames: int, step: int) -> int:
    return (ANIMATE_FRAMES - 1) // step + 2  # the reference is the first


def animate(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = Inputs(model), model.config
    frames, height, width = size
    side = config.motion_encoder_size
    return wan(model, size) | {
        "pose_hidden_states": make.noise(1, config.latent_channels, frames - 1, height, width),
        "face_pixel_values": make.noise(1, 3, 4 * (frames - 2) + 1, side, side),
    }


def helios_frames(frames: int, step: int) -> int:
    return HELIOS_WINDOW


def helios(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = Inputs(model), model.config
    frames, height, width = size
    inputs = {
        "hidden_states": make.noise(1, config.in_channels, *size),
        "timestep": make.timestep(),
        "encoder_hidden_states": make.noise(1, WAN_TEXT, config.text_dim),
        "indices_hidden_states": make.range(0, frames)[None],
    }
    for name, count in HISTORY.items():
        inputs[f"latents_history_{name}"] = make.noise(1, config.in_channels, count, height, width)
        inputs[f"indices_latents_history_{name}"] = make.range(0, count)[None]
    return inputs


def anyflow(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = Inputs(model), model.config
    frames, height, width = size
    steps = make.timestep().float().expand(1, frames)
    return {
        "hidden_states": make.noise(1, frames, config.in_channels, height, width),
        "timestep": steps,
        "r_timestep": steps,
        "encoder_hidden_states": make.noise(1, WAN_TEXT, config.text_dim),
    }


def ltx(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = Inputs(model), model.config
    frames, height, width = size
    return {
        "hidden_states": make.noise(1, math.prod(size), config.in_channels),
        "timestep": make.timestep(),
        "encoder_hidden_states": make.noise(1, LTX_TEXT, config.caption_channels),
        "encoder_attention_mask": make.mask(LTX_TEXT),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


def ltx_2(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = Inputs(model), model.config
    frames, height, width = size
    seconds = ((frames - 1) * config.vae_scale_factors[0] + 1) / FPS
    audio = round(seconds * config.audio_sampling_rate / config.audio_hop_length / config.audio_scale_factor)
    texts = (config.cross_attention_dim, config.audio_cross_attention_dim)
    video_text, audio_text = (config.caption_channels,) * 2 if config.use_prompt_embeddings else texts
    return {
        "hidden_states": make.noise(1, math.prod(size), config.in_channels),
        "audio_hidden_states": make.noise(1, audio, config.audio_in_channels),
        "encoder_hidden_states": make.noise(1, LTX_2_TEXT, video_text),
        "audio_encoder_hidden_states": make.noise(1, LTX_2_TEXT, audio_text),
        "timestep": make.timestep(),
        "sigma": make.timestep(),
        "encoder_attention_mask": make.mask(LTX_2_TEXT),
        "audio_encoder_attention_mask": make.mask(LTX_2_TEXT),
        "num_frames": frames,
        "height": height,
        "width": width,
        "audio_num_frames": audio,
    }


def _kandinsky(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = Inputs(model), model.config
    grid = [length // cut for length, cut in zip(size, config.patch_size, strict=True)]
    channels = 2 * config.in_visual_dim + 1 if config.visual_cond else config.in_visual_dim
    return {
        "hidden_states": make.noise(1, *size, channels),
        "timestep": make.timestep().float(),
        "pooled_projections": make.noise(1, config.in_text_dim2),
        "visual_rope_pos": tuple(make.range(0, length) for length in grid),
    }


def kandinsky_5(model: nn.Module, size: Size) -> dict[str, Any]:
    make = Inputs(model)
    return _kandinsky(model, size) | {
        "encoder_hidden_states": make.noise(1, KANDINSKY_5_TEXT, model.config.in_text_dim),
        "text_rope_pos": make.range(0, KANDINSKY_5_TEXT),
    }


def kandinsky_6(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = Inputs(model), model.config
    audio = math.ceil(((size[0] - 1) * 4 + 1) / FPS * 44_100 / 1024)  # its VAE's frames a latent, its sound's hops
    return _kandinsky(model, size) | {
        "encoder_hidden_states": make.noise(1, KANDINSKY_6_TEXT, config.in_text_dim),
        "audio_hidden_states": make.noise(1, audio, config.in_audio_dim),
    }


def cosmos(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = Inputs(model), model.config
    width = config.crossattn_proj_in_channels if config.use_crossattn_projection else config.text_embed_dim
    text = make.noise(1, COSMOS_TEXT, width)
    if config.img_context_dim_in:
        text = (text, make.noise(1, config.img_context_num_tokens, config.img_context_dim_in))
    inputs = {"hidden_states": make.noise(1, config.in_channels, *size), "timestep": make.timestep()}
    return inputs | {"encoder_hidden_states": text, "fps": FPS}


def cosmos_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The padding mask is one channel more; resizing it is all that torchvision is needed for."""
    if not settings.get("concat_padding_mask", True):
        return dict(settings)
    return {**settings, "concat_padding_mask": False, "in_channels": settings.get("in_channels", 16) + 1}


def allegro(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = Inputs(model), model.config
    frames, height, width = size
    grid = (frames // config.patch_size_t, height // config.patch_size, width // config.patch_size)
    places = torch.meshgrid(*(make.range(0, length) for length in grid), indexing="ij")
    angles = [make.noise(length, config.attention_head_dim // 3) for length in grid]
    return {
        "hidden_states": make.noise(1, config.in_channels, *size),
        "timestep": make.timestep(),
        "encoder_hidden_states": make.noise(1, ALLEGRO_TEXT, config.caption_channels),
        "encoder_attention_mask": make.mask(ALLEGRO_TEXT),
        "image_rotary_emb": ([(angle, angle) for angle in angles], [place.flatten()[None] for place in places]),
    }
