"""Kandinsky: latents with channels last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..tokens import NO_GRID, TokenLayout
from .row import ModelRow, latent_grid


def _layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout | str:
    grid = latent_grid(model, arguments, channels=4)
    return TokenLayout(grid) if grid else NO_GRID


def _layout_5(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout | str:
    if arguments["sparse_params"] is not None:
        return "NABLA, the model's own sparse attention"
    return _layout(model, arguments)


KANDINSKY_5 = ModelRow(
    title="Kandinsky 5 (T2V, I2V)",
    transformers=("Kandinsky5Transformer3DModel",),
    natives=("Kandinsky5AttnProcessor",),
    attention=r"visual_transformer_blocks\.\d+\.self_attention",
    layout=_layout_5,
    sparse="`self_attention` of the visual blocks; all stays as it is in NABLA mode",
    text="cross-attention",
    grid="latents [B, T, H, W, C] / patch",
    presets=("kandinsky-5",),
)

KANDINSKY_6 = ModelRow(
    title="Kandinsky 6",
    transformers=("Kandinsky6Transformer3DModel",),
    natives=("Kandinsky6AttnProcessor",),
    attention=r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention",
    layout=_layout,
    sparse="`self_attention` of the video; audio and audio-video attention stay dense",
    text="cross-attention",
    grid="latents [B, T, H, W, C] / patch",
    presets=("kandinsky-6",),
)

KANDINSKY_6_SR = ModelRow(
    title="Kandinsky 6 SR",
    transformers=("Kandinsky6SRTransformer3DModel",),
    dense="it has a sparse attention of its own (NABLA)",
)
