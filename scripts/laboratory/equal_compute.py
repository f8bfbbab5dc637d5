"""Levels at a given compute budget, to less than a pair a row, by the paper's rules on scores that are made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from cases import Case
from torch import Tensor

from psa_diffusers import PSAConfig
from psa_diffusers.planning.blocks import make_layout, unpadded_positions
from psa_diffusers.planning.importance import (
    antidiagonal_importance,
    block_means,
    pooled_importance,
    sampled_importance,
)
from psa_diffusers.planning.levels import threshold_levels
from psa_diffusers.planning.plan import Plan
from psa_diffusers.planning.sampling import draw_samples

GOLDEN = 0.6180339887498949
ByFactor = Callable[[Tensor], Tensor]


def token_order(case: Case, config: PSAConfig) -> Tensor | None:
    sizes = (config.query_block_size, config.kv_block_size)
    layout = make_layout(
        *(case.tokens, case.tokens, *sizes),
        curve=config.order,
        grid=case.grid,
        full_tokens=None,
        device=case.query.device,
    )
    return layout.order


@lru_cache(maxsize=8)
def scores(case: Case, config: PSAConfig) -> Tensor:
    """float32 [batch, heads, query_blocks, kv_blocks]: the config's importance. Kept for the case's other budgets."""
    order, sizes = token_order(case, config), (config.query_block_size, config.kv_block_size)
    if config.importance == "antidiagonal":
        return antidiagonal_importance(
            *(case.query, case.key),
            order=order,
            real=None,
            query_block_size=sizes[0],
            kv_block_size=sizes[1],
            scale=case.scale,
            reduction=config.importance_reduction,
        ).score
    if config.importance == "pooled":
        real = [unpadded_positions(case.tokens, size, case.query.device) for size in sizes]
        means = [block_means(x, order, r) for x, r in zip((case.query, case.key), real, strict=True)]
        return pooled_importance(*means, real[1].sum(2), scale=case.scale).score
    query = draw_samples(case.query, order, None, sizes[0], config.sampled_queries, seed=config.seed, kind="query")
    key = draw_samples(case.key, order, None, sizes[1], config.sampled_keys, seed=config.seed, kind="key")
    return sampled_importance(query, key, scale=case.scale, reduction=config.importance_reduction).score


def make_plan(case: Case, config: PSAConfig, levels: Tensor, order: Tensor | None) -> Plan:
    """A plan of int8 levels [batch, heads, query_blocks, kv_blocks] with the config's blocks."""
    return Plan(
        levels,
        case.tokens,
        case.tokens,
        config.query_block_size,
        config.kv_block_size,
        config.num_levels,
        order,
    )


def mean_cost(levels: Tensor, kv_block_size: int, num_levels: int) -> Tensor:
    """float64 [batch]: compute budget of a level mask [batch, heads, query_blocks, kv_blocks]; dense = 1."""
    cost = [0.0] + [2.0**-level for level in range(num_levels)] + [1 / kv_block_size]
    return torch.tensor(cost, device=levels.device)[levels.long()].double().mean((1, 2, 3))


def ranked_levels(score: Tensor, fractions: Sequence[float | Tensor]) -> Tensor:
    """The paper's quantile rule, but that rows round their shares in turn up and down, so that any budget is met.

    A share is a number, or a tensor [batch, 1, 1, 1]."""
    blocks = score.shape[-1]
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1, stable=True)
    rows = torch.arange(score.shape[1] * score.shape[2], device=score.device).view(1, *score.shape[1:3], 1)
    rounding = (rows * GOLDEN) % 1.0
    levels = torch.zeros_like(rank, dtype=torch.int8)
    for level in range(len(fractions), 0, -1):
        end = torch.floor(torch.as_tensor(blocks * sum(fractions[:level])).to(rounding) + rounding)
        levels = torch.where(rank < end, level, levels)
    empty = (levels > 0).sum(-1, keepdim=True) == 0
    return torch.where(empty & (rank == 0), 1, levels).to(torch.int8)


def lowest_pairs(priority: Tensor, budget: float) -> Tensor:
    """Level 1 for the share ``budget`` of pairs of the lowest priority [..., query_blocks, kv_blocks], over all rows;
    at least one a row."""
    first = priority.argmin(-1, keepdim=True)
    kept = torch.zeros_like(priority, dtype=torch.int8).scatter_(-1, first, 1)
    count = round(budget * priority.numel()) - int(kept.sum())
    flat = priority.masked_fill(kept > 0, float("inf")).flatten()
    kept.view(-1)[flat.argsort(dim=0, stable=True)[: max(0, count)]] = 1
    return kept


def factor_at(budget: float, high: float, like: Tensor, levels_of: ByFactor, cost_of: Callable[[Tensor], Tensor]):
    """The levels at the largest factor in (0, high] whose cost stays within the budget, by bisection.

    Args:
        like: A tensor [batch, ...]; every sample gets its own factor. Nothing waits for its device.
        levels_of: From factors, float64 [batch, 1, 1, 1], to levels [batch, heads, query_blocks, kv_blocks].
        cost_of: From levels to costs, float64 [batch].
    """
    highs = torch.full((len(like), 1, 1, 1), high, dtype=torch.float64, device=like.device)
    lows, best = torch.zeros_like(highs), levels_of(highs)
    enough = _within(budget, cost_of(best))  # nothing to look for
    for _ in range(16):
        middle = (lows + highs) / 2
        levels = levels_of(middle)
        fits = _within(budget, cost_of(levels))
        best = torch.where(fits & ~enough, levels, best)
        lows, highs = torch.where(fits, middle, lows), torch.where(fits, highs, middle)
    return torch.where(enough | (lows > 0), best, levels_of(highs))


def _within(budget: float, costs: Tensor) -> Tensor:
    return (costs <= budget)[:, None, None, None]


def thresholds_at(score: Tensor, thresholds: tuple[float, ...], budget: float, kv_block_size: int) -> Tensor:
    """The paper's threshold rule, its thresholds times one factor (cut at 1)."""

    def levels_of(factors: Tensor) -> Tensor:
        return threshold_levels(score, tuple((tau * factors).clamp(max=1.0) for tau in thresholds), None)

    return factor_at(
        budget,
        1 / min(tau for tau in thresholds if tau > 0),
        score,
        levels_of,
        lambda levels: mean_cost(levels, kv_block_size, len(thresholds)),
    )


def shares_at(score: Tensor, fractions: tuple[float, ...], budget: float) -> Tensor:
    """The paper's quantile rule, its shares times one factor."""
    cost = sum(share * 2.0**-level for level, share in enumerate(fractions))
    factor = min(budget / cost, 1 / sum(fractions))
    return ranked_levels(score, tuple(share * factor for share in fractions))
