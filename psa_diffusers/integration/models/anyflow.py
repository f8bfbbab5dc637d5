"""AnyFlow: video alone, text by cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..tokens import NO_GRID, TokenLayout
from .row import ModelRow, latent_grid


def _layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout | str:
    grid = latent_grid(model, arguments, channels=2)
    return TokenLayout(grid) if grid else NO_GRID


ANYFLOW = ModelRow(
    title="AnyFlow",
    transformers=("AnyFlowTransformer3DModel",),
    natives=("AnyFlowAttnProcessor",),
    attention=r"blocks\.\d+\.attn1",
    layout=_layout,
    sparse="`attn1`",
    text="cross-attention",
    grid="latents [B, T, C, H, W] / patch",
    presets=("anyflow",),
)

ANYFLOW_FAR = ModelRow(
    title="AnyFlow-FAR",
    transformers=("AnyFlowFARTransformer3DModel",),
    dense="its attention is causal by blocks of frames, and reads a cache of keys and values",
)
