"""What psa-doctor finds out: versions, devices, backend, what would be sparse, and how much that can be worth."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..config import PSAConfig
from . import machine
from .errors import first_line
from .model_files import compression
from .pipeline import ModelSource, broken_model
from .run_record import versions

MEASURABLE_FLOPS = {"cpu": 2e11, "cuda": 2e14}  # of a layer: some seconds
NOT_COUNTED = ("planning", "memory traffic", "launch overhead", "prompt encoding", "decoding")


@dataclass(frozen=True)
class Question:
    """What would happen to this pipeline, at this size, on this device."""

    source: ModelSource
    num_frames: int
    height: int
    width: int
    steps: int
    config: PSAConfig
    device: str
    dtype: str
    measure: bool = False


def diagnose(question: Question) -> dict[str, Any]:
    """Everything that psa-doctor says, as plain values."""
    import torch

    transformers = [_transformer(question, name, kind) for name, kind in _transformers_in(question.source.index)]
    sparse = [found for found in transformers if found.get("sparse_calls")]
    shape = sparse[0] if sparse else None
    backend, backend_reason = _backend(question, shape)
    steps = _steps(question)
    problems = [found["why_dense"] for found in transformers if found["why_dense"] and not sparse]
    if not transformers:
        problems.append(f"{question.source.name} ({question.source.index.get('_class_name')}) has no transformer.")
    if backend is None:
        problems.append(backend_reason)
    if steps["sparse"] == 0:
        problems.append(f"all {steps['total']} steps are dense; lower dense_warmup, or take more steps.")
    return {
        "versions": versions(),
        "devices": machine.devices(),
        "threads": torch.get_num_threads(),
        "device": question.device,
        "dtype": question.dtype,
        "backend": backend,
        "backend_reason": backend_reason,
        "model": question.source.name,
        "pipeline": question.source.index.get("_class_name"),
        "num_frames": question.num_frames,
        "height": question.height,
        "width": question.width,
        "config": question.config.to_dict(),
        "transformers": transformers,
        "steps": steps,
        "estimate": _estimate(question, shape, steps),
        "measured": _measure(question, shape, steps) if question.measure and shape and backend else None,
        "problems": problems,
        "sparse": any(not found["why_dense"] for found in transformers) and not problems,
    }


def _transformers_in(index: dict[str, Any]) -> list[tuple[str, str]]:
    """(component, class) of what denoises, as ``model_index.json`` names it."""
    parts = {name: part[1] for name, part in index.items() if isinstance(part, list) and len(part) >= 2}
    return [(name, kind) for name, kind in parts.items() if kind and ("transformer" in name or "Transformer" in kind)]


def has_forecast(index: dict[str, Any]) -> bool:
    """Whether the tokens of a pipeline's transformers can be told from a video's size."""
    from ..integration.example_inputs import EXAMPLES

    return any(kind in EXAMPLES for _, kind in _transformers_in(index))


def takes_any_frames(index: dict[str, Any]) -> bool:
    """Whether a pipeline makes numbers of frames beside ``k * step + 1``: by windows, or by rounding."""
    from ..integration.example_inputs import EXAMPLES

    return any(EXAMPLES[kind].any_frames for _, kind in _transformers_in(index) if kind in EXAMPLES)


def _transformer(question: Question, component: str, kind: str) -> dict[str, Any]:
    """What a sparse step would do in one transformer."""
    from ..integration.example_inputs import EXAMPLES
    from ..integration.forecast import random_model, sparse_layers

    settings = question.source.read_config(component)
    found: dict[str, Any] = {"component": component, "class": kind, "why_dense": None, "no_forecast": None}
    try:
        found["sparse_layers"] = sparse_layers(random_model(kind, settings))
    except ValueError as error:
        return {**found, "sparse_layers": 0, "why_dense": first_line(error).removeprefix("PSAProcessor: ")}
    except (TypeError, AttributeError, RuntimeError) as error:  # values of other kinds than the class takes
        raise broken_model(question.source.name, f"no {kind} comes of {component}/config.json", error) from error
    if kind not in EXAMPLES:
        return {**found, "no_forecast": f"psa-doctor cannot tell the tokens of {kind}, and so makes no estimate."}
    try:
        return {**found, **_forecast(question, component, kind, settings)}
    except (RuntimeError, TypeError, ValueError) as error:  # a mode of the model that the example does not know
        failed = f"psa-doctor makes no estimate: a trial forward of {kind} without data fails: {first_line(error, 160)}"
        return {**found, "no_forecast": failed}


def _forecast(question: Question, component: str, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What a trial forward in a sparse step shows."""
    from ..integration.example_inputs import EXAMPLES
    from ..integration.forecast import forecast

    latents = _latents(question, kind)
    seen = forecast(kind, settings, latents, question.config)
    values = {**asdict(seen), "grid": list(seen.grid) if seen.grid else None, "dense_reasons": dict(seen.dense_reasons)}
    reasons = ", ".join(f"{reason} ({calls} calls)" for reason, calls in seen.dense_reasons.items())
    return {
        "counted": EXAMPLES[kind].counted or None,
        "latents": list(latents),
        **values,
        "attention_share": seen.attention_share,
        "least_budget": seen.least_budget(question.config),
        "why_dense": None if seen.sparse_calls else f"all self-attention of {component} stays dense: {reasons}.",
    }


