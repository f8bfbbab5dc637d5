"""A target error instead of a budget: how much of the steps' cost is needed until what is left out errs no more.

A step's price is the estimated error that it saves a unit of cost (:mod:`.budget`), and at level 1 there is no error:
so the error of a plan is estimated as the price times the cost of all steps that it does not take. Steps are left
out from the cheapest price up, as long as that sum stays below what the target allows.

The estimates are shrunk (:mod:`.errors`), for choosing levels, so that they are in units of their own. On the synthetic
cases of ``scripts/experiments/target_error.py`` the measured error (root mean square over heads of each head's relative
error) is about ``FACTOR * estimate ** POWER``. The script fits these two, and measures how well targets are met.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR, POWER = 0.291, 0.845
_UNITS = 2**40  # the allowed error in whole numbers: sums are the same every time, on every device


def room_for_error(spent: Tensor, prices: Tensor, rows: Tensor, target_error: float) -> Tensor:
    """What is to be spent on steps, in 1 / kv_block_size.

    Args:
        spent: int64 [batch, bins], what the steps of each price cost.
        prices: float64 [bins], the squared error that a unit of cost saves, rising.
        rows: int64 [batch], rows of blocks, of all heads, whose squared errors are averaged.
        target_error: See :class:`~psa_diffusers.PSAConfig`.

    Returns:
        int64 [batch].
    """
    allowed = (target_error / FACTOR) ** (2 / POWER) * rows.double().clamp(min=1)[:, None]
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
