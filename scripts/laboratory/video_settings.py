"""What the attention of a whole video is computed with: a policy, its budget at each step, which steps are dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from block_policies import Policy, sample_costs
from cases import Case
from torch import Tensor

from psa_diffusers import PSAConfig
from psa_diffusers.integration import operations
from psa_diffusers.planning.plan import Plan

LEAST = 1 / 64  # one centroid a block of 64 keys: no budget may be lower
# Weights of the sparse steps by their noise levels [n + 1], of which the last is where the last step ends, and by their
# progress [n] from 0 to 1. Budgets are in their proportion.
SCHEDULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "constant": lambda noise, progress: torch.ones_like(progress),
    "falling 3:1": lambda noise, progress: 1.5 - progress,
    "rising 3:1": lambda noise, progress: 0.5 + progress,
    "falling 8:1": lambda noise, progress: 8 ** (0.5 - progress),
    "rising 8:1": lambda noise, progress: 8 ** (progress - 0.5),
    "by noise level": lambda noise, progress: noise[:-1],
    "by root of step length": lambda noise, progress: (noise[:-1] - noise[1:]).sqrt(),
}


@dataclass(frozen=True)
class Setting:
    """How a run computes its attention.

    Attributes:
        name: What tables call the policy.
        choose: A policy of the laboratory; or a config, which the plugin plans and computes by.
        budget: Compute budget, mean over the sparse steps.
        dense_first, dense_last: Whole steps that stay dense.
        schedule: Of the budget over the sparse steps, a key of ``SCHEDULES``.
        experiment, variant: For tables: what the run belongs to, and the tuned variant of a policy.
        refresh_every: Steps for which a config's plans are kept.
        layers: Factors on a config's budget, one a transformer block; None = all alike.
    """

    name: str
    choose: Policy | PSAConfig = field(compare=False)
    budget: float
    dense_first: int
    dense_last: int = 0
    schedule: str = "constant"
    experiment: str = ""
    variant: str = ""
    refresh_every: int = 1
    layers: tuple[float, ...] | None = None

    def total(self, steps: int) -> float:
        """The compute budget over all steps."""
        dense = self.dense_first + self.dense_last
        return (dense + (steps - dense) * self.budget) / steps

    def budgets(self, noise: Sequence[float]) -> list[float]:
        """The budget of every step; of a dense one 1. ``noise`` has the level before each step, and after the last."""
        steps = len(noise) - 1
        levels = torch.tensor(noise, dtype=torch.float64)[self.dense_first : steps - self.dense_last + 1]
        progress = torch.linspace(0, 1, len(levels) - 1, dtype=torch.float64)
        sparse = scaled_to_mean(SCHEDULES[self.schedule](levels, progress), self.budget)
        return [1.0] * self.dense_first + sparse.tolist() + [1.0] * self.dense_last


def scaled_to_mean(weights: Tensor, mean: float) -> Tensor:
    """The weights times one factor, cut to [LEAST, 1], so that their mean is this one."""
    low, high = 0.0, 1 / float(weights[weights > 0].min())
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if float((weights * middle).clamp(LEAST, 1).mean()) < mean else (low, middle)
    return (weights * high).clamp(LEAST, 1)


class Planner:
    """Stands in for the plugin's planning and attention while a video is made, and notes what its calls cost."""

    def __init__(
        self, choose: Policy | PSAConfig, budgets: Sequence[float], layers: Sequence[float] | None = None
    ) -> None:
        self.choose, self.budgets, self.layers = choose, budgets, layers
        self.step = 0  # set by who runs the pipeline
        self.costs: list[Tensor] = []  # float64 [batch] of every call
        self.estimator = 0.0  # share of dense attention's FLOPs, the newest call's
        self._plugin = operations.build_plan, operations.attend
        self._output: Tensor | None = None

    @property
    def config(self) -> PSAConfig:
        """Where a config is run: with this step's budget."""
        if self.choose.rule != "budget":
            return self.choose
        factor = 1.0 if self.layers is None else self.layers[len(self.costs) % len(self.layers)]
        return replace(self.choose, compute_budget=min(max(self.budgets[self.step] * factor, LEAST), 1.0))

    @contextmanager
    def installed(self) -> Iterator[Planner]:
        operations.build_plan, operations.attend = self.build_plan, self.attend
        try:
            yield self
        finally:
            operations.build_plan, operations.attend = self._plugin

    def build_plan(self, query: Tensor, key: Tensor, value: Tensor, config: PSAConfig, **options) -> Plan:
        if isinstance(self.choose, PSAConfig):
            plan = self._plugin[0](query, key, value, self.config, **options)
            self.costs.append(sample_costs(plan))
            return plan
        others = {name: given for name, given in options.items() if name != "grid" and given is not None}
        if others:
            raise ValueError(f"Planner: the laboratory's policies take no {', '.join(others)}.")
        result = self.choose(
            Case("video", "captured", query, key, value, tuple(options["grid"])), self.budgets[self.step]
        )
        self.costs.append(result.costs)
        self.estimator, self._output = result.estimator, result.output
        return _placeholder(query)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, config: PSAConfig, plan: Plan, scale: float | None):
        if isinstance(self.choose, PSAConfig):
            return self._plugin[1](query, key, value, self.config, plan, scale)
        output, self._output = self._output, None
        return output.to(query.dtype)


def _placeholder(query: Tensor) -> Plan:
    """For the plugin's statistics, where a policy has made its output already: one block."""
    mask = torch.ones(query.shape[0], query.shape[2], 1, 1, dtype=torch.int8, device=query.device)
    return Plan(mask, *(query.shape[1],) * 4, num_levels=1)
