"""The ``budget`` rule: the levels of least estimated error that a compute budget pays for.

Every block pair stands on a ladder: rung 0 is the centroid, rung 1 the coarsest level, rung ``num_levels`` level 1.
At a price ``lambda`` a pair takes the rung with the least error + lambda * cost, which is a vertex of the lower convex
hull of its (cost, error) points; so each step of the ladder has one lambda below which it is taken. The steps are
counted in a histogram over lambda, its cumulative cost gives the lambda at which the budget is spent, and the bin in
which that happens is filled in index order. Nothing is sorted and nothing is read back, so that a GPU is never waited
for; costs are whole numbers of 1 / kv_block_size, so that the result is the same every time, and the same whether one
process holds all heads or several hold some each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .sharing import gather_ranks
from .target import room_for_error

# The leading 16 bits of a non-negative float32, 8 of exponent and 7 of mantissa, are a log-spaced bin, 128 an octave.
_BIN_SHIFT = 16
_BINS = 1 << 15
_FORBIDDEN = 1e30


@dataclass(frozen=True)
class Limits:
    """What the rule may not choose freely.

    Attributes:
        cap: int8 [batch, heads, kv_blocks], the coarsest level allowed beside the centroid; None = any.
        counted: bool [batch, kv_blocks], False for blocks without a real key, which get level 0; None = all True.
        full: bool [query_blocks, kv_blocks], pairs that are level 1 whatever the budget; None = none.
    """

    cap: Tensor | None = None
    counted: Tensor | None = None
    full: Tensor | None = None


def rung_costs(kv_block_size: int, num_levels: int) -> list[int]:
    """Cost of each rung in 1 / kv_block_size: the centroid, the coarsest level, ..., level 1."""
    return [1] + [kv_block_size >> (num_levels - rung) for rung in range(1, num_levels + 1)]


def step_prices(errors: Tensor, kv_block_size: int, cap: Tensor | None = None) -> Tensor:
    """The lambda, as a bin, below which each step of the ladder is taken: never rising from a step to the next.

    Step ``m`` belongs to the hull where every rung above it is compared with every rung below it:
    ``max over j >= m of min over i < m of (error_i - error_j) / (cost_j - cost_i)``.

    Args:
        errors: float32 [num_levels, batch, heads, query_blocks, kv_blocks]: levels 2 .. num_levels, then the centroid;
            level 1 has none.
        cap: as in :class:`Limits`. A rung that it forbids is never on the hull.

    Returns:
        int16 [num_levels, batch, heads, query_blocks, kv_blocks], the first step first.
    """
    num_levels = errors.shape[0]
    costs = rung_costs(kv_block_size, num_levels)
    rungs = [errors[-1]] + [errors[level - 2] for level in range(num_levels, 1, -1)]
    rungs = [torch.nan_to_num(rung, nan=0.0, posinf=_FORBIDDEN) for rung in rungs] + [None]
    if cap is not None:
        for rung in range(1, num_levels):
            forbidden = num_levels + 1 - rung > cap[:, :, None, :]
            rungs[rung] = rungs[rung].masked_fill(forbidden, _FORBIDDEN)
    best: list[Tensor | None] = [None] * num_levels
    for upper in range(1, num_levels + 1):
        slope = None
        for lower in range(upper):
            gain = rungs[lower] if rungs[upper] is None else rungs[lower] - rungs[upper]
            gain = gain * (1.0 / (costs[upper] - costs[lower]))
            slope = gain if slope is None else torch.minimum(slope, gain)
            best[lower] = slope if best[lower] is None else torch.maximum(best[lower], slope)
    prices = torch.stack(best).clamp_(min=0.0)
    return (prices.view(torch.int32) >> _BIN_SHIFT).to(torch.int16)


def spend(
    prices: Tensor,
    compute_budget: float | None,
    kv_block_size: int,
    limits: Limits,
    heads_group: Any | None = None,
    target_error: float | None = None,
) -> Tensor:
    """Take steps, dearest lambda first, while the budget lasts.

    Args:
        prices: what :func:`step_prices` gives, for all heads. One lambda a sample, over its heads.
        compute_budget: mean cost of a pair with real keys, dense = 1. The plan comes within half a step of it, unless
            one centroid a pair and the full pairs already exceed it: then no step is taken.
        heads_group: the process group whose processes each hold some of the layer's heads, lower ranks the earlier
            ones: they share one lambda. None = all heads are here.
        target_error: Instead of the budget (then None): spend what the estimated error needs (:mod:`.target`).

    Returns:
        int8 [batch, heads, query_blocks, kv_blocks].
    """
    num_levels, batch = prices.shape[:2]
    costs = _step_costs(prices, kv_block_size, limits)
    spent, pairs = _spent_by_bin(prices, costs), _pairs(prices.shape, limits, prices.device)
    by_rank, rank = spent[None], 0
    if heads_group is not None:
        every, rank = gather_ranks(torch.cat([spent, pairs], dim=1), heads_group)
        by_rank, pairs = every[:, :, :_BINS], every[:, :, _BINS:].sum(0)
    total = by_rank.sum(0)
    if target_error is None:
        room = _room(pairs, compute_budget, kv_block_size)
    else:
        room = room_for_error(total, _bin_prices(total.device), _free_rows(pairs, limits, prices), target_error)
    last_bin, left = _last_bin(total, room)
    if rank > 0:  # the last bin is filled in index order, and the heads of lower ranks come first
        left = left - by_rank[:rank].sum(0).gather(1, last_bin[:, None])[:, 0]
    shape = (batch, 1, 1, 1)
    last_bin, left = last_bin.view(shape), left.view(batch, 1)
    in_last = [torch.where(price == last_bin, cost, 0) for price, cost in zip(prices, costs, strict=True)]
    before = _exclusive_sum(sum(in_last), batch)
    level = torch.full(prices.shape[1:], num_levels + 1, dtype=torch.int8, device=prices.device)
    for rung, (price, cost) in enumerate(zip(prices, in_last, strict=True), start=1):
        before = before + cost.reshape(batch, -1)
        # Half a step may be overdrawn: so the plan is as close to the budget from either side as steps allow.
        fits = (2 * before - cost.reshape(batch, -1) <= 2 * left).view(price.shape)
        taken = (price > last_bin) | (price == last_bin) & fits
        if limits.cap is not None:
            taken &= num_levels + 1 - rung <= limits.cap[:, :, None, :]
        level = torch.where(taken, num_levels + 1 - rung, level)
    level = level.to(torch.int8)
    if limits.full is not None:
        level = torch.where(limits.full, 1, level)
    if limits.counted is not None:
        level = level * limits.counted[:, None, None, :]
    return level.to(torch.int8)


def _step_costs(prices: Tensor, kv_block_size: int, limits: Limits) -> list[Tensor]:
    """int32, broadcastable to [batch, heads, query_blocks, kv_blocks]: what each step costs; 0 where not for choice.

    A step onto a forbidden rung costs nothing; the next allowed one, which has the same price, pays for both.
    """
    num_levels, device = prices.shape[0], prices.device
    costs = rung_costs(kv_block_size, num_levels)
    free = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    if limits.counted is not None:
        free = free & limits.counted[:, None, None, :]
    if limits.full is not None:
        free = free & ~limits.full
    steps, paid = [], torch.full((1, 1, 1, 1), costs[0], dtype=torch.int32, device=device)
    for rung in range(1, num_levels + 1):
        reached = torch.full_like(paid, costs[rung])
        if limits.cap is not None:
            reached = torch.where(num_levels + 1 - rung <= limits.cap[:, :, None, :], reached, paid)
        steps.append((reached - paid) * free)
        paid = reached
    return steps


def _pairs(shape: torch.Size, limits: Limits, device: torch.device) -> Tensor:
    """int64 [batch, 2]: pairs with real keys, and those of them that are level 1 whatever the budget."""
    _, batch, heads, query_blocks, kv_blocks = shape
    counted = torch.ones(1, kv_blocks, dtype=torch.bool, device=device) if limits.counted is None else limits.counted
    pairs = counted.sum(1) * (heads * query_blocks)
    full = torch.zeros_like(pairs)
    if limits.full is not None:
        full = (counted * limits.full.sum(0)).sum(1) * heads
    return torch.stack([pairs, full], dim=1).expand(batch, 2)


def _room(pairs: Tensor, compute_budget: float, kv_block_size: int) -> Tensor:
    """int64 [batch]: what is left for steps, in 1 / kv_block_size, after the centroids and the full pairs."""
    pairs, full = pairs.unbind(1)
    # In whole numbers throughout; the budget is rounded to 2**-20 of a pair's centroid.
    allowed = (pairs * round(compute_budget * kv_block_size * 2**20)) >> 20
    return allowed - full * kv_block_size - (pairs - full)


def _bin_prices(device: torch.device) -> Tensor:
    """float64 [bins]: the price in the middle of each bin; of those beyond any number, the largest number."""
    middle = torch.arange(_BINS, dtype=torch.int32, device=device) * 2**_BIN_SHIFT + 2 ** (_BIN_SHIFT - 1)
    prices = middle.view(torch.float32).nan_to_num(_FORBIDDEN, posinf=_FORBIDDEN).clamp(max=_FORBIDDEN).double()
    prices[0] = 0.0
    return prices


def _free_rows(pairs: Tensor, limits: Limits, prices: Tensor) -> Tensor:
    """int64 [batch]: rows of blocks, of all heads (also of other processes), that are not level 1 whatever happens."""
    query_blocks, kv_blocks = prices.shape[3:]
    counted = kv_blocks if limits.counted is None else limits.counted.sum(1).clamp(min=1)
    rows = pairs[:, 0] // counted
    full = 0 if limits.full is None else limits.full.all(1).sum()
    return rows * (query_blocks - full) // query_blocks


def _spent_by_bin(prices: Tensor, costs: list[Tensor]) -> Tensor:
    """int64 [batch, bins]: what the steps of each bin cost."""
    batch, heads = prices.shape[1:3]
    # One histogram a head, so that a GPU's threads meet less often at a bin; whole numbers add up to the same.
    spent = torch.zeros(batch, heads, _BINS, dtype=torch.int64, device=prices.device)
    for price, cost in zip(prices, costs, strict=True):
        weights = cost.expand(price.shape).flatten(2).to(torch.int64)
        spent.scatter_add_(2, price.flatten(2).to(torch.int64), weights)
    return spent.sum(1)


def _last_bin(spent: Tensor, room: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [batch] each: the bin that the budget pays for in part (all above it in full), and what is left for it."""
    above = spent.flip(1).cumsum(1).flip(1) - spent  # what the steps of all higher bins cost
    # Bins are affordable from the top down; the lowest whose predecessors fit is the last that is touched.
    last = (above > room[:, None]).sum(1).clamp(max=_BINS - 1)
    return last, room - above.gather(1, last[:, None])[:, 0]


def _exclusive_sum(costs: Tensor, batch: int) -> Tensor:
    """int [batch, pairs]: what the pairs before each one, in index order, cost."""
    flat = costs.reshape(batch, -1)
    kind = torch.int32 if flat.shape[1] < 2**24 else torch.int64
    return flat.cumsum(1, dtype=kind) - flat
