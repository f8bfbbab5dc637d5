"""Helios: the history first, coarser the older it is, then the video."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..tokens import NO_GRID, TokenLayout
from .row import ModelRow, latent_grid

# The history that a forward may be given: by how many patches it is pooled, and to what multiples it is padded.
_HISTORY = {"short": (1, (1, 1, 1)), "mid": (2, (2, 4, 4)), "long": (4, (4, 8, 8))}


def _history_tokens(model: nn.Module, arguments: Mapping[str, Any]) -> int:
    count = 0
    for name, (pooled, multiples) in _HISTORY.items():
        latents = arguments[f"latents_history_{name}"]
        if latents is None or arguments[f"indices_latents_history_{name}"] is None:
            continue
        sizes = (math.ceil(size / to) * to for size, to in zip(latents.shape[2:], multiples, strict=True))
        count += math.prod(size // (pooled * cut) for size, cut in zip(sizes, model.config.patch_size, strict=True))
    return count


def _layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout | str:
    grid = latent_grid(model, arguments)
    return TokenLayout(grid, before=_history_tokens(model, arguments)) if grid else NO_GRID


HELIOS = ModelRow(
    title="Helios",
    transformers=("HeliosTransformer3DModel",),
    natives=("HeliosAttnProcessor",),
    attention=r"blocks\.\d+\.attn1",
    layout=_layout,
    sparse="`attn1`",
    text="cross-attention; the history comes first",
    grid="latents [B, C, T, H, W] / patch",
    presets=("helios",),
    one_sequence=True,
)
