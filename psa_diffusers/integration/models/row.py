"""ModelRow: what this package knows of a model family."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..tokens import NO_GRID, Grid, TokenLayout


def latent_grid(model: nn.Module, arguments: Mapping[str, Any], channels: int = 1) -> Grid | None:
    """Token grid of ``hidden_states``, 5-D with the channels at this place, cut into the model's patches; None if not.

    ``config.patch_size`` is (frames, height, width), or one number for both sides beside ``patch_size_t`` (default 1).
    """
    latents, patch = arguments["hidden_states"], model.config.patch_size
    if latents.ndim != 5:
        return None
    if isinstance(patch, int):
        patch = (getattr(model.config, "patch_size_t", None) or 1, patch, patch)
    sizes = [size for place, size in enumerate(latents.shape) if place not in (0, channels)]
    frames, height, width = (size // cut for size, cut in zip(sizes, patch, strict=True))
    return frames, height, width


def video_alone(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout | str:
    """The layout of models whose self-attention sees latents [batch, channels, frames, height, width] and no more."""
    grid = latent_grid(model, arguments)
    return TokenLayout(grid) if grid else NO_GRID


def block_index(model: nn.Module, name: str) -> int:
    """The first number in a module's path: ``blocks.3.attn1`` is in block 3."""
    number = re.search(r"\.(\d+)\.", f".{name}.")
    return int(number.group(1)) if number else 0


def single_after_dual(model: nn.Module, name: str) -> int:
    """Single-stream blocks are counted on after those of two streams."""
    index = block_index(model, name)
    return index + len(model.transformer_blocks) if name.startswith("single_transformer_blocks.") else index


@dataclass(frozen=True)
class ModelRow:
    """One model family: which attention may be sparse, and how its tokens are found. Or, in ``dense``, why none is.

    Attributes:
        title: What users call it.
        transformers: Class names of the root transformers.
        natives: Class names of the attention processors that may be rerouted; others are left alone. The first is the
            one that the model sets itself.
        attention: Regular expression for the paths of the modules that are attention among the video's tokens.
        layout: (model, the forward's arguments by name) -> the tokens, or in words why they cannot be sparse.
        layer: (model, module's path) -> index of the transformer block, as ``dense_layers`` counts.
        sparse, text, grid: What that comes to, in words, for the README's table.
        presets: Names of the presets (``configs/``) for its usual sizes.
        default_native: model -> the class name of the processors that it sets itself, where that depends on it.
        left_out: Name of the native's argument that is true where it leaves its attention out.
        one_sample_a_call: The native computes the samples of a batch one by one.
        one_sequence: Tokens beside the video's are in one tensor with it before the blocks, so that context parallel
            splits all of them together, in their order.
        dense: Why this family stays dense. Then all the rest is left out.
    """

    title: str
    transformers: tuple[str, ...]
    natives: tuple[str, ...] = ()
    attention: str = ""
    layout: Callable[[nn.Module, Mapping[str, Any]], TokenLayout | str] | None = None
    layer: Callable[[nn.Module, str], int] = block_index
    sparse: str = ""
    text: str = ""
    grid: str = ""
    presets: tuple[str, ...] = ()
    default_native: Callable[[nn.Module], str] | None = None
    left_out: str = ""
    one_sample_a_call: bool = False
    one_sequence: bool = False
    dense: str = ""

    def is_self_attention(self, name: str) -> bool:
        """Whether the module of this path is attention among the video's tokens."""
        return re.fullmatch(self.attention, name) is not None
