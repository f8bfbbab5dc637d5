"""Where the tokens of a forward lie: the video's grid, text and conditioning around it, and what of them is padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

NO_GRID = "token grid unknown"

Grid = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """The tokens that self-attention sees in one forward: ``before``, then the video in raster order, then ``after``.

    What lies before and after the video (text, conditioning) is kept at full resolution.

    Attributes:
        grid: (frames, height, width) of the video, in tokens.
        before, after: How many other tokens there are on each side.
        after_varies: The model drops padded text before attention: from none to ``after`` tokens may be there.
        key_lengths: int [batch], tokens from that one on are padding, wherever the native masks it; None = nothing is.
        elsewhere: The tokens that other blocks of the model see, told apart by how many there are.
        padding_of: The tensors that key_lengths was read from. Pipelines give the same ones to every step of a run.
    """

    grid: Grid
    before: int = 0
    after: int = 0
    after_varies: bool = False
    key_lengths: Tensor | None = None
    padding_of: tuple[Tensor, ...] = ()
    elsewhere: TokenLayout | None = None

    @property
    def length(self) -> int:
        """Tokens of the whole sequence, before padded text is dropped."""
        return self.before + math.prod(self.grid) + self.after

    @property
    def has_others(self) -> bool:
        """Whether there are tokens beside the video's."""
        return self.before + self.after > 0

    def of_length(self, length: int) -> TokenLayout | None:
        """The layout of a sequence of this length: this one or ``elsewhere``; None if neither can have it."""
        others = length - math.prod(self.grid) - self.before
        if 0 <= others <= self.after if self.after_varies else others == self.after:
            return self
        return None if self.elsewhere is None else self.elsewhere.of_length(length)

    def same_as(self, other: TokenLayout) -> bool:
        """Whether the tokens are certain to lie alike; what is padding is not compared, which would wait for a GPU."""
        shape, others = ((one.grid, one.before, one.after, len(one.padding_of)) for one in (self, other))
        return shape == others and all(a is b for a, b in zip(self.padding_of, other.padding_of, strict=True))

    def full_tokens(self, length: int) -> slice | Tensor | None:
        """The tokens outside the grid in a sequence of this length: a slice, or bool [length] on the CPU."""
        end = self.before + math.prod(self.grid)
        if self.before and length > end:
            return _around(self.before, end, length)
        if self.before:
            return slice(0, self.before)
        return slice(end, length) if length > end else None

    def explains(self, mask: Tensor, batch: int, length: int) -> bool:
        """Whether an attention mask hides just the padding that ``key_lengths`` tells of.

        Padded keys are hidden from all queries (bool [batch, 1, 1, length]), or also padded queries from all keys (bool
        [batch, 1, length, length]): what those queries get is padding again. On a CPU the mask's values are compared,
        elsewhere only its shape, since reading them would wait for the device.
        """
        if self.key_lengths is None or not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            return False
        if tuple(mask.shape) not in ((batch, 1, 1, length), (batch, 1, length, length)):
            return False
        if len(self.key_lengths) != batch:
            return False
        if torch.compiler.is_compiling() or mask.device.type != "cpu":
            return True
        real = torch.arange(length)[None, :] < self.key_lengths.cpu()[:, None]
        expected = real[:, None, None, :]
        if mask.shape[2] == length:
            expected = expected & real[:, None, :, None]
        return torch.equal(mask, expected)


@lru_cache(maxsize=64)
def _around(start: int, end: int, length: int) -> Tensor:
    mask = torch.ones(length, dtype=torch.bool)
    mask[start:end] = False
    return mask


# -- what is read from tensors ------------------------------------------------------------------------------------


def once_a_tensor(compute: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    """Remember what was computed of a tensor as long as it lives unchanged.

    Pipelines give the same masks and coordinates to every step: so a GPU is waited for once a run.
    """
    known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    @wraps(compute)
    def recall(tensor: Tensor) -> Any:
        version = None if tensor.is_inference() else tensor._version
        seen, result = known.get(tensor, (None, None))
        if result is None or seen != version:
            result = compute(tensor)
            known[tensor] = (version, result)
        return result

    return recall


def real_counts(mask: Tensor) -> Tensor:
    """int64 [batch] on the mask's device: how many tokens of a padding mask [batch, tokens] are real. Nothing waits."""
    return mask.to(torch.int64).sum(1)


@once_a_tensor
def padded_at_the_end(mask: Tensor) -> bool:
    """Whether all the padding of a mask [batch, tokens] comes after what is real. Waits for the mask's device."""
    real = mask.bool()
    return bool((real[:, 1:] <= real[:, :-1]).all())


@once_a_tensor
def raster_at_the_end(coordinates: Tensor) -> Grid | tuple[()]:
    """The grid that the last of these tokens form in raster order; () where it would be less than half of them.

    Args:
        coordinates: [tokens, 3], time, height and width of each. Waits for their device.
    """
    place = coordinates.detach().to("cpu", torch.float64)
    count = len(place)
    width = _run_at_the_end(place[:, :2])
    frame = _run_at_the_end(place[:, :1])
    if count == 0 or frame % width:
        return ()
    frames = place[count % frame :].view(-1, frame, 3)
    # From the last frame back: the same places within a frame, one time a frame, and each time before the next.
    same = (frames[:, :, 1:] == frames[-1:, :, 1:]).all(2).all(1)
    same &= (frames[:, :, 0] == frames[:, :1, 0]).all(1)
    times = frames[:, 0, 0]
    same[:-1] &= times[:-1] < times[1:]
    number = int(same.flip(0).long().cumprod(0).sum())
    rows = frames[-1].view(-1, width, 3)
    regular = bool((rows[:, :, 2] == rows[:1, :, 2]).all()) and bool((rows[1:, 0, 1] > rows[:-1, 0, 1]).all())
    regular = regular and bool((rows[:, 1:, 2] > rows[:, :-1, 2]).all())
    if not regular or 2 * number * frame < count:
        return ()
    return number, frame // width, width


def _run_at_the_end(values: Tensor) -> int:
    """How many of the last rows are equal to the last one, without a break."""
    return int((values == values[-1:]).all(1).flip(0).long().cumprod(0).sum())
