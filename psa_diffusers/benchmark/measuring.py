"""One row of a benchmark: times, errors and memory of sparse attention beside what a user has otherwise."""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..attention import pyramid_sparse_attention
from ..backends import choose_backend
from ..planning import build_plan
from ..synthetic import video_like_qkv
from .cases import BenchCase
from .rivals import Attention, dense_rivals, flex_attention, sdpa


def measure(
    case: BenchCase, repeats: int = 10, after_repeat: Callable[[], None] = lambda: None, *, with_flex: bool = False
) -> dict:
    """One row: times of dense attention, planning and sparse attention, interleaved, and what they came to.

    Args:
        case: Sizes and settings.
        repeats: How often each is timed, after one run that is not.
        after_repeat: Called after every repeat, for a progress bar.
        with_flex: Also time FlexAttention with a binary mask of the same compute budget (compiles for a while).

    Returns:
        Plain values by column name: seconds (median, p20, p80) of dense attention, of planning, of attention with the
        plan, and of both together; ``dense_backend``, the fastest of this machine, which those of dense are of;
        ``rivals``, the median of each other attention that was timed, and ``rivals_missing``, why others were not;
        ``speedup`` (medians, planning included); ``ideal_speedup`` (1 / achieved compute budget); ``dense_tflops``, and
        ``attend_tflops`` of the work that the plan leaves; ``relative_error`` of the output against dense attention in
        float32, in the norm; ``peak_extra_bytes`` (beyond inputs, output and what was there before; None where it
        cannot be measured) and ``peak_extra_over_kv``.
    """
    query, key, value = _inputs(case)
    plans, place = [], {"grid": case.grid, "full_tokens": case.full_tokens}

    def plan() -> None:
        plans[:] = [build_plan(query, key, value, case.config, **place)]

    def attend() -> Tensor:
        return pyramid_sparse_attention(query, key, value, case.config, plan=plans[0])

    def whole() -> Tensor:
        return pyramid_sparse_attention(query, key, value, case.config, **place)

    with torch.inference_mode():
        rivals, missing = dense_rivals(query, key, value)
        dense_names = list(rivals)
        if with_flex:
            rivals["flex, binary mask"] = _binary_flex(case, query, key, value)
        stages = {name: partial(attention, query, key, value) for name, attention in rivals.items()}
        stages |= {"plan": plan, "attend": attend}
        for run in stages.values():
            run()
        seconds = _time_stages(stages, repeats, case.device, after_repeat)
        peak = _peak_extra_bytes(whole, case.device, query.nbytes)
        error = _relative_error(whole(), sdpa(query.float(), key.float(), value.float()))
        backend, reason = choose_backend(case.config.backend, query, plans[0])
        budget = plans[0].compute_budget
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    best = min(dense_names, key=medians.__getitem__)
    sparse = [sum(pair) for pair in zip(seconds["plan"], seconds["attend"], strict=True)]
    timed = {"dense": seconds[best], "plan": seconds["plan"], "attend": seconds["attend"], "sparse": sparse}
    return {
        "backend": backend,
        "backend_reason": reason,
        "planner": plans[0].planner,
        "planner_reason": plans[0].planner_reason,
        "repeats": repeats,
        **{f"{stage}_{name}": figure for stage in timed for name, figure in _quantiles(timed[stage]).items()},
        "dense_backend": best,
        "rivals": json.dumps({name: float(f"{medians[name]:.6g}") for name in rivals}),
        "rivals_missing": json.dumps(missing),
        "dense_tflops": case.dense_flops / medians[best] / 1e12,
        "attend_tflops": case.dense_flops * budget / medians["attend"] / 1e12,
        "achieved_budget": budget,
        "speedup": medians[best] / statistics.median(sparse),
        "ideal_speedup": 1 / budget,
        "relative_error": error,
        "peak_extra_bytes": peak,
        "peak_extra_over_kv": None if peak is None else peak / (key.nbytes + value.nbytes),
    }


def _inputs(case: BenchCase) -> tuple[Tensor, Tensor, Tensor]:
    video = video_like_qkv(
        case.batch,
        case.grid,
        case.heads,
        case.head_dim,
        seed=case.seed,
        dtype=getattr(torch, case.dtype),
        device=case.device,
        draw_on=case.device,
    )
    if case.text_tokens == 0:
        return video
    generator = torch.Generator().manual_seed(case.seed + 1)
    shape = (case.batch, case.text_tokens, case.heads, case.head_dim)
    return tuple(torch.cat([tokens, torch.randn(shape, generator=generator).to(tokens)], dim=1) for tokens in video)


def _binary_flex(case: BenchCase, query: Tensor, key: Tensor, value: Tensor) -> Attention:
    """FlexAttention over the plan of a binary top-k rule, on tensors that are put in its order beforehand."""
    config = replace(
        case.config,
        rule="topk",
        level_fractions=(case.config.compute_budget or 1.0,) + (0.0,) * (case.config.num_levels - 1),
        **dict.fromkeys(("compute_budget", "value_correction", "level_thresholds")),
    )
    plan = build_plan(query, key, value, config, grid=case.grid, full_tokens=case.full_tokens)
    inputs = [tensor if plan.order is None else tensor[:, plan.order] for tensor in (query, key, value)]
    attention = flex_attention(plan.level_mask, plan.query_block_size, plan.kv_block_size)
    return lambda *ignored: attention(*inputs)


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
