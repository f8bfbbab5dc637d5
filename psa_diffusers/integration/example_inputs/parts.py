"""What example inputs are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Size = tuple[int, int, int]  # frames, height, width of the latents


@dataclass(frozen=True)
class Example:
    """How to call a transformer with nothing in particular, in one sample of a video of some size.

    Attributes:
        inputs: (model, latents' size) -> the forward's arguments.
        latent_frames: (frames of the video, frames a latent) -> latent frames of a forward.
        counted: What of a step the forward is, in words, where that is not the whole video by default.
        any_frames: The pipeline takes numbers of frames beside ``k * step + 1``.
        layers_alike: One layer by itself tells of the others; where it does not, timing it would mislead.
        settings: Changes to a config that leave the operations as they are, and spare packages.
    """

    inputs: Callable[[nn.Module, Size], dict[str, Any]]
    latent_frames: Callable[[int, int], int] = lambda frames, step: (frames - 1) // step + 1
    counted: str = ""
    any_frames: bool = False
    layers_alike: bool = True
    settings: Callable[[dict[str, Any]], dict[str, Any]] = dict


class Inputs:
    """Makes tensors on a model's device, in its dtype."""

    def __init__(self, model: nn.Module) -> None:
        weight = next(parameter for name, parameter in model.named_parameters() if "proj" in name or "embed" in name)
        self.device, self.dtype = weight.device, weight.dtype

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, device=self.device, dtype=self.dtype)

    def timestep(self) -> Tensor:
        return torch.full((1,), 500, device=self.device)

    def mask(self, length: int) -> Tensor:
        return torch.ones(1, length, device=self.device, dtype=torch.long)

    def range(self, start: int, end: int) -> Tensor:
        return torch.arange(start, end, device=self.device)
