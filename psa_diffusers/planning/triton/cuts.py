"""Where a row of scores is cut in rank order, without a sort.

A cut is at a number of blocks (``topk``) or at a share of the row's mass (``threshold``). Where the cuts lie is found
by halving an interval of scores for each, which, being no negative numbers, are ordered as their bits are; what is left
in it, in the end equal scores, is taken in index order. Masses are added up as whole numbers, so that no order of
adding changes them: of 30 bits for a row's, so that a cut is off by 2^-29 of it for each block at most, where the
definition adds in float64.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...config import PSAConfig
from ...gpu.sizes import next_power_of_2


class Cuts(NamedTuple):
    """Where a row is cut: what is before cut c in rank order, and before none that follows it, gets ``levels[c]``."""

    is_threshold: bool
    places: Tensor  # float64: shares of the row's mass or of its blocks, falling; the last up to a power of two of them
    levels: Tensor  # int32 [cuts]


def make_cuts(config: PSAConfig, device: torch.device) -> Cuts:
    """The cuts of the config's rule."""
    return _make_cuts(config.rule, config.level_thresholds or config.level_fractions, device)


@lru_cache(maxsize=64)
def _make_cuts(rule: str, values: tuple[float, ...], device: torch.device) -> Cuts:
    """Levels that no block can get have no cut."""
    ends = values if rule == "threshold" else [sum(values[: level + 1]) for level in range(len(values))]
    cuts = []
    for level, end in enumerate(ends, start=1):
        if end > (cuts[-1][0] if cuts else 0.0):
            cuts.append((end, level))
    is_threshold = rule == "threshold" and bool(cuts)
    cuts = cuts or [(0.0, 1)]  # no block before any cut: as with topk the top one alone
    cuts.reverse()
    more = next_power_of_2(len(cuts)) - len(cuts)
    places = torch.tensor([end for end, _ in cuts + cuts[-1:] * more], dtype=torch.float64)
    levels = torch.tensor([level for _, level in cuts], dtype=torch.int32)
    return Cuts(is_threshold, places.to(device), levels.to(device))


@triton.jit
def mass_unit(score):
    """float32: a power of two that makes the sum of all scores a number of 30 bits; any for a sum of 0."""
    exponent = tl.sum(score, axis=0).to(tl.int32, bitcast=True) >> 23
    return (tl.minimum(2 * 127 + 29 - exponent, 254) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _narrowed(bits, amount, goal, low, high, low_sum, high_sum, width):
    """Halves each cut's interval [low, high) down to ``width``, or until nothing beyond its goal is left in it.

    The amounts of the entries from ``low`` on add up to ``low_sum``, not below the goal, those from ``high`` on to
    ``high_sum``, below it. All are [CUTS].
    """
    while tl.max(((high - low > width) & (low_sum > goal)).to(tl.int32), axis=0) > 0:
        middle = low + (high - low) // 2
        total = tl.sum(tl.where(bits[None, :] >= middle[:, None], amount[None, :], 0), axis=1)
        is_enough = total >= goal
        low = tl.where(is_enough, middle, low)
        low_sum = tl.where(is_enough, total, low_sum)
        high = tl.where(is_enough, high, middle)
        high_sum = tl.where(is_enough, high_sum, total)
    return low, high, low_sum, high_sum


@triton.jit
def intervals(bits, amount, total, goal, unit):
    """Of each cut the interval of scores in which its goal is reached, what is needed of it, and an entry's amount.

    Entries from ``high`` on are before the goal, and of those from ``low`` on as many, in index order, as are needed:
    the next one as long as those before it add up to less. All [CUTS].

    Args:
        bits: int32 [BLOCK_N], of the scores; -1 for entries that do not count.
        amount: of the entries, 0 for those. ``total`` is their sum.
        goal: [CUTS], at most the total or 1.
        unit: what an entry's amount is its score times of; None = all amounts are 1.
    """
    low = tl.zeros_like(goal)
    high = low + tl.max(bits, axis=0) + 1
    low_sum = tl.zeros_like(goal) + total
    low, high, low_sum, high_sum = _narrowed(bits, amount, goal, low, high, low_sum, tl.zeros_like(goal), 1024)
    is_inside = (bits[None, :] >= low[:, None]) & (bits[None, :] < high[:, None])
    count = tl.sum(is_inside.to(tl.int32), axis=1)
    if tl.max(count, axis=0) > 1:
        low, high, low_sum, high_sum = _narrowed(bits, amount, goal, low, high, low_sum, high_sum, 1)
        is_inside = (bits[None, :] >= low[:, None]) & (bits[None, :] < high[:, None])
        count = tl.sum(is_inside.to(tl.int32), axis=1)
    # By now there is one entry, or all are exactly ``low``, or the last of them reaches the goal.
    each = tl.zeros_like(goal) + 1
    if unit is not None:
        each = tl.maximum((low.to(tl.float32, bitcast=True) * unit).to(tl.int32), 1)
    return low, high, tl.where(low_sum > goal, goal - high_sum, each * count), each


@triton.jit
def of_cut(values, cut):
    """One of [CUTS] numbers."""
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == cut, values, 0), axis=0)
