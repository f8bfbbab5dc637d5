"""Policies that choose levels for block pairs by importance: the paper's, binary block-sparse, SpargeAttn, our own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from cases import Case
from equal_compute import factor_at, make_plan, mean_cost, ranked_levels, scores, shares_at, thresholds_at, token_order
from oracle import exact_errors
from torch import Tensor

from psa_diffusers import PSAConfig, pyramid_sparse_attention
from psa_diffusers.planning import build_plan
from psa_diffusers.planning.blocks import block_rows, unpadded_positions
from psa_diffusers.planning.budget import Limits, spend, step_prices
from psa_diffusers.planning.levels import cap_levels
from psa_diffusers.planning.plan import Plan
from psa_diffusers.planning.similarity import similarity_cap

PAPER = PSAConfig(importance_reduction="max", logit_correction="none")
PRESETS = {f"PSA-{i}": PSAConfig.preset(f"psa-{i}").level_fractions for i in range(1, 6)}
THRESHOLDS = PSAConfig.preset("psa-threshold").level_thresholds


@dataclass(frozen=True, eq=False)
class Result:
    """What a policy gives for a case.

    Attributes:
        output: [batch, tokens, heads, head_dim].
        costs: float64 [batch], what its attention cost, dense = 1, the estimator not included.
        estimator: FLOPs of what chose, as a share of dense attention's.
    """

    output: Tensor
    costs: Tensor
    estimator: float

    @property
    def compute_budget(self) -> float:
        """The mean cost. Waits for a GPU."""
        return float(self.costs.mean())


Policy = Callable[[Case, float], Result]


def attend(case: Case, plan: Plan, config: PSAConfig, estimator: float) -> Result:
    output = pyramid_sparse_attention(*case.inputs, config, plan=plan)
    return Result(output, sample_costs(plan), estimator)


def sample_costs(plan: Plan) -> Tensor:
    """float64 [batch]: the mean cost of a sample's block pairs, on the plan's device."""
    counts = plan.level_counts().double()
    return (counts * plan.level_costs()[:, None, None]).sum((0, 2)) / counts.sum((0, 2))


def estimator_share(config: PSAConfig) -> float:
    """Of the importance: the products of its logits, 2 FLOPs each, of dense attention's 4 a pair and feature."""
    pair = config.query_block_size * config.kv_block_size
    products = {
        "sampled": config.sampled_queries * config.sampled_keys / pair,
        "antidiagonal": 1 / 8,
        "pooled": 1 / pair,
    }
    # The budget rule's second estimate: mean and variance of a block's logits, for as many other queries.
    second = 2 * config.sampled_queries / pair if config.rule == "budget" else 0.0
    return (products[config.importance] + second) / 2


def by_levels(choose: Callable[[Tensor, float, PSAConfig], Tensor], base: PSAConfig = PAPER) -> Policy:
    """A policy from scores [batch, heads, query_blocks, kv_blocks] and a budget to levels."""
    attending = _read_only(base)

    def policy(case: Case, budget: float) -> Result:
        levels = choose(scores(case, base), budget, base)
        plan = make_plan(case, base, levels, token_order(case, base))
        return attend(case, plan, attending, estimator_share(replace(base, rule="topk", compute_budget=None)))

    return policy


def _read_only(base: PSAConfig) -> PSAConfig:
    """The importance, order and blocks of a config, of a rule that has no other settings."""
    cleared = dict.fromkeys(
        ("compute_budget", "logit_correction", "value_correction", "level_thresholds", "level_fractions")
    )
    return replace(base, rule="topk", **cleared)


def quantiles(fractions: tuple[float, ...], base: PSAConfig = PAPER) -> Policy:
    """The paper's quantile rule; shares are scaled to the budget."""
    return by_levels(lambda score, budget, _: shares_at(score, fractions, budget), _read_only(base))


def thresholds(values: tuple[float, ...], base: PSAConfig = PAPER) -> Policy:
    """The paper's threshold rule; thresholds are scaled to the budget."""
    return by_levels(
        lambda score, budget, config: thresholds_at(score, values, budget, config.kv_block_size), _read_only(base)
    )


def capped(fractions: tuple[float, ...], similarity: tuple[float, ...], base: PSAConfig = PAPER) -> Policy:
    """The quantile rule with the similarity cap, at equal compute: the cap costs shares."""

    base = _read_only(base)

    def policy(case: Case, budget: float) -> Result:
        order, score = token_order(case, base), scores(case, base)
        cap = similarity_cap(case.key, order, None, base.kv_block_size, similarity)
        levels = factor_at(
            budget,
            1 / sum(fractions),
            score,
            lambda factors: cap_levels(ranked_levels(score, [share * factors for share in fractions]), cap),
            lambda levels: mean_cost(levels, base.kv_block_size, base.num_levels),
        )
        return attend(case, make_plan(case, base, levels, order), base, estimator_share(base))

    return policy


