"""Transformers whose self-attention sees text or conditioning beside the video."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .parts import Inputs, Size

# Tokens that the pipelines give by default. A prompt may be shorter: then there are a little fewer.
HUNYUAN_TEXT, MOTIF_TEXT, MOCHI_TEXT, EASYANIMATE_TEXT, MINIMAX_TEXT = 256, 512, 256, 256, 512
HUNYUAN_15_TEXT, GLYPHS, IMAGE = 1000, 256, 729
FRAMEPACK_WINDOW, FRAMEPACK_IMAGE = 9, 729
CLEAN, HISTORY_2X, HISTORY_4X = 2, 2, 16  # latent frames
FACE_TOKENS = 577


def hunyuan_video(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = Inputs(model), model.config
    return {
        "hidden_states": make.noise(1, config.in_channels, *size),
        "timestep": make.timestep(),
        "encoder_hidden_states": make.noise(1, HUNYUAN_TEXT, config.text_embed_dim),
        "encoder_attention_mask": make.mask(HUNYUAN_TEXT),
        "pooled_projections": make.noise(1, config.pooled_projection_dim),
        "guidance": make.noise(1) if config.guidance_embeds else None,
    }


def framepack_frames(frames: int, step: int) -> int:
    return FRAMEPACK_WINDOW


def framepack(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = Inputs(model), model.config
    frames, height, width = size
    inputs = hunyuan_video(model, size) | {
        "image_embeds": make.noise(1, FRAMEPACK_IMAGE, config.image_proj_dim),
        "indices_latents": make.range(0, frames),
    }
    for name, count in (("clean", CLEAN), ("history_2x", HISTORY_2X), ("history_4x", HISTORY_4X)):
        inputs[f"latents_{name}"] = make.noise(1, config.in_channels, count, height, width)
        inputs[f"indices_latents_{name}"] = make.range(0, count)
    return inputs


def hunyuan_video_15(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = Inputs(model), model.config
    return {
        "hidden_states": make.noise(1, config.in_channels, *size),
        "timestep": make.timestep().to(make.dtype),
        "encoder_hidden_states": make.noise(1, HUNYUAN_15_TEXT, config.text_embed_dim),
        "encoder_attention_mask": make.mask(HUNYUAN_15_TEXT),
        "timestep_r": make.timestep().to(make.dtype) if config.use_meanflow else None,
        "encoder_hidden_states_2": make.noise(1, GLYPHS, config.text_embed_2_dim),
        "encoder_attention_mask_2": make.mask(GLYPHS),
        "image_embeds": make.zeros(1, IMAGE, config.image_embed_dim),
    }


def cogvideox(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = Inputs(model), model.config
    frames, height, width = size
    patch_t = getattr(config, "patch_size_t", None) or 1
    frames += -frames % patch_t  # the pipeline fills up
    grid = (frames // patch_t, height // config.patch_size, width // config.patch_size)
    angles = make.noise(math.prod(grid), config.attention_head_dim)
    return {
        "hidden_states": make.noise(1, frames, config.in_channels, height, width),
        "timestep": make.timestep(),
        "encoder_hidden_states": make.noise(1, config.max_text_seq_length, config.text_embed_dim),
        "image_rotary_emb": (angles, angles) if config.use_rotary_positional_embeddings else None,
    }


def consisid(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = Inputs(model), model.config
    if not config.is_train_face:
        return cogvideox(model, size)
    return cogvideox(model, size) | {
        "id_cond": make.noise(1, config.LFE_id_dim),
        "id_vit_hidden": [make.noise(1, FACE_TOKENS, config.LFE_vit_dim) for _ in range(config.LFE_num_scale)],
    }


def mochi(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = Inputs(model), model.config
    return {
        "hidden_states": make.noise(1, config.in_channels, *size),
        "timestep": make.timestep(),
        "encoder_hidden_states": make.noise(1, MOCHI_TEXT, config.text_embed_dim),
        "encoder_attention_mask": make.mask(MOCHI_TEXT),
    }


def easyanimate(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = Inputs(model), model.config
    channels = config.out_channels or config.in_channels
    inputs = {
        "hidden_states": make.noise(1, channels, *size),
        "timestep": make.timestep(),
        "encoder_hidden_states": make.noise(1, EASYANIMATE_TEXT, config.text_embed_dim),
    }
    if config.text_embed_dim_t5 is not None:
        inputs["encoder_hidden_states_t5"] = make.noise(1, EASYANIMATE_TEXT, config.text_embed_dim_t5)
    if config.in_channels > channels:  # masks and images to go by
        inputs["inpaint_latents"] = make.noise(1, config.in_channels - channels, *size)
    return inputs


def motif_video(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = Inputs(model), model.config
    return {
        "hidden_states": make.noise(1, config.in_channels, *size),
        "timestep": make.timestep().float(),
        "encoder_hidden_states": make.noise(1, MOTIF_TEXT, config.text_embed_dim),
    }


def minimax_h3_frames(frames: int, step: int) -> int:
    """Latents of clips of 17 frames, five each, and of a short one of 5 frames, two, that the last one takes."""
    return math.ceil(max(frames - 5, 0) / 17) * 5 + 2


def minimax_h3(model: nn.Module, size: Size) -> dict[str, Any]:
    """Text, two channels of audio, video, packed in this order."""
    make, config = Inputs(model), model.config
    frames, rows, columns = (length // cut for length, cut in zip(size, config.patch_size, strict=True))
    video, seconds = frames * rows * columns, ((size[0] - 2) / 5 * 17 + 5) / 24
    audio = 2 * round(40 * seconds)
    first, total = MINIMAX_TEXT + audio, MINIMAX_TEXT + audio + video
    axes = torch.meshgrid(*(make.range(0, length) for length in (frames, rows, columns)), indexing="ij")
    places = torch.stack([axis.flatten() for axis in axes], 1).double()
    before = torch.zeros(first, 3, device=make.device, dtype=torch.float64)
    tags = [torch.full((count,), tag, device=make.device) for count, tag in ((video, 0), (MINIMAX_TEXT, 1), (audio, 2))]
    return {
        "hidden_states": make.noise(1, video, config.in_channels * math.prod(config.patch_size)),
        "audio_hidden_states": make.noise(1, audio, config.audio_in_channels),
        "encoder_hidden_states": make.noise(1, MINIMAX_TEXT, config.text_dim),
        "timestep": make.timestep().float(),
        "timestep_indices": torch.zeros(total, device=make.device, dtype=torch.long),
        "token_tags": torch.cat([tags[1], tags[2], tags[0]]),
        "position_ids": torch.cat([before, places]),
        "video_indices": make.range(first, total),
        "audio_indices": make.range(MINIMAX_TEXT, first),
        "text_indices": make.range(0, MINIMAX_TEXT),
    }
