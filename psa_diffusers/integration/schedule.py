"""Which denoising step is running, and whether it stays dense."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..config import PSAConfig

STEP_UNKNOWN = "step unknown"
DENSE_WARMUP = "dense warm-up"
DENSE_LAST = "dense last steps"


@dataclass(frozen=True)
class Step:
    """A denoising step: its index among the ``total`` steps that this run executes."""

    index: int
    total: int


@dataclass(frozen=True)
class CallContext:
    """What the pipeline said of a transformer call through ``model.cache_context`` (in diffusers 0.36 only a name)."""

    name: str | None = None
    step_index: int | None = None
    total: int | None = None


def dense_steps(share: float, total: int) -> int:
    """ceil(share * total), not pushed over a whole number by rounding (0.07 * 100 is 7 steps)."""
    return math.ceil(round(share * total, 9))


def dense_reason(step: Step | None, config: PSAConfig) -> str | None:
    """Why this step stays dense, or None where it may be sparse."""
    if step is None:
        return STEP_UNKNOWN
    if step.index < dense_steps(config.dense_warmup, step.total):
        return DENSE_WARMUP
    if step.index >= step.total - dense_steps(config.dense_last, step.total):
        return DENSE_LAST
    return None


def rounding_note(config: PSAConfig, total: int) -> str | None:
    """What to say where whole steps make much more of a short run dense than the config asks for."""
    asked = config.dense_warmup + config.dense_last
    dense = min(dense_steps(config.dense_warmup, total) + dense_steps(config.dense_last, total), total)
    if dense / total <= asked + 0.05:
        return None
    settings = f"dense_warmup={config.dense_warmup:g}" + (
        f", dense_last={config.dense_last:g}" * bool(config.dense_last)
    )
    effect = "so that nothing is sparse; lower it" if dense == total else "being rounded up to whole steps"
    return f"{dense} of {total} steps ({dense / total:.0%}) run dense by {settings}, {effect}."


class StepClock:
    """Finds the step of a transformer call from what the pipeline itself says; it counts no calls.

    In order: the caller's explicit step; the step index in the model's cache context; the position of the pipeline's
    current timestep (else of its guider's, else of the one given to the transformer) in ``scheduler.timesteps``: by its
    place in the same storage, which is exact for repeated timesteps and reads nothing from the device, or by value on
    the CPU. Where the pipeline copies its timesteps on a GPU, the steps that the scheduler itself has made; where it
    does not count them either, the value, once a forward.
    """

    def __init__(self) -> None:
        self._timesteps: torch.Tensor | None = None  # of the running run; held, so that its identity is not reused
        self._first = 0  # position in them of the run's first step: video-to-video runs only the tail
        self._last: Step | None = None

    def locate(
        self, pipe: Any, timestep: Any, context: CallContext | None = None, explicit: Step | None = None
    ) -> tuple[Step | None, bool]:
        """The step, or None where it cannot be known; and whether a new run begins with it."""
        timesteps = _timesteps_of(pipe)
        renewed = timesteps is not self._timesteps
        context = context or CallContext()
        if explicit is not None:
            step = explicit
        elif context.step_index is not None:
            step = Step(context.step_index, context.total or _run_length(pipe, timesteps) or 0)
        else:
            step = self._from_timesteps(pipe, timesteps, timestep, renewed)
        if step is None or not 0 <= step.index < step.total:
            return None, False
        last, self._last, self._timesteps = self._last, step, timesteps
        new_run = renewed or last is None or step.index < last.index or step.total != last.total
        return step, new_run

    def _from_timesteps(self, pipe: Any, timesteps: torch.Tensor | None, timestep: Any, renewed: bool) -> Step | None:
        if timesteps is None or len(timesteps) == 0:
            return None
        current = getattr(pipe, "_current_timestep", None)
        position = _place_in_storage(current, timesteps)
        if position is None and isinstance(current, int | float):  # Cosmos 2.5 reads it, and gives the model sigmas
            position = _nearest(current, timesteps)
        pipe_runs = position is not None or not hasattr(pipe, "_current_timestep")
        if position is None:
            position = _place_told_to_guiders(pipe, timesteps)
        if position is None:
            position = _place_in_storage(timestep, timesteps)
        if position is None and not _is_readable(timestep, timesteps):
            position = _steps_made(pipe.scheduler, timesteps, begun=not renewed)
        if position is None:
            position = _nearest(timestep, timesteps)
        if position is None:
            return None
        if renewed or position < self._first:
            first = len(timesteps) - (_run_length(pipe, timesteps) or 0) if pipe_runs else position
            self._first = min(first, position)
        return Step(position - self._first, len(timesteps) - self._first)


def _timesteps_of(pipe: Any) -> torch.Tensor | None:
    timesteps = getattr(getattr(pipe, "scheduler", None), "timesteps", None)
    return timesteps if isinstance(timesteps, torch.Tensor) and timesteps.ndim == 1 else None


def _run_length(pipe: Any, timesteps: torch.Tensor | None) -> int | None:
    """How many of the timesteps the run executes, as the pipeline says before its loop (``pipe.num_timesteps``)."""
    length = getattr(pipe, "_num_timesteps", None)
    known = isinstance(length, int) and timesteps is not None and 0 < length <= len(timesteps)
    return length if known else None


def _place_told_to_guiders(pipe: Any, timesteps: torch.Tensor) -> int | None:
    """What a modular pipeline told its guider. With one guider an expert, the later one's is the current."""
    told = (getattr(getattr(pipe, name, None), "_timestep", None) for name in ("guider", "guider_2"))
    return max((place for t in told if (place := _place_in_storage(t, timesteps)) is not None), default=None)


def _place_in_storage(timestep: Any, timesteps: torch.Tensor) -> int | None:
    """Position of a view of one of the timesteps (``timesteps[i]``, also expanded over a batch). No device access."""
    if not isinstance(timestep, torch.Tensor) or timestep.numel() == 0:
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    place, rest = divmod(timestep.storage_offset() - timesteps.storage_offset(), timesteps.stride(0) or 1)
    return place if rest == 0 and 0 <= place < len(timesteps) else None


def _is_readable(timestep: Any, timesteps: torch.Tensor) -> bool:
    """Whether the values can be compared without waiting for a GPU."""
    return all(not isinstance(item, torch.Tensor) or item.device.type == "cpu" for item in (timestep, timesteps))


def _steps_made(scheduler: Any, timesteps: torch.Tensor, begun: bool) -> int | None:
    """The scheduler's own count, of those that keep one. It is None before the first step: and where a pipeline steps
    copies of its scheduler for ever, so that in a run that has begun it tells nothing."""
    made = getattr(scheduler, "_step_index", "")
    if made is None and not begun:
        made = getattr(scheduler, "_begin_index", None) or 0
    return made if isinstance(made, int) and 0 <= made < len(timesteps) else None


def _nearest(timestep: Any, timesteps: torch.Tensor) -> int | None:
    """Position of the nearest timestep, where it is near. On a GPU this waits."""
    if isinstance(timestep, torch.Tensor):
        if timestep.numel() == 0:
            return None
        # Of timesteps a token the noisiest: those of given images, sound or keyframes are nearer to the clean end.
        upwards = bool(timesteps[0] < timesteps[-1])  # MiniMax-H3 counts from noise at 0
        timestep = float(timestep.min() if upwards else timestep.max())
    if not isinstance(timestep, int | float):
        return None
    distances = (timesteps.double() - timestep).abs()
    position = int(distances.argmin())
    # Half a percent of the range: more than bfloat16 loses, less than what lies between two steps.
    return position if distances[position] <= 0.005 * timesteps.abs().max() else None