def budget_rule(base: PSAConfig | None = None) -> Policy:
    """Ours: the least estimated error at the budget."""
    base = base or PSAConfig()

    def policy(case: Case, budget: float) -> Result:
        config = replace(base, compute_budget=budget)
        plan = build_plan(*case.inputs, config, grid=case.grid)
        return attend(case, plan, config, estimator_share(config))

    return policy


def oracle(value_correction: str = "none") -> Policy:
    """The budget rule with the exact first-order errors. No policy: it costs more than dense attention."""

    def policy(case: Case, budget: float) -> Result:
        config = PSAConfig(compute_budget=budget, logit_correction="none", value_correction=value_correction)
        shape = (1, case.heads, -(-case.tokens // 128), -(-case.tokens // 64))
        empty = torch.ones(shape, dtype=torch.int8, device=case.query.device)
        plan = make_plan(case, config, empty, token_order(case, config))
        levels = spend(step_prices(exact_errors(case, plan), 64), budget, 64, Limits())
        return attend(case, replace(plan, level_mask=levels, cache={}), config, 1.0)

    return policy


def sparge(similarity: float | None, base: PSAConfig = PAPER) -> Policy:
    """SpargeAttn's block selection (arXiv 2502.18137, section 3.2), re-implemented.

    Blocks of queries and keys are compressed to their means; softmax over the key means; a row keeps its top blocks up
    to a cumulative share tau. Blocks whose tokens are not alike (mean pairwise cosine below ``similarity``) are left
    out of that and always computed, as rows and as columns. tau is what meets the budget; where the fixed blocks alone
    exceed it, ``similarity`` is halved until they do not. Not here: skipping of products inside the kernel by the
    running maximum, and quantisation.
    """
    base = _read_only(replace(base, importance="pooled"))

    def policy(case: Case, budget: float) -> Result:
        order = token_order(case, base)
        means, likeness = zip(
            _means_and_likeness(case.query, order, base.query_block_size),
            _means_and_likeness(case.key, order, base.kv_block_size),
            strict=True,
        )
        logits = means[0] @ means[1].transpose(2, 3) * case.scale
        unlike = [mean < _least_likeness(likeness, similarity, 0.8 * budget)[:, None, None] for mean in likeness]
        fixed = unlike[0][..., :, None] | unlike[1][..., None, :]
        score = torch.softmax(logits.masked_fill(unlike[1][..., None, :], -1e30), -1)
        levels = factor_at(
            *(budget, 1.0, score), lambda tau: _top_cdf(score, tau, fixed), lambda levels: mean_cost(levels, 64, 4)
        )
        return attend(case, make_plan(case, base, levels, order), base, estimator_share(base))

    return policy


def _least_likeness(likeness: Sequence[Tensor], similarity: float | None, share: float) -> Tensor:
    """float32 [batch]: the limit below which blocks are fixed: ``similarity``, halved until less than this share of the
    pairs is; -inf where none is. ``likeness`` [batch, heads, blocks] of query and key blocks."""
    limits, limit = [], similarity
    while limit is not None:
        limits.append(limit)
        limit = limit / 2 if limit > 0.02 else None
    chosen = torch.full_like(likeness[0][:, 0, 0], float("-inf"))
    for limit in reversed(limits):
        fixed = (likeness[0] < limit)[..., :, None] | (likeness[1] < limit)[..., None, :]
        chosen = torch.where(fixed.float().mean((1, 2, 3)) < share, limit, chosen)
    return chosen


def _top_cdf(score: Tensor, tau: Tensor, fixed: Tensor) -> Tensor:
    ranked, index = score.sort(dim=-1, descending=True, stable=True)
    kept = (ranked.cumsum(-1) - ranked < tau.to(ranked)).to(torch.int8)
    return torch.zeros_like(kept).scatter_(-1, index, kept) | fixed.to(torch.int8)


def _means_and_likeness(tokens: Tensor, order: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Block means [batch, heads, blocks, head_dim] and the mean cosine of a block's pairs [batch, heads, blocks]."""
    blocks = -(-tokens.shape[1] // size)
    real = unpadded_positions(tokens.shape[1], size, tokens.device)
    rows = block_rows(tokens, order, real, 0, blocks, size).unflatten(-1, tokens.shape[2:])
    count = real.sum(2)[:, :, None, None]
    unit = torch.nn.functional.normalize(rows, dim=-1)
    likeness = (unit.sum(2).square().sum(-1) / count[..., 0] ** 2).transpose(1, 2)
    return (rows.sum(2) / count).transpose(1, 2), likeness
