"""Mochi: video first, then the real text, one sample at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..tokens import NO_GRID, TokenLayout
from .row import ModelRow, latent_grid


def _layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout | str:
    grid = latent_grid(model, arguments)
    if grid is None:
        return NO_GRID
    return TokenLayout(grid, after=arguments["encoder_hidden_states"].shape[1], after_varies=True)


MOCHI = ModelRow(
    title="Mochi",
    transformers=("MochiTransformer3DModel",),
    natives=("MochiAttnProcessor2_0",),
    attention=r"transformer_blocks\.\d+\.attn1",
    layout=_layout,
    sparse="joint attention (`attn1`), one call a sample",
    text="last; padding is cut off",
    grid="latents [B, C, T, H, W] / patch",
    presets=("mochi",),
    one_sample_a_call=True,
)
