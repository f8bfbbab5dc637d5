"""Seconds of the denoising steps of a pipeline call."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class StepTimer:
    """Times every denoising step: give it to one call of a pipeline as ``callback_on_step_end``.

    ::

        timer = StepTimer(pipe)
        pipe(prompt, callback_on_step_end=timer)
        timer.seconds()  # one a step

    The first step begins with the first forward of a transformer, so that prompt encoding is not in it. A GPU is not
    made to wait: there CUDA events are set, and read by :meth:`seconds`.

    Args:
        pipe: The pipeline.
        device: Where its transformer runs; default what the pipeline says.
    """

    def __init__(self, pipe: Any, device: torch.device | str | None = None) -> None:
        import torch  # here, so that a command that refuses its options need not wait for it

        device = torch.device(pipe._execution_device if device is None else device)
        self._torch, self.on_gpu = torch, device.type == "cuda"
        self._marks: list[Any] = []
        models = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
        self._hooks = [model.register_forward_pre_hook(self._begin) for model in models if model is not None]

    def __call__(self, pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        """A step has ended (diffusers' ``callback_on_step_end``)."""
        self.mark()
        return {}

    def mark(self) -> None:
        """Note the time at which one step ends and the next begins."""
        if self.on_gpu:
            event = self._torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds of each step. Waits for the GPU: call it after the run."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if not self.on_gpu:
            return [after - before for before, after in pairs]
        self._torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairs]

    def close(self) -> None:
        """Leave the pipeline alone, also if it never ran."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _begin(self, *_: Any) -> None:
        self.close()
        if not self._marks:
            self.mark()
