"""Calibration while a pipeline runs: measure the layers' errors in one dense step, and spend the budget where it tells.

Measured is the last step of the dense warm-up: the nearest to the sparse ones (and, of an expert that begins later or
where there is no warm-up, its first step). From then on each step has the budget that makes the weighted sum of squared
errors least, at the config's compute budget on average over the run's sparse calls. All layers of a step share it:
spread over the layers by these errors, the same budget made videos worse (``benchmarks/experiments``).

An error in step i moves the video by about as much as the step itself does: its weight is the step's share of the way
from noise to video, ``(sigma_i - sigma_i+1)**2``, where the scheduler's sigmas tell it; else all steps weigh the same.
That is not all: what early steps decide grows on the way. So no step counts as less than LEAST_WEIGHT mean steps, which
``scripts/experiments/calibration.py`` chose among three, by a few prompts.

With a ``target_error`` in place of the budget, as little is spent as keeps the run's *total error* at it: the root of
the mean, weighted like that, of the sparse calls' squared relative errors, as if they stayed as they were measured.
:func:`~.watching.watch_errors` measures what it is in a run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..budget_schedule import BudgetPoint
from ..calibration import ErrorCurve, Probe, can_probe, candidate_budgets, probe_call
from ..calibration.tuned import Stretch, Tuned, mean_curve, tune
from ..config import PSAConfig
from . import operations
from .budgets import RunBudgets, block_count
from .native import ModelPatch
from .schedule import Step, dense_reason, dense_steps

if TYPE_CHECKING:
    from .statistics import PSAStatistics

NOT_MEASURED = "Calls whose padding is not at the end of the sequence were not measured: they keep the compute budget."
AROUND = 0.125  # are the budgets that are measured for a target error: 1/32 to 1/2
LEAST_WEIGHT = 2.0  # of the mean share of the way: early steps are short, but what they decide grows


@dataclass(frozen=True)
class Allocation:
    """What one measurement led to.

    Attributes:
        measured_in: The step.
        stretch: The sparse steps that it is for, as if no other expert came, and the layers' squared relative errors.
        mean_budget, uniform_error, predicted_error: See :class:`~psa_diffusers.calibration.tuned.Tuned`: by the errors
            that were measured, as if they stayed as they are.
    """

    measured_in: int
    stretch: Stretch
    mean_budget: float
    uniform_error: float
    predicted_error: float

    def to_dict(self) -> dict[str, Any]:
        stretch = self.stretch
        errors = {layer: {"budgets": c.budgets, "errors": _roots(c.errors)} for layer, c in stretch.curves.items()}
        return {
            **{"expert": stretch.expert, "measured_in": self.measured_in, "steps": list(stretch.steps)},
            **{"mean_budget": self.mean_budget, "uniform_error": self.uniform_error},
            **{"predicted_error": self.predicted_error, "layers": errors},
        }


def _roots(values: Sequence[float]) -> list[float]:
    return [value**0.5 for value in values]


@dataclass
class Calibration:
    """Measures in a run, and sets the budgets of what is left of it. Anew in each run.

    Attributes:
        config: Its compute budget is the mean to be kept, or its target error the total error.
        allocations: What was measured and predicted, in order.
        schedule: The budgets that the run's sparse steps got; empty before the first allocation.
    """

    config: PSAConfig
    allocations: list[Allocation] = field(default_factory=list)
    schedule: tuple[BudgetPoint, ...] = ()

    def __post_init__(self) -> None:
        if self.config.rule != "budget" or self.config.budget_schedule is not None:
            what = "a budget_schedule" if self.config.rule == "budget" else f"rule={self.config.rule!r}"
            raise ValueError(
                f"calibrate=True sets the budgets of rule='budget' itself, but the config has {what}; leave one out."
            )
        around = self.config.compute_budget or AROUND
        self.budgets = candidate_budgets(around, self.config.kv_block_size)
        self.reset()

    def reset(self) -> None:
        """A new run begins."""
        self.allocations, self.schedule = [], ()
        self._probes: dict[str, dict[int, list[Probe]]] = {}  # by expert and layer, since its last allocation
        self._measured_in: dict[str, int] = {}
        self._spent: dict[int, float] = {}  # mean budget of the layers, by sparse step
        self._last = -1  # step

    def begin_step(
        self, step: Step, patch: ModelPatch, weights: Callable[[], list[float]], budgets: RunBudgets, new_run: bool
    ) -> bool:
        """A forward begins: allocate, if what was measured before is to be used from now on.

        Returns:
            Whether the calls of this forward are to be measured.
        """
        if new_run or step.index < self._last:  # of processors that share a run only one sees it begin
            self.reset()
            budgets.schedule = ()
        self._last = step.index
        expert, layers = patch.expert, block_count(patch)
        if expert in self._probes and step.index > self._measured_in[expert]:
            self._allocate(step, expert, layers, weights())
            budgets.schedule = self.schedule
        if dense_reason(step, self.config) is None and self.config.target_error is None:
            given = [budgets.budget(step, layer, expert) for layer in range(layers)] if self.schedule else [None]
            asked = [self.config.compute_budget if one is None else one for one in given]
            self._spent[step.index] = sum(asked) / len(asked)
        # Dense calls inside compiled blocks cannot be watched.
        last_dense = step.index == dense_steps(self.config.dense_warmup, step.total) - 1 and not patch.compiled()
        if dense_reason(step, self.config) is not None and not last_dense:
            return False
        return self._measured_in.setdefault(expert, step.index) == step.index

    def measure(
        self,
        inputs: Sequence[Tensor],
        scale: float | None,
        where: dict[str, Any],
        expert: str,
        layer: int,
        statistics: PSAStatistics,
    ) -> None:
        """Measure a call's error at some compute budgets; nothing waits for the device.

        Args:
            inputs: query, key and value [batch, seq, heads, head_dim].
            scale: Of the logits; None = the default.
            where: What planning must know of the tokens: grid, full_tokens, key_lengths.
            expert, layer: Whose call it is.
            statistics: Get the time and, if the call cannot be measured, a note.
        """
        if not can_probe(where["full_tokens"], where["key_lengths"]):
            statistics.note(NOT_MEASURED)
            return
        with statistics.timed("calibration", inputs[0].device):
            do = {"build_plan": operations.build_plan, "attend": operations.attend}
            probe = probe_call(*inputs, self.config, self.budgets, scale=scale, **do, **where)
        self._probes.setdefault(expert, {}).setdefault(layer, []).append(probe)

    def _allocate(self, step: Step, expert: str, layers: int, weights: list[float]) -> None:
        """Budgets for what is left of the run, as if all of it were this expert's."""
        curves = _curves(self._probes.pop(expert))
        sparse = [i for i in range(step.total) if dense_reason(Step(i, step.total), self.config) is None]
        steps = [i for i in sparse if i >= step.index]
        if not steps:
            return
        mean = None if self.config.target_error is not None else self._left(sparse, step)
        stretch = Stretch(expert, tuple(steps), layers, curves)
        tuned = tune([stretch], weights, mean, step.total, self.config.target_error)
        self.schedule += tuned.schedule
        found = (tuned.mean_budget, tuned.uniform_error, tuned.predicted_error)
        self.allocations.append(Allocation(self._measured_in[expert], stretch, *found))

    def _left(self, sparse: list[int], step: Step) -> float:
        """The mean budget that is left for the sparse steps from this one on."""
        wanted, least = self.config.compute_budget, 1 / self.config.kv_block_size
        spent = sum(self._spent.get(i, wanted) for i in sparse if i < step.index)
        left = sum(1 for i in sparse if i >= step.index)
        return min(max((wanted * len(sparse) - spent) / left, least), 1.0)

    @property
    def tuned(self) -> PSAConfig:
        """The config with the budgets that the run got: for other runs of this model, size and number of steps.

        Raises:
            ValueError: no run has been measured yet.
        """
        if not self.schedule:
            raise ValueError("Calibration.tuned: nothing was measured yet; run the pipeline once, with sparse steps.")
        budget = self.config.compute_budget or float(f"{self.allocations[-1].mean_budget:.4g}")
        return replace(self.config, compute_budget=budget, target_error=None, budget_schedule=self.schedule)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "allocations": [allocation.to_dict() for allocation in self.allocations],
            "budget_schedule": [point.to_dict() for point in self.schedule],
        }


