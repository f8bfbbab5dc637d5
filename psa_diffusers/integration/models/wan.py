"""Wan and what is built on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..tokens import TokenLayout
from .row import ModelRow, block_index, video_alone


def _layer(model: nn.Module, name: str) -> int:
    # A VACE block runs beside the main block that it steers: dense_layers means both.
    index = block_index(model, name)
    return model.config.vace_layers[index] if name.startswith("vace_blocks.") else index


def _skyreels_layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout | str:
    return "block-causal attention" if model.config.num_frame_per_block > 1 else video_alone(model, arguments)


WAN = ModelRow(
    title="Wan 2.1 and 2.2 (T2V, I2V, TI2V, VACE, Animate), ChronoEdit",
    transformers=(
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "ChronoEditTransformer3DModel",
    ),
    natives=("WanAttnProcessor", "WanAttnProcessor2_0"),
    attention=r"(vace_)?blocks\.\d+\.attn1",
    # Image-to-video concatenates its condition along the channels, and control (VACE, pose) is added to the video: the
    # sequence is the video alone. Wan-Animate's has one frame more, the reference.
    layout=video_alone,
    layer=_layer,
    sparse="`attn1`, also of the VACE blocks; Animate's face adapter stays dense",
    text="cross-attention",
    grid="latents [B, C, T, H, W] / patch; Animate's reference image is its first frame",
    presets=("wan-1-3b", "wan-5b", "wan-14b", "chronoedit"),
)

SKYREELS = ModelRow(
    title="SkyReels-V2 (T2V, I2V, diffusion forcing)",
    transformers=("SkyReelsV2Transformer3DModel",),
    natives=("SkyReelsV2AttnProcessor", "SkyReelsV2AttnProcessor2_0"),
    attention=r"blocks\.\d+\.attn1",
    layout=_skyreels_layout,
    sparse="`attn1`; all stays dense in block-causal mode (`num_frame_per_block` above 1)",
    text="cross-attention",
    grid="latents [B, C, T, H, W] / patch",
    presets=("skyreels-v2",),
)
