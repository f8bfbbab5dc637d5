"""What this package knows of each model: which attention is video self-attention, and where its tokens lie."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of a joint sequence, as one forward of the transformer sees them.

    Attributes:
        grid: (frames, height, width) of the video tokens, in tokens. They are in raster order.
        full_tokens: Where text and conditioning tokens lie in the sequence; None = there are none.
        extra_tokens: How many of those there are.
        key_lengths: int [batch], tokens from that one on are padding; None = nothing is padded.
    """

    grid: tuple[int, int, int]
    full_tokens: slice | None = None
    extra_tokens: int = 0
    key_lengths: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens of the whole sequence."""
        frames, height, width = self.grid
        return frames * height * width + self.extra_tokens


@dataclass(frozen=True)
class ModelRow:
    """One model family. Another family comes by adding a row to ``ROWS``.

    Attributes:
        transformers: Class names of the root transformers.
        natives: Class names of the attention processors that may be rerouted; others are left alone.
        is_self_attention: (module's name, module) -> whether it is attention of the video tokens to themselves.
        layout: (model, the forward's arguments by name) -> the tokens, or None where they are not known.
        layer: (model, module's name) -> index of the transformer block, as ``dense_layers`` counts.
    """

    transformers: tuple[str, ...]
    natives: tuple[str, ...]
    is_self_attention: Callable[[str, nn.Module], bool]
    layout: Callable[[nn.Module, Mapping[str, Any]], TokenLayout | None]
    layer: Callable[[nn.Module, str], int]


def patched_grid(shape: torch.Size, patch_size: tuple[int, int, int]) -> tuple[int, int, int] | None:
    """Token grid of latents [batch, channels, frames, height, width] cut into patches; None if they are not 5-D."""
    if len(shape) != 5:
        return None
    frames, height, width = (size // patch for size, patch in zip(shape[2:], patch_size, strict=True))
    return frames, height, width


def block_index(model: nn.Module, name: str) -> int:
    """The first number in a module's path: ``blocks.3.attn1`` is in block 3."""
    number = re.search(r"\.(\d+)\.", f".{name}.")
    return int(number.group(1)) if number else 0


def _is_attn1(name: str, module: nn.Module) -> bool:
    return name.endswith(".attn1")


def _wan_layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout | None:
    # Image-to-video concatenates its condition along the channels, and control (VACE) is padded to the video's
    # length: the sequence is the video alone.
    latents = arguments.get("hidden_states")
    grid = patched_grid(latents.shape, model.config.patch_size) if isinstance(latents, torch.Tensor) else None
    return TokenLayout(grid) if grid else None


def _wan_layer(model: nn.Module, name: str) -> int:
    # A VACE block runs beside the main block that it steers: dense_layers means both.
    index = block_index(model, name)
    return model.config.vace_layers[index] if name.startswith("vace_blocks.") else index


ROWS = (
    ModelRow(
        # Wan 2.1 and 2.2: T2V, I2V, TI2V, VACE, and A14B's two experts. attn2 is cross-attention to text and image.
        transformers=("WanTransformer3DModel", "WanVACETransformer3DModel"),
        natives=("WanAttnProcessor", "WanAttnProcessor2_0"),
        is_self_attention=_is_attn1,
        layout=_wan_layout,
        layer=_wan_layer,
    ),
)


def find_row(model: nn.Module) -> ModelRow | None:
    """The row of this transformer, or of a class that it derives from."""
    names = [base.__name__ for base in type(model).__mro__]
    return next((row for name in names for row in ROWS if name in row.transformers), None)


def known_transformers() -> list[str]:
    """Class names of all the transformers that have a row."""
    return [name for row in ROWS for name in row.transformers]
