"""A learned level generator: the budget rule, whose error estimates a small network corrects.

The network sees what the rule knows of a block pair at a level, and multiplies the pair's estimated error by the
exponential of what it says; it begins as 0, which is the rule itself. It is trained through a relaxation: at a price
lambda a pair takes every rung of its ladder with the weight softmax(-(error / lambda + cost) / temperature), and a
query's output is that of attention over all rungs, their masses and values multiplied by the weights. With weights of 0
and 1 that is the plan's own output, the value correction included. Lambda is where the expected cost meets the budget,
and moves with the network (by the implicit function theorem), so that errors cannot fall by spending more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from block_policies import Policy, budget_rule
from cases import Case
from torch import Tensor, nn

from psa_diffusers import PSAConfig
from psa_diffusers.backends.reference import head_covariance
from psa_diffusers.planning import build, build_plan
from psa_diffusers.planning.budget import rung_costs
from psa_diffusers.planning.errors import _mean_power, _value_distance, pair_errors, query_power

FEATURES = ("first estimate", "second estimate", "share", "logit variance", "value spread", "distance", "error")
TINY = 1e-12
CONFIG = PSAConfig(logit_correction="none")  # which the relaxation does not have


class Correction(nn.Module):
    """The logarithm of a factor on each estimated error.

    Args:
        hidden: Width of the two hidden layers; 0 = linear in the features.
        levels: Of the errors: 2 .. num_levels and the centroid.
    """

    def __init__(self, hidden: int, levels: int = 4) -> None:
        super().__init__()
        self.levels, inputs = levels, len(FEATURES) + levels
        self.register_buffer("mean", torch.zeros(len(FEATURES)))
        self.register_buffer("spread", torch.ones(len(FEATURES)))
        last = nn.Linear(hidden or inputs, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        first = [nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU()] if hidden else []
        self.network = nn.Sequential(*first, last)

    def standardise(self, features: Tensor) -> None:
        """Take mean and spread from features [..., len(FEATURES)]."""
        flat = features.flatten(0, -2)
        self.mean.copy_(flat.mean(0))
        self.spread.copy_(flat.std(0).clamp(min=1e-3))

    def forward(self, features: Tensor) -> Tensor:
        """[levels, ..., len(FEATURES)] to [levels, ...]."""
        level = torch.eye(self.levels).view(self.levels, *[1] * (features.ndim - 2), self.levels)
        level = level.expand(*features.shape[:-1], self.levels)
        return self.network(torch.cat([(features - self.mean) / self.spread, level], -1))[..., 0]


def features_of(importance, second: Tensor, query, spread, full_query_blocks=None, *, scale: float) -> Tensor:
    """[levels, batch, heads, query_blocks, kv_blocks, len(FEATURES)], from what ``pair_errors`` gets. Logarithms."""
    errors = pair_errors(importance, second, query, spread, full_query_blocks, scale=scale)
    shares = importance.score / importance.score.sum(-1, keepdim=True).clamp(min=TINY)
    output = shares @ spread.value_mean
    power = _mean_power(output, full_query_blocks).clamp(min=TINY)[:, :, None, None]
    distance = _value_distance(output, spread.value_mean) / power
    squares = query_power(query) * scale**2
    levels = []
    for error, key_spread, value_spread in zip(errors, spread.key, spread.value, strict=True):
        variance = squares @ key_spread.transpose(2, 3)
        values = (value_spread[:, :, None, :] / power).expand_as(variance)
        levels.append(torch.stack([importance.energy, second, shares, variance, values, distance, error], -1))
    return torch.stack(levels).clamp(min=TINY).log()


@contextmanager
def errors_by(function) -> Iterator[None]:
    """Planning in this context takes its errors from ``function``, which gets what ``pair_errors`` gets."""
    before = build.pair_errors
    build.pair_errors = function
    try:
        yield
    finally:
        build.pair_errors = before


def learned_rule(correction: Correction, base: PSAConfig | None = None) -> Policy:
    """The budget rule with corrected errors, as a policy of the laboratory."""
    plain = budget_rule(base or CONFIG)

    @torch.no_grad()
    def corrected(*arguments, **options) -> Tensor:
        return pair_errors(*arguments, **options) * correction(features_of(*arguments, **options)).exp()

    def policy(case: Case, budget: float):
        with errors_by(corrected):
            return plain(case, budget)

    return policy


def observe(case: Case, config: PSAConfig) -> Tensor:
    """The features of all pairs of a case."""
    seen = []

    def note(*arguments, **options) -> Tensor:
        seen.append(features_of(*arguments, **options))
        return pair_errors(*arguments, **options)

    with errors_by(note):
        build_plan(*case.inputs, config, grid=case.grid)
    return torch.cat(seen, 2)


@dataclass(frozen=True, eq=False)
class Sample:
    """What training needs of a call: features of all its pairs, and some queries' attention at every level.

    Attributes:
        features: [levels, heads, query_blocks, kv_blocks, len(FEATURES)].
        rows: int64 [chosen, 2], head and query block.
        mass, value: Of a block at a rung, the centroid first: [chosen, rungs, queries, kv_blocks] and
            [chosen, rungs, queries, kv_blocks, head_dim], as shares of the query's whole mass.
        correction: [chosen, rungs, queries, head_dim], what a unit of mass at a rung is given back.
        dense: [chosen, queries, head_dim].
        exact: [levels, chosen, kv_blocks], first-order squared errors in the features' units.
    """

    features: Tensor
    rows: Tensor
    mass: Tensor
    value: Tensor
    correction: Tensor
    dense: Tensor
    exact: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, case: Case, config: PSAConfig, blocks: int, queries: int, generator: torch.Generator) -> Sample:
        """``blocks`` query blocks a head, ``queries`` queries of each, drawn. All blocks must be whole."""
        order = build_plan(*case.inputs, config, grid=case.grid).order
        query, key, value = (x[0, order].transpose(0, 1) for x in case.inputs)
        factors = [config.kv_block_size] + [2**level for level in range(config.num_levels - 1, -1, -1)]
        parts = []
        for head in range(case.heads):
            counted = torch.ones(case.tokens, dtype=torch.bool)
            sizes = config.kv_block_size, config.num_levels
            covariance = head_covariance(key[head], value[head], counted, *sizes)
            shares = covariance.shares[1:].flip(0)  # centroid .. level 1
            pooled = [[x[head].unflatten(0, (-1, f)).mean(1) for x in (key, value)] for f in factors]
            whole = case.tokens // config.query_block_size
            for block in torch.randperm(whole, generator=generator)[:blocks].tolist():
                inside = torch.randperm(config.query_block_size, generator=generator)[:queries]
                q = query[head, block * config.query_block_size + inside]
                mass, values = _attention_by_rung(q, pooled, factors, config.kv_block_size, case.scale)
                given = (q @ covariance.matrix.mT * case.scale)[None] * shares[:, None, None]
                parts.append((torch.tensor([head, block]), mass, values, given))
        rows, mass, values, given = (torch.stack(items) for items in zip(*parts, strict=True))
        dense = values[:, -1].sum(2)
        moved = (values - values[:, -1:]) - (mass - mass[:, -1:])[..., None] * dense[:, None, :, None]
        power = case.dense[0].square().sum(-1).mean(0)[rows[:, 0]]
        exact = (moved.square().sum(-1).mean(2) / power[:, None, None])[:, :-1].flip(1).transpose(0, 1)
        return cls(observe(case, config)[:, 0], rows, mass, values, given, dense, exact)

    def of_rows(self, tensor: Tensor) -> Tensor:
        """[levels, chosen, kv_blocks, ...] of [levels, heads, query_blocks, kv_blocks, ...]."""
        return tensor[:, self.rows[:, 0], self.rows[:, 1]]

    def lost(self, weights: Tensor) -> Tensor:
        """Relative squared error of the chosen queries' outputs, by rung weights [chosen, rungs, kv_blocks]."""
        mass = torch.einsum("nrk,nrqk->nrq", weights, self.mass)
        total = mass.sum(1)[..., None]
        output = torch.einsum("nrk,nrqkd->nqd", weights, self.value)
        output = (output + torch.einsum("nrq,nrqd->nqd", mass, self.correction)) / total
        return (output - self.dense).square().sum() / self.dense.square().sum()


