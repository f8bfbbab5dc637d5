"""A target error instead of a budget: how much of the steps' cost is needed until what is left out errs no more.

A step's price is the estimated error that it saves a unit of cost (:mod:`.budget`), and at level 1 there is no error:
so the error of a plan is estimated as the price times the cost of all steps that it does not take. Steps are left
out from the cheapest price up, as long as that sum stays below what the target allows.

The estimates are shrunk (:mod:`.errors`), for choosing levels, so that they are in units of their own: the measured
error (root mean square over heads of each head's relative error) is about ``FACTOR * estimate ** POWER``. That alone
was off by 18 % on synthetic tensors, but by 48 % on a model's calls. So ROWS queries are then computed in full and by
the plan (:mod:`.value_gain`), what is wanted of the estimate is changed in the proportion of target and error, and the
steps are chosen anew; ROUNDS times. ``scripts/experiments/target_error.py`` fits the two numbers, and measures how well
targets are met: typically to 12 to 15 %. Where few queries have nearly all of the error, those rows can miss it.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR, POWER = 0.399, 0.926
ROWS, ROUNDS, CORRECTION = 32, 2, 8.0
_UNITS = 2**40  # the allowed error in whole numbers: sums are the same every time, on every device


def corrected_target(target_error: float, wanted: Tensor | float, errors: Tensor) -> Tensor:
    """What to want of the estimate, so that the error that was measured becomes the target.

    Args:
        target_error: As the config has it.
        wanted: What the estimate was to meet, a number or [batch].
        errors: float32 [batch], the squared relative errors that this had, on average over all heads.

    Returns:
        float32 [batch].
    """
    measured = errors.sqrt().clamp(min=target_error / CORRECTION, max=target_error * CORRECTION)
    return wanted * target_error / measured


def room_for_error(spent: Tensor, prices: Tensor, rows: Tensor, target_error: Tensor | float) -> Tensor:
    """What is to be spent on steps, in 1 / kv_block_size.

    Args:
        spent: int64 [batch, bins], what the steps of each price cost.
        prices: float64 [bins], the squared error that a unit of cost saves, rising.
        rows: int64 [batch], rows of blocks, of all heads, whose squared errors are averaged.
        target_error: A number, or of each sample, [batch].

    Returns:
        int64 [batch].
    """
    target = torch.as_tensor(target_error, device=spent.device).double().expand(len(spent))
    allowed = ((target / FACTOR) ** (2 / POWER) * rows.double().clamp(min=1))[:, None]
    saved = (spent.double() * prices / allowed * _UNITS).clamp(max=2 * _UNITS).to(torch.int64)
    up_to = saved.cumsum(1)
    left_out = (up_to <= _UNITS).sum(1, keepdim=True)  # so many bins from the first, in full
    costs = torch.nn.functional.pad(spent.cumsum(1), (1, 0))
    errors = torch.nn.functional.pad(up_to, (1, 0))
    last = left_out.clamp(max=spent.shape[1] - 1)
    each = (prices[last] / allowed * _UNITS).clamp(min=1.0)
    part = ((_UNITS - errors.gather(1, left_out)).double() / each).to(torch.int64)
    part = torch.minimum(part, spent.gather(1, last)).clamp(min=0) * (left_out < spent.shape[1])
    return (costs[:, -1:] - costs.gather(1, left_out) - part)[:, 0]
