"""Arguments of a forward of a transformer with nothing in them, for forecasts: of the right shapes, for one sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Size = tuple[int, int, int]  # frames, height, width of the latents

# What the pipelines give by default.
WAN_TEXT, WAN_IMAGE, HUNYUAN_TEXT, LTX_TEXT, KANDINSKY_TEXT, MOTIF_TEXT = 512, 257, 256, 128, 256, 512


class _Inputs:
    """Makes tensors on a model's device, in its dtype."""

    def __init__(self, model: nn.Module) -> None:
        weight = next(parameter for name, parameter in model.named_parameters() if "proj" in name or "embed" in name)
        self.device, self.dtype = weight.device, weight.dtype

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def timestep(self) -> Tensor:
        return torch.full((1,), 500, device=self.device)

    def mask(self, length: int) -> Tensor:
        return torch.ones(1, length, device=self.device, dtype=torch.long)


def _wan(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = _Inputs(model), model.config
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


def _hunyuan_video(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = _Inputs(model), model.config
    return {
        "hidden_states": make.noise(1, config.in_channels, *size),
        "timestep": make.timestep(),
        "encoder_hidden_states": make.noise(1, HUNYUAN_TEXT, config.text_embed_dim),
        "encoder_attention_mask": make.mask(HUNYUAN_TEXT),
        "pooled_projections": make.noise(1, config.pooled_projection_dim),
        "guidance": make.noise(1) if config.guidance_embeds else None,
    }


def _cogvideox(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = _Inputs(model), model.config
    frames, height, width = size
    frames += -frames % (config.patch_size_t or 1)  # the pipeline fills up
    grid = (frames // (config.patch_size_t or 1), height // config.patch_size, width // config.patch_size)
    angles = make.noise(math.prod(grid), config.attention_head_dim)
    return {
        "hidden_states": make.noise(1, frames, config.in_channels, height, width),
        "timestep": make.timestep(),
        "encoder_hidden_states": make.noise(1, config.max_text_seq_length, config.text_embed_dim),
        "image_rotary_emb": (angles, angles) if config.use_rotary_positional_embeddings else None,
    }


def _ltx(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = _Inputs(model), model.config
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


def _anyflow(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = _Inputs(model), model.config
    frames, height, width = size
    steps = make.timestep().float().expand(1, frames)
    return {
        "hidden_states": make.noise(1, frames, config.in_channels, height, width),
        "timestep": steps,
        "r_timestep": steps,
        "encoder_hidden_states": make.noise(1, WAN_TEXT, config.text_dim),
    }


def _kandinsky_5(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = _Inputs(model), model.config
    grid = [length // cut for length, cut in zip(size, config.patch_size, strict=True)]
    channels = 2 * config.in_visual_dim + 1 if config.visual_cond else config.in_visual_dim
    return {
        "hidden_states": make.noise(1, *size, channels),
        "encoder_hidden_states": make.noise(1, KANDINSKY_TEXT, config.in_text_dim),
        "timestep": make.timestep().float(),
        "pooled_projections": make.noise(1, config.in_text_dim2),
        "visual_rope_pos": tuple(torch.arange(length, device=make.device) for length in grid),
        "text_rope_pos": torch.arange(KANDINSKY_TEXT, device=make.device),
    }


def _motif_video(model: nn.Module, size: Size) -> dict[str, Any]:
    make, config = _Inputs(model), model.config
    return {
        "hidden_states": make.noise(1, config.in_channels, *size),
        "timestep": make.timestep().float(),
        "encoder_hidden_states": make.noise(1, MOTIF_TEXT, config.text_embed_dim),
    }


EXAMPLE_INPUTS: dict[str, Callable[[nn.Module, Size], dict[str, Any]]] = {
    "WanTransformer3DModel": _wan,
    "WanVACETransformer3DModel": _wan,
    "ChronoEditTransformer3DModel": _wan,
    "SkyReelsV2Transformer3DModel": _wan,
    "HunyuanVideoTransformer3DModel": _hunyuan_video,
    "CogVideoXTransformer3DModel": _cogvideox,
    "LTXVideoTransformer3DModel": _ltx,
    "AnyFlowTransformer3DModel": _anyflow,
    "Kandinsky5Transformer3DModel": _kandinsky_5,
    "MotifVideoTransformer3DModel": _motif_video,
}
