"""EasyAnimate: text first, then video, in one sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..tokens import NO_GRID, TokenLayout
from .row import ModelRow, latent_grid


def _layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout | str:
    grid = latent_grid(model, arguments)
    texts = (arguments["encoder_hidden_states"], arguments["encoder_hidden_states_t5"])
    return TokenLayout(grid, before=sum(text.shape[1] for text in texts if text is not None)) if grid else NO_GRID


EASYANIMATE = ModelRow(
    title="EasyAnimate (T2V, inpaint, control)",
    transformers=("EasyAnimateTransformer3DModel",),
    natives=("EasyAnimateAttnProcessor2_0",),
    attention=r"transformer_blocks\.\d+\.attn1",
    layout=_layout,
    sparse="joint attention (`attn1`)",
    text="first; padded text is text to the model",
    grid="latents [B, C, T, H, W] / patch",
    presets=("easyanimate",),
)