def _attention_by_rung(query: Tensor, pooled: list, factors: list[int], size: int, scale: float):
    """Mass [rungs, queries, kv_blocks] and values [rungs, queries, kv_blocks, head_dim], shares of the whole mass."""
    logits = [query @ key.mT * scale for key, _ in pooled]
    top = logits[-1].amax(1, keepdim=True)
    weights = [
        ((x - top).exp() * factor).unflatten(1, (-1, size // factor)) for x, factor in zip(logits, factors, strict=True)
    ]
    total = weights[-1].sum((1, 2))[:, None]
    mass = torch.stack([w.sum(2) for w in weights]) / total
    values = [
        torch.einsum("qkr,krd->qkd", w, value.unflatten(0, (-1, size // factor)))
        for w, (_, value), factor in zip(weights, pooled, factors, strict=True)
    ]
    return mass, torch.stack(values) / total[..., None]


def rung_weights(log_errors: Tensor, log_price: Tensor, costs: Tensor, temperature: float) -> Tensor:
    """[rungs, ...], the centroid first, of log errors [levels, ...] (levels 2 .. and the centroid).

    ``temperature`` is in units of a centroid's cost."""
    paid = torch.exp((log_errors - log_price).clamp(max=30.0)).flip(0)  # centroid, coarsest, ..., level 2
    paid = torch.cat([paid, torch.zeros_like(paid[:1])])
    total = paid + costs.view(-1, *[1] * (paid.ndim - 1))
    return torch.softmax(-total / temperature, 0)


def price_at(log_errors: Tensor, budget: float, kv_block_size: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The logarithm of the price at which the expected cost is the budget, differentiable; and the rungs' costs."""
    costs = torch.tensor(rung_costs(kv_block_size, len(log_errors)), dtype=torch.float32)
    shape = (-1, *[1] * (log_errors.ndim - 1))

    def cost(errors: Tensor, price: Tensor) -> Tensor:
        weights = rung_weights(errors, price, costs, temperature)
        return (weights * costs.view(shape)).sum(0).mean() / kv_block_size

    fixed = log_errors.detach()
    low, high = fixed.min() - 30, fixed.max() + 5
    with torch.no_grad():
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if cost(fixed, middle) > budget else (low, middle)
    price = ((low + high) / 2).requires_grad_(True)
    with torch.enable_grad():
        slope = torch.autograd.grad(cost(fixed, price), price)[0]
    price = price.detach()
    # d price / d errors = - (d cost / d errors) / (d cost / d price); its value stays what it is.
    now = cost(log_errors, price)
    return price - (now - now.detach()) / slope.clamp(max=-1e-6), costs
