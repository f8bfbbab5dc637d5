"""What a run did: sparse and dense calls, reasons, achieved compute budget, time. Only reading waits for a GPU."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..planning.plan import Plan, mean_cost
from ..planning.sharing import mean_over_heads
from .guards import run_warnings
from .schedule import STEP_UNKNOWN, Step

DENSE, SPARSE, SKIPPED = "dense", "sparse", "skipped"

_PIECE = 256  # tensors in one piece of memory

# Seconds, or a GPU's events around them.
Duration = float | tuple[torch.cuda.Event, torch.cuda.Event]


@dataclass(frozen=True, eq=False)
class SparseCall:
    """What is kept of one sparse call; on its device, until it is read.

    Attributes:
        step: Index of the denoising step; None = not known.
        layer: Index of the transformer block.
        branch: Which of the step's forwards it was part of.
        counts: int64 [levels, batch, heads], from :meth:`~psa_diffusers.planning.Plan.level_counts`.
        num_levels, kv_block_size: Of the plan.
        planning: What making the plan took; next to nothing where it was there already.
    """

    step: int | None
    layer: int
    branch: str | int
    counts: torch.Tensor
    num_levels: int
    kv_block_size: int
    planning: Duration


class PSAStatistics:
    """Counts over the self-attention calls of the last run, all transformers of a pipeline together.

    They start anew with each run, or by :meth:`reset`. Reading a property that holds times or compute budgets waits
    for the GPU; counting does not. In compiled blocks (``compile_repeated_blocks``) a scheduled dense call is counted
    as its forward begins, and a call that falls back for another reason (a mask, gradients) is not.

    Attributes:
        sparse_calls, dense_calls: Self-attention calls that ran sparse, and dense.
        dense_reasons: Calls that ran dense, by reason, e.g. ``{"dense warm-up": 40}``.
        steps: (index, total, "dense", "sparse" or "skipped") of each denoising step; sparse if any of its calls was,
            skipped if a cache (``enable_cache``) made every call unnecessary.
        backend, backend_reason: What computed the sparse calls, and why that one. None before the first.
        planner, planner_reason: What made the first plan, and why that one.
        notes: What had to be reported, each once.
        calibration: With ``calibrate=True`` the :class:`~psa_diffusers.integration.calibrating.Calibration`; else
            None.
        calls: A :class:`~psa_diffusers.integration.statistics.SparseCall` for each sparse call; ``psa_report`` reads
            them.
        dense: Calls that ran dense, by (step, layer, reason); step and layer are None where they are not known.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.sparse_calls = 0
        self.calls: list[SparseCall] = []
        self.dense: Counter[tuple[int | None, int | None, str]] = Counter()
        self.steps: list[tuple[int, int, str]] = []
        self._kept = _Kept()
        self.backend: str | None = None
        self.backend_reason: str | None = None
        self.planner: str | None = None
        self.planner_reason: str | None = None
        self.notes: list[str] = []
        self._read: list[tuple[SparseCall, float]] = []  # calls with their costs
        self._unread: list[tuple[SparseCall, torch.Tensor | None]] = []
        self._seconds = {"planning": 0.0, "attention": 0.0, "calibration": 0.0}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._last: dict[str, Duration] = dict.fromkeys(self._seconds, 0.0)
        self.calibration: Any = None

    # -- counting -------------------------------------------------------------------------------------------------

    def count_step(self, step: Step, cached: bool = False) -> None:
        """A forward of this step begins. It is dense (with a cache: skipped) until its calls say otherwise."""
        if not self.steps or self.steps[-1][:2] != (step.index, step.total):
            self.steps.append((step.index, step.total, SKIPPED if cached else DENSE))

    def count_dense(self, reason: str, calls: int = 1, *, layer: int | None = None) -> None:
        step = None if reason == STEP_UNKNOWN else self._step
        self.dense[(step, layer, reason)] += calls
        if self.steps and self.steps[-1][2] == SKIPPED:
            self.steps[-1] = (*self.steps[-1][:2], DENSE)

    def count_sparse(
        self, plan: Plan, heads_group: Any | None = None, *, layer: int = 0, branch: str | int = 0
    ) -> None:
        """``heads_group``: the processes that hold the layer's other heads, whose costs count too."""
        self.sparse_calls += 1
        if self.planner is None:
            self.planner, self.planner_reason = plan.planner, plan.planner_reason
        counts, cost = self._kept.keep(plan.level_counts()), None
        if heads_group is not None:  # every process takes part, so it cannot wait until someone reads
            cost = mean_over_heads(plan.mean_cost(counts), plan.level_mask.shape[1], heads_group)
        facts = (plan.num_levels, plan.kv_block_size, self._last["planning"])
        self.calls.append(SparseCall(self._step, layer, branch, counts, *facts))
        self._unread.append((self.calls[-1], cost))
        if self.steps:
            self.steps[-1] = (*self.steps[-1][:2], SPARSE)
        for note in plan.notes:
            self.note(note)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    @contextmanager
    def timed(self, part: str, device: torch.device, after: str | None = None) -> Iterator[None]:
        """Adds the time of the ``with`` block to ``part``: by the clock on a CPU, by events on a GPU.

        ``after`` names the part that has ended just before: on a GPU, where an event takes the host as long as a
        launch, its end is this one's beginning.
        """
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            start = _mark(stream) if after is None else self._last[after][1]
            yield
            self._last[part] = (start, _mark(stream))
            self._events.append((part, *self._last[part]))
        else:
            started = time.perf_counter()
            yield
            self._last[part] = time.perf_counter() - started
            self._seconds[part] += self._last[part]

    @property
    def _step(self) -> int | None:
        return self.steps[-1][0] if self.steps else None

    # -- reading --------------------------------------------------------------------------------------------------

    @property
    def dense_calls(self) -> int:
        return self.dense.total()

    @property
    def dense_reasons(self) -> dict[str, int]:
        reasons: Counter[str] = Counter()
        for (_, _, reason), calls in self.dense.items():
            reasons[reason] += calls
        return dict(reasons)

    @property
    def last_step(self) -> tuple[int, int, str] | None:
        """(index, total, kind) of the newest step. Cheap, for progress bars."""
        return self.steps[-1] if self.steps else None

    @property
    def compute_budget_sparse(self) -> float | None:
        """Mean achieved compute budget of the sparse calls (dense = 1); None if there were none."""
        return self._read_costs() / self.sparse_calls if self.sparse_calls else None

    @property
    def compute_budget_all(self) -> float | None:
        """Mean achieved compute budget of all self-attention calls, dense ones counting 1; None if there were none."""
        calls = self.sparse_calls + self.dense_calls
        return (self._read_costs() + self.dense_calls) / calls if calls else None

    @property
    def compute_budget_by_step(self) -> list[tuple[int, float]]:
        """(step, mean achieved compute budget of its sparse calls) of each step that had some."""
        self._read_costs()
        costs: dict[int, list[float]] = {}
        for call, cost in self._read:
            costs.setdefault(call.step, []).append(cost)
        return [(step, sum(own) / len(own)) for step, own in costs.items()]

    def _read_costs(self) -> float:
        """The sum of the sparse calls' mean costs."""
        unread, self._unread = self._unread, []
        counts = read_together([call.counts for call, _ in unread])
        for (call, shared), own in zip(unread, counts, strict=True):
            cost = mean_cost(own, call.num_levels, call.kv_block_size) if shared is None else shared
            self._read.append((call, float(cost)))
        return sum(cost for _, cost in self._read)

    def level_counts(self) -> list[torch.Tensor]:
        """Of each sparse call how many block pairs it read at each level, int64 [levels, batch, heads] on the CPU."""
        return read_together([call.counts for call in self.calls])

    @property
    def planning_seconds(self) -> float:
        """Time spent making plans for sparse calls."""
        return self._resolve("planning")

    @property
    def attention_seconds(self) -> float:
        """Time spent in sparse attention, planning not included. Dense calls are not timed."""
        return self._resolve("attention")

    @property
    def calibration_seconds(self) -> float:
        """Time spent measuring for a calibration."""
        return self._resolve("calibration")

    def _resolve(self, part: str) -> float:
        for name, start, end in self._events:
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1000
        self._events.clear()
        return self._seconds[part]

    @property
    def warnings(self) -> dict[str, int]:
        """Known signs of lost quality or time, each with the number of steps or calls that show it.

        Sparse steps before a quarter of the run; calls that are read almost wholly at the coarsest level; calls that
        took longer to plan than to attend.
        """
        return run_warnings(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything above as plain values, ready for JSON."""
        names = (
            *("sparse_calls", "dense_calls", "dense_reasons"),
            *("backend", "backend_reason", "planner", "planner_reason"),
            *("compute_budget_sparse", "compute_budget_all", "planning_seconds", "attention_seconds"),
        )
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        values["compute_budget_by_step"] = [list(pair) for pair in self.compute_budget_by_step]
        values["calibration_seconds"] = self.calibration_seconds
        values["calibration"] = None if self.calibration is None else self.calibration.to_dict()
        values["steps"] = [list(step) for step in self.steps]
        values["notes"] = list(self.notes)
        values["warnings"] = self.warnings
        return values

    def __repr__(self) -> str:
        return f"PSAStatistics(sparse_calls={self.sparse_calls}, dense_reasons={self.dense_reasons})"


class _Kept:
    """Copies of small tensors, many in one piece of memory.

    A tensor that lives on takes its place from the next call, whose tensors then lie elsewhere: kernels that run again
    over the same memory are enqueued faster (:mod:`psa_diffusers.gpu.graphs`).
    """

    def __init__(self) -> None:
        self._pieces: dict[tuple, Iterator[torch.Tensor]] = {}

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on its device; on a CPU the tensor itself."""
        if tensor.device.type == "cpu":
            return tensor
        kind = tensor.shape, tensor.dtype, tensor.device
        place = next(self._pieces.get(kind, iter(())), None)
        if place is None:
            self._pieces[kind] = iter(tensor.new_empty(_PIECE, *tensor.shape).unbind())
            place = next(self._pieces[kind])
        return place.copy_(tensor)


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


def read_together(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors on the CPU: one copy for all of one device and shape."""
    found: list[torch.Tensor | None] = [None] * len(tensors)
    for kind in dict.fromkeys((tensor.device, tensor.shape) for tensor in tensors):
        places = [i for i, tensor in enumerate(tensors) if (tensor.device, tensor.shape) == kind]
        for place, tensor in zip(places, torch.stack([tensors[i] for i in places]).cpu(), strict=True):
            found[place] = tensor
    return found
