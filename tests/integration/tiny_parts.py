"""What the tables of tiny transformers are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch

torch.set_num_threads(1)  # the models are tiny: threads only cost

Grid = tuple[int, int, int]
TEXT, REAL = 9, (6, 3)  # text tokens, and how many of them are real in each of two samples


@dataclass(frozen=True)
class Tiny:
    """A transformer in a table row.

    Attributes:
        model: Class name in diffusers.
        config: Its constructor's arguments.
        inputs: (grid in tokens, batch) -> the forward's arguments.
        calls: Video self-attention calls of a forward, one sample each where ``a_sample``.
        before, after: Text and conditioning tokens around the video, with padding.
        real: Of those after the video, how many are real, by sample; None = all.
        cut: Padding is cut off before attention.
        change_padding: Changes padded text in the arguments; None = there is none.
        layer_0: Calls of layer 0.
    """

    model: str
    config: dict[str, Any]
    inputs: Callable[[Grid, int], dict[str, Any]]
    calls: int
    before: int = 0
    after: int = 0
    real: tuple[int, ...] | None = None
    cut: bool = False
    a_sample: bool = False
    change_padding: Callable[[dict[str, Any]], None] | None = None
    layer_0: int = 1
    grids: tuple[Grid, ...] = field(default=((3, 4, 5), (5, 3, 7), (2, 5, 3)))

    def build(self) -> torch.nn.Module:
        if not hasattr(diffusers, self.model):
            pytest.skip(f"diffusers {diffusers.__version__} has no {self.model}")
        torch.manual_seed(0)
        return getattr(diffusers, self.model)(**self.config).eval()

    def real_after(self, batch: int) -> list[int]:
        return [self.after] * batch if self.real is None else list(self.real[:batch])


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + len(shape)))


def padding_mask(lengths: tuple[int, ...], tokens: int, batch: int, dtype=torch.bool) -> torch.Tensor:
    return (torch.arange(tokens)[None, :] < torch.tensor(lengths[:batch])[:, None]).to(dtype)


def overwrite(*pairs: tuple[str, str]) -> Callable[[dict[str, Any]], None]:
    """Writes other values where these texts are padding, as their masks say."""

    def change(inputs: dict[str, Any]) -> None:
        for text, mask in pairs:
            other = noise(*inputs[text].shape, seed=99)
            inputs[text] = torch.where(inputs[mask].bool()[..., None], inputs[text], other)

    return change
