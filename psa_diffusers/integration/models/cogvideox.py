"""CogVideoX and ConsisID: text first, then video, in one sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..tokens import NO_GRID, TokenLayout
from .row import ModelRow, latent_grid


def _layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout | str:
    grid = latent_grid(model, arguments, channels=2)
    return TokenLayout(grid, before=arguments["encoder_hidden_states"].shape[1]) if grid else NO_GRID


COGVIDEOX = ModelRow(
    title="CogVideoX 1.0 and 1.5 (T2V, I2V, V2V, Fun control), ConsisID",
    transformers=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    natives=("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0"),
    attention=r"transformer_blocks\.\d+\.attn1",
    layout=_layout,
    sparse="joint attention (`attn1`); ConsisID's face modules stay dense",
    text="first; padded text is text to the model",
    grid="latents [B, T, C, H, W] / patch",
    presets=("cogvideox", "cogvideox-1-5"),
)
