"""Mochi: video first, then the real text, one sample at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..tokens import NO_GRID, TokenLayout, patched_grid
from .row import ModelRow


def _layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout | str:
    patch = model.config.patch_size
    grid = patched_grid(arguments["hidden_states"].shape, (1, patch, patch))
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
    one_sample_a_call=True,
)
