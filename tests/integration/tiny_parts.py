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
        before, after: Text and conditioning tokens around the video, with padding; or a function of the grid.
        real: Of those after the video, how many are real, by sample; None = all.
        cut: Padding is cut off before attention.
        change_padding: Changes padded text in the arguments; None = there is none.
        layer_0: Calls of layer 0.
        batch_of_samples: A batch is its samples, one by one; not where the model packs or cuts them by another rule.
    """

    model: str
    config: dict[str, Any]
    inputs: Callable[[Grid, int], dict[str, Any]]
    calls: int
    before: int | Callable[[Grid], int] = 0
    after: int | Callable[[Grid], int] = 0
    real: tuple[int, ...] | None = None
    cut: bool = False
    a_sample: bool = False
    change_padding: Callable[[dict[str, Any]], None] | None = None
    layer_0: int = 1
    batch_of_samples: bool = True
    grids: tuple[Grid, ...] = field(default=((3, 4, 5), (5, 3, 7), (2, 5, 3)))

    def build(self) -> torch.nn.Module:
        if not hasattr(diffusers, self.model):
            pytest.skip(f"diffusers {diffusers.__version__} has no {self.model}")
        torch.manual_seed(0)
        model = getattr(diffusers, self.model)(**self.config).eval()
        for weights in model.parameters():
            if not weights.any():  # gates that begin closed would hide what attention gives
                torch.nn.init.normal_(weights, std=0.1)
        return model

    def around(self, grid: Grid) -> tuple[int, int]:
        """How many tokens there are before and after the video."""
        before, after = (count if isinstance(count, int) else count(grid) for count in (self.before, self.after))
        return before, after

    def real_after(self, grid: Grid, batch: int) -> list[int]:
        return [self.around(grid)[1]] * batch if self.real is None else list(self.real[:batch])


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
