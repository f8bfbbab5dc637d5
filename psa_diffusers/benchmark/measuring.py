"""One row of a benchmark: times, errors and memory of sparse attention beside what a user has otherwise."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..attention import pyramid_sparse_attention
from ..backends import choose_backend
from ..planning import build_plan
from ..synthetic import video_like_qkv
from .cases import BenchCase
from .rivals import Attention, Rival, dense_rivals, reason, sdpa
from .rounding import relative_error, rounding_errors
from .sparse_rivals import Extras, naive_level_1, sparse_rivals
from .stages import attention_seconds, measure_stages
from .timing import peak_extra_bytes, quantiles, take_turns

ERROR_HEADS = 8  # that the error is taken over, evenly spread: dense attention in float32 is slow
# Rounds before those that count: the first compiles; on a GPU launches that come again become a graph at the second
# and are replayed from the third on, as in a model, whose layers and steps call the same again and again.
WARM_UPS = {"cuda": 4}
FLASH = "sdpa flash"  # what rounding errors are compared with, where it is there


def measure(
    case: BenchCase, repeats: int = 10, after_repeat: Callable[[], None] = lambda: None, extras: Extras | None = None
) -> dict:
    """One row: times of dense attention, planning and sparse attention, interleaved, and what they came to.

    Args:
        case: Sizes and settings.
        repeats: How often each is timed, after rounds that are not.
        after_repeat: Called after every repeat, for a progress bar.
        extras: What else to measure.

    Returns:
        Plain values by column name; None for what was not asked for or cannot be measured.

        Seconds (median, p20, p80) of dense attention, of planning, of attention with the plan, and of both in one call
        (``sparse``: on a GPU less than their sum, since the host is ahead of it by the time that attention starts).
        ``dense_backend``: the fastest of this machine, which those of dense are of. ``rivals``: the median of each
        other attention that was timed; ``rivals_budget`` and ``rivals_error`` of the sparse ones; ``speedups`` over
        each (planning included, but for those that are given what to read); ``rivals_missing``: why others were not.
        ``naive_level_1``: see :func:`.sparse_rivals.naive_level_1`. ``speedup``: of medians, planning included.
        ``ideal_speedup``: 1 / achieved compute budget. ``dense_tflops``, and ``attend_tflops`` of the work that the
        plan leaves. What :func:`_gpu_columns` adds. ``relative_error`` of the output against dense attention in
        float32, in the norm. What :func:`.rounding.rounding_errors` gives. ``peak_extra_bytes``: beyond inputs, output
        and what was there before; ``peak_extra_over_kv``.
    """
    extras = Extras() if extras is None else extras
    inputs = query, key, value = _inputs(case)
    plans, place = [], {"grid": case.grid, "full_tokens": case.full_tokens}

    def plan() -> None:
        plans.clear()  # so that the next one takes the same memory
        plans.append(build_plan(query, key, value, case.config, **place))

    def attend() -> Tensor:
        return pyramid_sparse_attention(query, key, value, case.config, plan=plans[0])

    def whole() -> Tensor:
        return pyramid_sparse_attention(query, key, value, case.config, **place)

    with torch.inference_mode():
        dense, missing = dense_rivals(*inputs)
        plan()
        others, why_not = sparse_rivals(case, inputs, plans[0], extras)
        calls = {name: partial(attention, *inputs) for name, attention in dense.items()}
        calls |= {name: rival.run for name, rival in others.items()}
        calls |= {"plan": plan, "attend": attend, "whole": whole}
        for _ in range(WARM_UPS.get(torch.device(case.device).type, 1)):
            for run in calls.values():
                run()
        seconds = take_turns(calls, repeats, case.device, after_repeat)
        peak = peak_extra_bytes(whole, case.device, query.nbytes)
        best = min(dense, key=lambda name: statistics.median(seconds[name]))
        row = _times(case, seconds, dense, others, best, plans[0].compute_budget)
        row["rivals_missing"] = missing | why_not | row["rivals_missing"]
        stages = {"dense": calls[best], "plan": plan, "attend": attend, "whole": whole}
        row |= _gpu_columns(case, stages, repeats, extras, row)
        row |= _naive_columns(case, inputs, extras, row["rivals_missing"])
        row |= _errors(case, inputs, whole(), plans[0], others, dense.get(FLASH, dense[best]), extras)
        backend, backend_reason = choose_backend(case.config.backend, query, plans[0])
    row |= {
        "backend": backend,
        "backend_reason": backend_reason,
        "planner": plans[0].planner,
        "planner_reason": plans[0].planner_reason,
        "repeats": repeats,
        "peak_extra_bytes": peak,
        "peak_extra_over_kv": None if peak is None else peak / (key.nbytes + value.nbytes),
    }
    return {name: _as_json(item) if isinstance(item, Mapping) else item for name, item in row.items()}


def _times(
    case: BenchCase,
    seconds: dict[str, list[float]],
    dense: dict[str, Attention],
    others: dict[str, Rival],
    best: str,
    budget: float,
) -> dict[str, Any]:
    """What the seconds of every repeat come to."""
    named = {"dense": best, "plan": "plan", "attend": "attend", "sparse": "whole"}
    timed = {stage: seconds[name] for stage, name in named.items()}
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    medians["sparse"] = medians["whole"]
    against = {name: "attend" if name in others and others[name].plan_given else "sparse" for name in [*dense, *others]}
    return {
        **{f"{stage}_{name}": figure for stage in timed for name, figure in quantiles(timed[stage]).items()},
        "dense_backend": best,
        "rivals": {name: medians[name] for name in against},
        "rivals_budget": {name: rival.budget for name, rival in others.items()},
        "speedups": {name: medians[name] / medians[ours] for name, ours in against.items()},
        "rivals_missing": {},
        "dense_tflops": case.dense_flops / medians[best] / 1e12,
        "attend_tflops": case.dense_flops * budget / medians["attend"] / 1e12,
        "achieved_budget": budget,
        "speedup": medians[best] / medians["sparse"],
        "ideal_speedup": 1 / budget,
    }


def _gpu_columns(
    case: BenchCase, calls: dict[str, Callable[[], object]], repeats: int, extras: Extras, row: dict[str, Any]
) -> dict[str, Any]:
    """``stages`` by name, see :func:`.stages.measure_stages`, and what they come to, host time excluded.

    ``gpu_dense``, ``gpu_plan``, ``gpu_attend``, ``gpu_sparse``: median seconds; ``gpu_speedup`` of the last over the
    first; ``kernel_tflops`` of the attention kernel alone on the work that the plan leaves; ``overhead_share``: all
    that is not the attention kernel (planning, lists, pyramid, value correction, gaps), over dense attention's time.
    """
    names = ("stages", "gpu_dense", "gpu_plan", "gpu_attend", "gpu_sparse", "gpu_speedup", "kernel_tflops")
    empty = dict.fromkeys((*names, "overhead_share"))
    if not extras.stages:
        return empty
    if torch.device(case.device).type != "cuda":  # no host apart from the device: the row's columns say it all
        return {**empty, "stages": {"plan": row["plan_median"], "attend": row["attend_median"]}}
    stages = measure_stages(calls, case.device, repeats)
    medians = {name: taken["median"] for name, taken in stages.items()}
    kernel = attention_seconds(stages)
    found = {
        "stages": stages,
        "gpu_dense": medians["dense"],
        "gpu_plan": medians["plan"],
        "gpu_attend": medians["attend"],
        "gpu_sparse": medians["whole"],
        "gpu_speedup": medians["dense"] / medians["whole"],
    }
    if kernel > 0:  # not so where torch computes
        found["kernel_tflops"] = case.dense_flops * row["achieved_budget"] / kernel / 1e12
        found["overhead_share"] = (medians["whole"] - kernel) / medians["dense"]
    else:
        row["rivals_missing"]["stages"] = "no attention kernel of Triton's was seen, so that none is timed apart"
    return {**empty, **found}


def _naive_columns(
    case: BenchCase, inputs: tuple[Tensor, Tensor, Tensor], extras: Extras, missing: dict[str, str]
) -> dict[str, Any]:
    if not extras.naive or "naive psa" in missing:
        return {"naive_level_1": None}
    try:
        return {"naive_level_1": naive_level_1(case, inputs)}
    except Exception as error:
        missing["naive psa, level 1"] = reason(error)
        return {"naive_level_1": None}


def _errors(
    case: BenchCase,
    inputs: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    plan: Any,
    others: dict[str, Rival],
    dense: Attention,
    extras: Extras,
) -> dict[str, Any]:
    step = -(-out.shape[2] // ERROR_HEADS)
    heads = slice(0, None, step)
    expected = sdpa(*(tensor[:, :, heads].float() for tensor in inputs))
    comparable = {name: rival for name, rival in others.items() if rival.in_order}
    found = {
        "relative_error": relative_error(out[:, :, heads], expected),
        "rivals_error": {
            name: relative_error(rival.run()[:, :, heads], expected) for name, rival in comparable.items()
        },
        **dict.fromkeys(("sparse_error", "dense_error", "error_ratio")),
    }
    if extras.rounding:
        found |= rounding_errors(inputs, out, plan, case.config, dense)
    return found


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


def _as_json(values: Mapping[str, Any]) -> str:
    """A table in one cell; numbers to six digits."""

    def short(item: Any) -> Any:
        if isinstance(item, Mapping):
            return {name: short(value) for name, value in item.items()}
        return float(f"{item:.6g}") if isinstance(item, float) else item

    return json.dumps(short(values))
