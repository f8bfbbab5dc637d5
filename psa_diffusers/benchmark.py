"""Timing sparse attention against dense attention, on inputs with the structure of a video's."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import pyramid_sparse_attention
from .backends import choose_backend
from .config import PSAConfig
from .planning import build_plan
from .synthetic import video_like_qkv


@dataclass(frozen=True)
class BenchCase:
    """What one row of a benchmark measures."""

    grid: tuple[int, int, int]
    config: PSAConfig
    batch: int = 1
    heads: int = 4
    head_dim: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0

    @property
    def tokens(self) -> int:
        frames, height, width = self.grid
        return frames * height * width

    @property
    def dense_flops(self) -> int:
        """Floating-point operations of the two matrix products of dense attention."""
        return 4 * self.batch * self.heads * self.head_dim * self.tokens**2


def grid_of(tokens: int) -> tuple[int, int, int]:
    """A grid (frames, height, width) of that many tokens, as near to a quarter as many frames as rows as can be."""

    def unevenness(grid: tuple[int, int, int]) -> float:
        frames, height, width = grid
        return max(4 * frames / height, height / (4 * frames)) * width / height

    divisors = [size for size in range(1, tokens + 1) if tokens % size == 0]
    grids = [
        (tokens // (height * width), height, width)
        for height in divisors
        for width in divisors
        if width >= height and tokens % (height * width) == 0
    ]
    return min(grids, key=unevenness)


def measure(case: BenchCase, repeats: int = 10, after_repeat: Callable[[], None] = lambda: None) -> dict:
    """One row: times of dense attention, planning and sparse attention, interleaved, and what they came to.

    Args:
        case: Sizes and settings.
        repeats: How often each is timed, after one run that is not.
        after_repeat: Called after every repeat, for a progress bar.

    Returns:
        Plain values by column name: seconds (median, p20, p80) of dense attention, of planning, of attention with the
        plan, and of both together; ``speedup`` (medians, planning included); ``ideal_speedup`` (1 / achieved compute
        budget); ``relative_error`` of the output against dense attention in float32, in the norm; ``peak_extra_bytes``
        (beyond inputs, output and what was there before; None where it cannot be measured) and ``peak_extra_over_kv``.
    """
    query, key, value = video_like_qkv(
        case.batch,
        case.grid,
        case.heads,
        case.head_dim,
        seed=case.seed,
        dtype=getattr(torch, case.dtype),
        device=case.device,
    )
    plans = []

    def plan() -> None:
        plans[:] = [build_plan(query, key, value, case.config, grid=case.grid)]

    def attend() -> Tensor:
        return pyramid_sparse_attention(query, key, value, case.config, plan=plans[0])

    def whole() -> Tensor:
        return pyramid_sparse_attention(query, key, value, case.config, grid=case.grid)

    with torch.inference_mode():
        stages = {"dense": lambda: _dense(query, key, value), "plan": plan, "attend": attend}
        for run in stages.values():
            run()
        seconds = _time_stages(stages, repeats, case.device, after_repeat)
        peak = _peak_extra_bytes(whole, case.device, query.nbytes)
        error = _relative_error(whole(), _dense(query.float(), key.float(), value.float()))
        backend, reason = choose_backend(case.config.backend, query, plans[0])
    seconds["sparse"] = [sum(pair) for pair in zip(seconds["plan"], seconds["attend"], strict=True)]
    speedup = statistics.median(seconds["dense"]) / statistics.median(seconds["sparse"])
    return {
        "backend": backend,
        "backend_reason": reason,
        "planner": plans[0].planner,
        "planner_reason": plans[0].planner_reason,
        "repeats": repeats,
        **{f"{stage}_{name}": figure for stage in seconds for name, figure in _quantiles(seconds[stage]).items()},
        "dense_tflops": case.dense_flops / statistics.median(seconds["dense"]) / 1e12,
        "achieved_budget": plans[0].compute_budget,
        "speedup": speedup,
        "ideal_speedup": 1 / plans[0].compute_budget,
        "relative_error": error,
        "peak_extra_bytes": peak,
        "peak_extra_over_kv": None if peak is None else peak / (key.nbytes + value.nbytes),
    }


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def _time_stages(
    stages: dict[str, Callable[[], object]], repeats: int, device: str, after_repeat: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds of every stage at every repeat, the stages taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(repeats):
        for name, run in stages.items():
            seconds[name].append(_seconds(run, device))
        after_repeat()
    return seconds


def _seconds(run: Callable[[], object], device: str) -> float:
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def _quantiles(seconds: list[float]) -> dict[str, float]:
    ordered = torch.tensor(sorted(seconds), dtype=torch.float64)
    return {name: ordered.quantile(share).item() for name, share in (("median", 0.5), ("p20", 0.2), ("p80", 0.8))}


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


def _peak_extra_bytes(run: Callable[[], object], device: str, output_bytes: int) -> int | None:
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
