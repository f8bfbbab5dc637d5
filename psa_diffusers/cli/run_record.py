"""run.json: everything needed to repeat a run exactly, and what it did."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

from .. import __version__
from ..metrics.video_io import whole_file
from .denoise import DENSE, SPARSE, Generated
from .settings import GenerationSettings

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "numpy", "imageio-ffmpeg")


def versions() -> dict[str, str | None]:
    """Versions of what computes the video; None for what is not installed."""
    found: dict[str, str | None] = {
        "psa_diffusers": __version__,
        "commit": commit(),
        "python": platform.python_version(),
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The checkout's commit, with ``-dirty`` where tracked files differ from it; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def device_name(device: str) -> str:
    """The GPU's or the processor's name."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def describe_request(prompt: str, settings: GenerationSettings, model: dict[str, str], compare: bool) -> dict[str, Any]:
    """What was asked for. Two runs with equal requests on equal versions give the same video."""
    return {"prompt": prompt, **settings.to_dict(), "model": model, "compare": compare}


def describe_environment(settings: GenerationSettings, command: str) -> dict[str, Any]:
    """What it ran by and on, and when."""
    import torch

    return {
        "command": command,
        "versions": versions(),
        "device_name": device_name(settings.device),
        "threads": torch.get_num_threads(),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def describe_run(run: Generated) -> dict[str, Any]:
    """What the sparse run did: steps, seconds, compute budgets, backend, fallbacks."""
    counted = run.statistics
    return {
        "backend": counted.backend,
        "backend_reason": counted.backend_reason,
        "planner": counted.planner,
        "planner_reason": counted.planner_reason,
        "dense_steps": len(run.steps_of(DENSE)),
        "sparse_steps": len(run.steps_of(SPARSE)),
        "seconds_per_dense_step": run.seconds_per_step(DENSE),
        "seconds_per_sparse_step": run.seconds_per_step(SPARSE),
        "seconds_total": run.total_seconds,
        "seconds_of_steps": run.step_seconds,
        "kinds_of_steps": run.step_kinds,
        "compute_budget_sparse_calls": counted.compute_budget_sparse,
        "compute_budget_all_calls": counted.compute_budget_all,
        "compute_budget_by_step": [list(pair) for pair in counted.compute_budget_by_step],
        "estimator_share": estimator_share(counted),
        "calibration_seconds": counted.calibration_seconds,
        "calibration": None if counted.calibration is None else counted.calibration.to_dict(),
        "dense_calls": counted.dense_calls,
        "sparse_calls": counted.sparse_calls,
        "dense_reasons": dict(counted.dense_reasons),
        "fallbacks": fallbacks(counted),
        "notes": list(counted.notes),
        "warnings": dict(counted.warnings),
    }


def estimator_share(counted: Any) -> float | None:
    """Share of the sparse attention's time that went into planning; None where it was not timed."""
    planning, attention = counted.planning_seconds, counted.attention_seconds
    if planning is None or not attention:
        return None
    return planning / (planning + attention)


def fallbacks(counted: Any) -> list[dict[str, Any]]:
    """Calls that stayed dense although no one asked for it, with the reason."""
    return [
        {"reason": reason, "calls": calls} for reason, calls in counted.dense_reasons.items() if not planned(reason)
    ]


def planned(reason: str) -> bool:
    """Whether the config asked for this: the plugin's reasons of that kind begin with "dense"."""
    return reason.startswith("dense ")


def describe_comparison(dense: Generated, sparse: Generated, closeness: dict[str, Any]) -> dict[str, Any]:
    """Closeness and speed of the sparse run against the dense one.

    ``speedup`` is of the whole pipeline call: prompt encoding, every step (the dense warm-up too) and decoding, but
    not loading, nor writing files. ``speedup_sparse_steps`` divides the dense run's median over the steps that are
    sparse in the sparse run by the sparse run's median.
    """
    steps = sparse.steps_of(SPARSE)
    dense_step, sparse_step = dense.seconds_per_step(DENSE, steps), sparse.seconds_per_step(SPARSE)
    return {
        **closeness,
        "speedup": dense.total_seconds / sparse.total_seconds,
        "speedup_sparse_steps": dense_step / sparse_step if steps else None,
        "dense_run": {
            "seconds_total": dense.total_seconds,
            "seconds_per_step": dense.seconds_per_step(DENSE),
            "seconds_of_steps": dense.step_seconds,
        },
    }


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write whole or not at all. NaN and infinity are errors: JSON has neither."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def digest(text: str) -> str:
    """A short name for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
