"""How long calls take, and how much memory they hold."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

PAUSE_CYCLES = 10_000_000  # 5 ms of a GPU at 2 GHz: longer than the host takes to enqueue an attention call


def take_turns(
    stages: Mapping[str, Callable[[], object]],
    repeats: int,
    device: str,
    after_repeat: Callable[[], None] = lambda: None,
    *,
    queued: bool = False,
) -> dict[str, list[float]]:
    """Seconds of every stage at every repeat, the stages taking turns, so that a machine that heats up slows all.

    Args:
        queued: On a GPU, enqueue each call behind a pause, so that the host's time does not count. Otherwise a GPU is
            idle when a call begins, and waits for the host like its user.
    """
    seconds: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(repeats):
        for name, run in stages.items():
            seconds[name].append(seconds_of(run, device, queued=queued))
        after_repeat()
    return seconds


def seconds_of(run: Callable[[], object], device: str, *, queued: bool = False) -> float:
    """Seconds of one call; see :func:`take_turns`."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if queued:
        torch.cuda._sleep(PAUSE_CYCLES)
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def quantiles(seconds: list[float]) -> dict[str, float]:
    """Median, p20 and p80."""
    ordered = torch.tensor(sorted(seconds), dtype=torch.float64)
    return {name: ordered.quantile(share).item() for name, share in (("median", 0.5), ("p20", 0.2), ("p80", 0.8))}


def peak_extra_bytes(run: Callable[[], object], device: str, output_bytes: int) -> int | None:
    """The most memory that ``run`` held at a time beyond what was there before, less its output."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before - output_bytes
    try:
        ctypes.CDLL(None).malloc_trim(0)  # so that memory freed before is not used again unseen
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
        before = _status_bytes("VmRSS")
        run()
        return _status_bytes("VmHWM") - before - output_bytes
    except (OSError, AttributeError, StopIteration):  # not Linux with glibc
        return None


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))
