"""Which compute budget each call of a run gets: the config's, or what its schedule says of step, layer and expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..budget_schedule import BudgetPoint, budget_at, points_of
from ..config import PSAConfig
from .discovery import component_names
from .native import PATCH, ModelPatch
from .schedule import Step

DENSE_BUDGET = "dense budget"


class RunBudgets:
    """The settings of each call. ``schedule`` may be replaced while a run goes on."""

    def __init__(self, config: PSAConfig) -> None:
        self._config = config
        self._made: dict[float, PSAConfig] = {}
        self.schedule: tuple[BudgetPoint, ...] = config.budget_schedule or ()

    def budget(self, step: Step, layer: int, expert: str) -> float | None:
        """What the schedule says; None where it says nothing."""
        points = points_of(self.schedule, expert)
        return budget_at(points, step.index / step.total, layer) if points else None

    def config(self, step: Step, layer: int, expert: str) -> PSAConfig:
        """The settings of one layer's call; those of the processor itself where nothing is scheduled."""
        if not self.schedule:
            return self._config
        budget = self.budget(step, layer, expert)
        budget = self._config.compute_budget if budget is None else budget
        if budget is None:  # a target error, for an expert of which nothing is scheduled yet
            return self._config
        if budget not in self._made:
            self._made[budget] = replace(self._config, compute_budget=budget, target_error=None, budget_schedule=None)
        return self._made[budget]

    def dense_reason(self, step: Step, layer: int, expert: str) -> str | None:
        """A budget of 1 is dense attention, which needs no plan."""
        return DENSE_BUDGET if self.schedule and self.budget(step, layer, expert) == 1 else None


def name_experts(pipe: Any, models: Sequence[nn.Module], config: PSAConfig) -> None:
    """Note on each transformer its name in the pipeline, once it is sure that the config fits them.

    Raises:
        ValueError: the schedule names an expert that is not there, or has budgets for another number of blocks;
            ``dense_layers`` names a block that no transformer has.
    """
    schedule = config.budget_schedule or ()
    patches = [getattr(model, PATCH) for model in models]
    names = component_names(pipe)
    for model, patch in zip(models, patches, strict=True):
        patch.expert = names.get(id(model), patch.expert)
    layers = {patch.expert: block_count(patch) for patch in patches}
    if patches:
        _check_dense_layers(config.dense_layers, layers)
    for point in schedule if patches else ():
        if point.expert not in (None, *layers):
            raise ValueError(
                f"budget_schedule names expert {point.expert!r}, but the transformers here are {', '.join(layers)}; "
                "name one of them, or leave expert out."
            )
    for name, count in layers.items():
        for point in points_of(schedule, name):
            if isinstance(point.budget, tuple) and len(point.budget) != count:
                raise ValueError(
                    f"budget_schedule gives {len(point.budget)} budgets at {point.at:g}, but {name} has {count} "
                    "blocks; give one budget for all of them, or as many as blocks."
                )


def _check_dense_layers(dense_layers: Sequence[int], blocks: dict[str, int]) -> None:
    missing = [layer for layer in dense_layers if layer >= max(blocks.values())]
    if missing:
        there = ", ".join(f"{name} has blocks 0 to {count - 1}" for name, count in blocks.items())
        raise ValueError(f"dense_layers names {', '.join(map(str, missing))}, but {there}; leave those out.")


def block_count(patch: ModelPatch) -> int:
    """Transformer blocks with video self-attention, up to the last."""
    return 1 + max((slot.layer for _, slot in patch.attention if slot.self_attention), default=-1)