def _latents(question: Question, kind: str) -> tuple[int, int, int]:
    """Frames, height and width of the latents of one forward of such a transformer."""
    from ..integration.example_inputs import EXAMPLES

    frame_step, spatial = compression(question.source.read_config("vae"))
    frames = EXAMPLES[kind].latent_frames(question.num_frames, frame_step)
    return frames, question.height // spatial, question.width // spatial


def _backend(question: Question, shape: dict[str, Any] | None) -> tuple[str | None, str]:
    """What would compute the sparse calls and why; None with what is in the way."""
    import torch

    from ..backends import choose_backend
    from ..planning.plan import Plan

    config = question.config
    heads, head_dim = (shape["heads"], shape["head_dim"]) if shape else (1, 64)
    query = torch.empty(1, 1, heads, head_dim, device=question.device, dtype=getattr(torch, question.dtype))
    plan = Plan(query.new_empty(0), 1, 1, config.query_block_size, config.kv_block_size, config.num_levels)
    try:
        return choose_backend(config.backend, query, plan)
    except (ValueError, RuntimeError, ImportError) as error:
        return None, first_line(error)


def _steps(question: Question) -> dict[str, Any]:
    from ..integration.schedule import dense_steps, rounding_note

    config, total = question.config, question.steps
    first, last = dense_steps(config.dense_warmup, total), dense_steps(config.dense_last, total)
    dense = min(first + last, total)
    return {"total": total, "dense": dense, "sparse": total - dense, "note": rounding_note(config, total)}


def _estimate(question: Question, shape: dict[str, Any] | None, steps: dict[str, Any]) -> dict[str, Any] | None:
    """Amdahl's law on counts of floating-point operations, as if all were equally fast."""
    from ..integration.forecast import expected_budget, speedup_ceiling

    if shape is None:
        return None
    share, total, dense = shape["attention_share"], steps["total"], steps["dense"]
    asked, least = expected_budget(question.config, question.steps), shape["least_budget"]
    budget = None if asked is None else max(asked, least)
    found = {
        "kind": "Amdahl's law on counts of floating-point operations, as if all were equally fast; not measured",
        "attention_share": share,
        "free_attention_step": speedup_ceiling(share, 0.0),
        "free_attention_run": speedup_ceiling(share, 0.0, dense, total),
        "compute_budget": budget,
        "above_asked": None if asked is None or budget == asked else asked,
        "step": None if budget is None else speedup_ceiling(share, budget),
        "run": None if budget is None else speedup_ceiling(share, budget, dense, total),
        "not_counted": list(NOT_COUNTED),
    }
    return found


def _measure(question: Question, shape: dict[str, Any], steps: dict[str, Any]) -> dict[str, Any]:
    """Times of one layer on this device, where that takes seconds."""
    import torch

    from ..integration.example_inputs import EXAMPLES
    from ..integration.forecast import measure_layer

    if not EXAMPLES[shape["class"]].layers_alike:
        return {"skipped": f"the layers of {shape['class']} are not alike, so that one tells little of the others."}
    kind = torch.device(question.device).type
    flops = (shape["attention_flops"] + shape["other_flops"]) / shape["sparse_calls"]
    limit = MEASURABLE_FLOPS.get(kind, MEASURABLE_FLOPS["cpu"])
    if flops > limit:
        return {"skipped": f"a layer has {flops / 1e12:.1f} TFLOP, more than seconds on {kind}; take a smaller size."}
    settings = question.source.read_config(shape["component"])
    dtype = getattr(torch, question.dtype)
    times = measure_layer(shape["class"], settings, tuple(shape["latents"]), question.config, question.device, dtype)
    run = question.steps / (steps["dense"] + steps["sparse"] / times.speedup)
    return {**asdict(times), "attention_share": times.attention_share, "step": times.speedup, "run": run}
