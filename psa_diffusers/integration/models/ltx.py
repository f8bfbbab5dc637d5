"""LTX-Video: latents come packed, so that the grid is read from other arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..tokens import NO_GRID, Grid, TokenLayout, once_a_tensor, raster_at_the_end
from .row import ModelRow


def _named_grid(arguments: Mapping[str, Any]) -> Grid | None:
    grid = tuple(arguments.get(name) for name in ("num_frames", "height", "width"))
    return grid if all(isinstance(size, int) and size > 0 for size in grid) else None


@once_a_tensor
def _grid_of_coordinates(coordinates: Tensor) -> Grid | tuple[()]:
    # [batch, 3, tokens]; the samples of a batch differ in nothing.
    return raster_at_the_end(coordinates[0].transpose(0, 1))


def _layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout | str:
    tokens, grid = arguments["hidden_states"].shape[1], _named_grid(arguments)
    if grid is not None and math.prod(grid) == tokens:
        return TokenLayout(grid)
    # Keyframes and clips are put before the video, and only the coordinates tell them apart.
    coordinates = arguments.get("video_coords")
    grid = _grid_of_coordinates(coordinates) if coordinates is not None else None
    return TokenLayout(grid, before=tokens - math.prod(grid)) if grid else NO_GRID


LTX = ModelRow(
    title="LTX-Video (T2V, I2V, condition)",
    transformers=("LTXVideoTransformer3DModel",),
    natives=("LTXVideoAttnProcessor",),
    attention=r"transformer_blocks\.\d+\.attn1",
    layout=_layout,
    sparse="`attn1`",
    text="cross-attention; keyframes and clips of the condition pipeline come first",
    grid="`num_frames`, `height`, `width`, else `video_coords`, read once a run",
    presets=("ltx",),
    one_sequence=True,
)


def _layout_2(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout | str:
    tokens, grid = arguments["hidden_states"].shape[1], _named_grid(arguments)
    # Keyframes and references are put after the video.
    if grid is None or tokens < math.prod(grid):
        return NO_GRID
    return TokenLayout(grid, after=tokens - math.prod(grid))


def _default_native_2(model: nn.Module) -> str:
    return "LTX2PerturbedAttnProcessor" if model.config.perturbed_attn else "LTX2AudioVideoAttnProcessor"


LTX_2 = ModelRow(
    title="LTX-2 (T2V, I2V, condition, IC-LoRA)",
    transformers=("LTX2VideoTransformer3DModel",),
    natives=("LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor"),
    attention=r"transformer_blocks\.\d+\.attn1",
    layout=_layout_2,
    default_native=_default_native_2,
    left_out="all_perturbed",
    sparse="`attn1` (video to video); audio and audio-video attention stay dense, and all does under a reference mask",
    text="cross-attention; keyframes and references come last",
    grid="`num_frames`, `height`, `width`",
    presets=("ltx-2",),
)
