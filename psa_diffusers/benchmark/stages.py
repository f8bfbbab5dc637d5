"""A sparse call on a GPU taken apart: how long each of its kernels runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .timing import PAUSE_CYCLES, quantiles, take_turns

ATTENTION = "attention"  # in the names of the kernels that read what the plan says


class LaunchTimer:
    """Inside the ``with``: times every launch of a Triton kernel on the GPU, by Triton's own launch hooks.

    They see all launches, whoever makes them. An event before and after costs the GPU a microsecond or two a launch.
    """

    def __init__(self, make_event: Callable[[], Any] | None = None) -> None:
        """``make_event`` gives something with ``record`` and ``elapsed_time``; CUDA events by default."""
        self._make_event = make_event or (lambda: torch.cuda.Event(enable_timing=True))
        self._launches: list[tuple[str, Any, Any]] = []
        self._detach: list[Callable[[], None]] = []

    def __enter__(self) -> LaunchTimer:
        from triton import knobs

        self._detach = [
            _attach(knobs.runtime, "launch_enter_hook", self._entered),
            _attach(knobs.runtime, "launch_exit_hook", self._left),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for detach in self._detach:
            detach()

    def _entered(self, metadata: Any) -> None:
        first, last = self._make_event(), self._make_event()
        self._launches.append((metadata.get()["name"], first, last))
        first.record()

    def _left(self, metadata: Any) -> None:
        self._launches[-1][2].record()

    def seconds(self) -> dict[str, float]:
        """By kernel, all of its launches together. The device must have come to the end of them."""
        total: dict[str, float] = {}
        for name, first, last in self._launches:
            total[name] = total.get(name, 0.0) + first.elapsed_time(last) / 1e3
        return total


def _attach(holder: Any, name: str, hook: Callable[[Any], None]) -> Callable[[], None]:
    """Adds a hook; returns what takes it away. Triton has a chain of hooks there, older releases a single one."""
    before = getattr(holder, name)
    if hasattr(before, "add"):
        before.add(hook)
        return lambda: before.remove(hook)
    setattr(holder, name, hook)
    return lambda: setattr(holder, name, before)


def kernel_seconds(run: Callable[[], object]) -> dict[str, float]:
    """Seconds of each Triton kernel in one call of ``run``, enqueued behind a pause."""
    with LaunchTimer() as timer:
        torch.cuda._sleep(PAUSE_CYCLES)
        run()
        torch.cuda.synchronize()
    return timer.seconds()


def measure_stages(calls: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, dict[str, float]]:
    """Seconds (median, p20, p80) on the GPU, host excluded, of the calls and of each kernel inside ``calls["whole"]``.

    Returns:
        By name: each call; each Triton kernel of the whole call, its launches together; ``rest``, what of the whole
        call is in no Triton kernel (torch's operators, gaps between kernels; below 0 by what timing launches costs).
    """
    seconds = take_turns(calls, repeats, device, queued=True)
    kernels: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, taken in kernel_seconds(calls["whole"]).items():
            kernels.setdefault(name, []).append(taken)
    found = {name: quantiles(taken) for name, taken in (seconds | kernels).items()}
    in_kernels = sum(found[name]["median"] for name in kernels)
    found["rest"] = {name: taken - in_kernels for name, taken in found["whole"].items()}
    return found


def attention_seconds(stages: dict[str, dict[str, float]]) -> float:
    """Median seconds of the kernels that read what the plan says."""
    return sum(taken["median"] for name, taken in stages.items() if ATTENTION in name and name.endswith("kernel"))