def _curves(probes: dict[int, list[Probe]]) -> dict[int, ErrorCurve]:
    """By layer. Waits for the device, once."""
    layers = sorted(probes)
    lost = torch.stack([sum(probe.lost.sum((1, 2)) for probe in probes[layer]) for layer in layers])
    power = torch.stack([sum(probe.power.sum() for probe in probes[layer]) for layer in layers])
    errors = (lost / power.clamp(min=torch.finfo(torch.float64).tiny)[:, None]).cpu()
    # A higher budget is not worse: what measures so is noise of the few rows.
    errors = errors.cummin(1).values.tolist()
    return {layer: ErrorCurve(probes[layer][0].asked, tuple(own)) for layer, own in zip(layers, errors, strict=True)}


def step_weights(scheduler: Any, total: int, least: float = LEAST_WEIGHT) -> list[float]:
    """How much an error in each of the run's steps matters: a mean of 1.

    ``least`` is the least share of the way that a step counts as, in units of their mean. Waits for the device where
    the scheduler keeps its sigmas there.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    known = isinstance(sigmas, torch.Tensor) and sigmas.ndim == 1 and len(sigmas) > total
    values = sigmas[-total - 1 :].tolist() if known else []
    shares = [first - second for first, second in pairwise(values)]
    if not shares or min(shares) < 0 or values[0] > 1.001 or sum(shares) == 0:  # not a flow from noise to video
        return [1.0] * total
    mean = sum(shares) / total
    weights = [max(share / mean, least) ** 2 for share in shares]
    return [weight * total / sum(weights) for weight in weights]


def tune_together(
    runs: Sequence[Sequence[Allocation]],
    weights: list[float],
    mean_budget: float | None,
    total: int,
    target_error: float | None = None,
    by_layer: bool = False,
) -> Tuned:
    """One schedule for all runs of a pipeline: by the mean of what was measured in each.

    Args:
        runs: The allocations of each run; of the same steps and experts.
        weights: From :func:`step_weights`.
        mean_budget: Over the sparse calls; or None, and
        target_error: the total error that they may have.
        total: Steps of a run.
        by_layer: See :func:`~psa_diffusers.calibration.tuned.tune`.
    """
    return tune(merge_stretches(runs, total), weights, mean_budget, total, target_error, by_layer)


def merge_stretches(runs: Sequence[Sequence[Allocation]], total: int) -> list[Stretch]:
    """The sparse steps of all experts, with the mean of the curves of all runs."""
    stretches, begins = [], [run.measured_in for run in runs[0]][1:]
    for number, allocations in enumerate(zip(*runs, strict=True)):
        # An expert that came later was measured in its first step, up to which the one before it went on.
        own = [allocation.stretch for allocation in allocations]
        first = begins[number - 1] if number else own[0].steps[0]
        end = begins[number] if number < len(begins) else total
        curves = {layer: mean_curve([stretch.curves[layer] for stretch in own]) for layer in own[0].curves}
        stretches.append(replace(own[0], steps=tuple(range(first, min(end, own[0].steps[-1] + 1))), curves=curves))
    return stretches
