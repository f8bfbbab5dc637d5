"""MiniMax-H3: text, conditions, audio and video packed into one sequence, the video last."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..tokens import NO_GRID, TokenLayout, raster_at_the_end
from .row import ModelRow


def _layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout | str:
    places = arguments["position_ids"]
    grid = raster_at_the_end(places)
    return TokenLayout(grid, before=len(places) - math.prod(grid)) if grid else NO_GRID


MINIMAX_H3 = ModelRow(
    title="MiniMax-H3",
    transformers=("MiniMaxH3Transformer3DModel",),
    natives=("MiniMaxH3AttnProcessor",),
    attention=r"transformer_blocks\.\d+\.attn",
    layout=_layout,
    sparse="joint attention of all blocks; the token refiner stays dense",
    text="first: text, conditions, audio",
    grid="`position_ids`, read once a run",
    presets=("minimax-h3",),
    one_sequence=True,
)
