"""Run a pipeline once, with a progress bar and a time for every denoising step."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from ..metrics import to_uint8
from ..metrics.step_timer import StepTimer
from . import plugin
from .errors import CommandError
from .settings import GenerationSettings
from .text_to_video import call_arguments, pipeline_refusals, steps_watched

DENSE, SPARSE = "dense", "sparse"


@dataclass
class Generated:
    """One finished pipeline call.

    Attributes:
        frames: uint8 [frames, height, width, 3].
        step_kinds: ``"dense"`` or ``"sparse"``, one a denoising step.
        step_seconds: Seconds of each denoising step, planning included.
        total_seconds: Seconds of the whole call: prompt encoding, denoising and decoding.
        statistics: What the plugin counted; None for a dense run.
    """

    frames: np.ndarray
    step_kinds: list[str]
    step_seconds: list[float]
    total_seconds: float
    statistics: Any = None
    notes: list[str] = field(default_factory=list)

    def seconds_per_step(self, kind: str, steps: range | list[int] | None = None) -> float | None:
        """Median seconds of the steps of this kind (among ``steps``); None where there is none."""
        chosen = range(len(self.step_kinds)) if steps is None else steps
        times = [self.step_seconds[i] for i in chosen if self.step_kinds[i] == kind]
        return median(times) if times else None

    def steps_of(self, kind: str) -> list[int]:
        return [i for i, step_kind in enumerate(self.step_kinds) if step_kind == kind]


class StepWatcher:
    """Follows one pipeline call: which steps were dense or sparse, how long each took, and the bar on the screen."""

    def __init__(self, pipe: Any, settings: GenerationSettings, sparse: bool, label: str, quiet: bool):
        from tqdm import tqdm

        self.pipe, self.sparse = pipe, sparse
        self.timer = StepTimer(pipe, settings.device)
        self.kinds: list[str] = []
        self._live_budget = not self.timer.on_gpu  # reading it would make a GPU wait
        scheduled = settings.config.budget_schedule is not None
        self._asked = None if scheduled else settings.config.compute_budget
        self._unasked = "by schedule" if scheduled else "by content"
        self._bar = tqdm(total=settings.steps, desc=label, unit="step", file=sys.stderr, disable=quiet)

    def on_step_end(self, pipe: Any, step: int, timestep: Any, values: dict) -> dict:
        """diffusers' ``callback_on_step_end``."""
        self.timer.mark()
        statistics = plugin.statistics(pipe) if self.sparse else None
        kind = DENSE if statistics is None or statistics.last_step is None else statistics.last_step[2]
        self.kinds.append(kind)
        self._bar.total = getattr(pipe, "num_timesteps", self._bar.total)  # Heun runs more steps than asked for
        self._bar.set_postfix_str(f"{kind}, compute budget {self._budget(kind, statistics)}", refresh=False)
        self._bar.update()
        return {}

    def _budget(self, kind: str, statistics: Any) -> str:
        if kind == DENSE:
            return "1.00"
        if self._live_budget and statistics.compute_budget_sparse is not None:
            return f"{statistics.compute_budget_sparse:.3f}"
        return f"{self._asked:.3f} asked" if self._asked is not None else self._unasked

    def close(self) -> None:
        self._bar.close()
        self.timer.close()


def generate(
    pipe: Any,
    prompt: str,
    settings: GenerationSettings,
    *,
    sparse: bool,
    quiet: bool = False,
    label: str | None = None,
    calibrate: bool = False,
    decode: bool = True,
) -> Generated:
    """Make one video. The noise comes from the seed on the CPU, so that it is the same on every device.

    Args:
        pipe: A loaded pipeline. PSA is enabled for the call when ``sparse``, and disabled at its end in any case.
        prompt: What to draw.
        settings: Size, steps, seed and the PSA config.
        sparse: With PSA by ``settings.config``, or dense.
        quiet: No progress bar.
        label: Of the progress bar; default PSA or dense.
        calibrate: Measure, and spend the budget where it tells.
        decode: Else there are no frames.
    """
    import torch

    if sparse:
        plugin.switch_on(pipe, settings.config, calibrate)
    watcher = StepWatcher(pipe, settings, sparse, label or ("PSA" if sparse else DENSE), quiet)
    try:
        start = time.perf_counter()
        generator = torch.Generator("cpu").manual_seed(settings.seed)
        arguments = call_arguments(pipe, prompt, settings)
        with pipeline_refusals(pipe), steps_watched(pipe, watcher.on_step_end) as watched:
            output = pipe(**arguments, **watched, generator=generator, output_type="np" if decode else "latent")
        total = time.perf_counter() - start
        statistics = plugin.statistics(pipe) if sparse else None
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise CommandError(
            "out of memory. Use --offload model or sequential, a smaller --height and --width, or fewer --num-frames."
        ) from error
    finally:
        watcher.close()
        if sparse:
            plugin.switch_off(pipe)
    frames = _frames(output) if decode else np.empty((0, settings.height, settings.width, 3), np.uint8)
    return Generated(frames, watcher.kinds, watcher.timer.seconds(), total, statistics)


def _frames(output: Any) -> np.ndarray:
    try:
        return to_uint8(output.frames[0])
    except ValueError as error:
        raise CommandError(f"the model produced no valid video ({error}) Try --dtype float32.") from error
