"""What psa-tune does: run the prompts, collect what was measured, and write a preset."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..config import PSAConfig
from ..metrics.video_io import whole_file
from . import pipeline, run_record, settings
from .denoise import generate
from .errors import CommandError, WrongUsageError
from .generation import resolve_settings
from .output import check_writable


@dataclass(frozen=True)
class TuningJob:
    """A checked request."""

    source: pipeline.ModelSource
    prompts: list[str]
    settings: settings.GenerationSettings
    output: Path
    command: str


def prepare(
    *,
    prompts: tuple[str | None, Path | None],
    attention: tuple[str | None, Path | None, float | None],
    model: str | None,
    video: dict[str, Any],
    machine: tuple[str | None, str | None, str],
    seed: int,
    output: Path,
    overwrite: bool,
    command: str,
) -> TuningJob:
    """Check every option, cheapest first, before any weights are read.

    Raises:
        WrongUsageError: an option cannot be met; the message says what to do.
    """
    if output.suffix not in (".yaml", ".yml"):
        raise WrongUsageError(f"--output must end in .yaml, but is {output}.")
    if output.exists() and not overwrite:
        raise WrongUsageError(f"{output} is there already. Add --overwrite to replace it, or name another file.")
    texts = settings.read_prompts(*prompts)
    config = settings.read_config(*attention)
    if config.compute_budget is None or config.budget_schedule is not None:
        what = f"rule: {config.rule}" if config.rule != "budget" else "a budget_schedule already"
        what = what if config.target_error is None else "a target_error"
        raise WrongUsageError(
            f"psa-tune spends a mean compute_budget by rule: budget, but the settings have {what}; leave that out."
        )
    source = pipeline.find_model(model)
    settings.check_words(texts, source.vocabulary())
    resolved = resolve_settings(source, config, video, machine, seed, preset=attention[0])
    check_writable(output.parent)
    return TuningJob(source, texts, resolved, output, command)


def run(job: TuningJob, *, quiet: bool) -> dict[str, Any]:
    """Run every prompt, and write the preset.

    Returns:
        What is in the file, and where it is.

    Raises:
        CommandError: nothing could be measured; the message says why.
    """
    from ..integration.calibrating import step_weights, tune_together

    pipe = pipeline.load_pipeline(job.source, job.settings.dtype, job.settings.device, job.settings.offload)
    found, seconds, kept = [], 0.0, None
    for number, prompt in enumerate(job.prompts, start=1):
        label = f"run {number} of {len(job.prompts)}"
        kept = generate(pipe, prompt, job.settings, sparse=True, quiet=quiet, label=label, calibrate=True, decode=False)
        found.append(kept.statistics.calibration.allocations)
        seconds += kept.statistics.calibration_seconds
    total = kept.statistics.last_step[1]
    if not all(found):
        reasons = " ".join(kept.statistics.notes) or f"{', '.join(kept.statistics.dense_reasons) or 'no step'}."
        raise CommandError(f"nothing was measured. {reasons} Take more --steps, or a lower dense_warmup.")
    config = job.settings.config
    tuned = tune_together(found, step_weights(pipe.scheduler, total), config.compute_budget, total)
    facts = _facts(job, total, seconds) | {
        "measured_in": [allocation.measured_in for allocation in found[0]],
        "uniform_error": tuned.uniform_error,
        "predicted_error": tuned.predicted_error,
    }
    preset = {
        "description": _description(job, total),
        "calibrated": facts,
        "config": replace(config, budget_schedule=tuned.schedule).to_dict(),
    }
    with whole_file(job.output) as partial:
        partial.write_text(yaml.safe_dump(preset, sort_keys=False, default_flow_style=None, width=120))
    PSAConfig.load(job.output)  # what cannot be read again is an error here
    return {"file": str(job.output), **preset}


def _facts(job: TuningJob, total: int, seconds: float) -> dict[str, Any]:
    """What it was calibrated for, and by."""
    chosen = job.settings
    size = {name: getattr(chosen, name) for name in ("num_frames", "height", "width", "guidance_scale")}
    return {
        "model": job.source.identity(),
        **size,
        "steps": total,
        "prompts": job.prompts,
        "seed": chosen.seed,
        "dtype": chosen.dtype,
        "device_name": run_record.device_name(chosen.device),
        "versions": {name: version for name, version in run_record.versions().items() if version},
        "command": job.command,
        "seconds_measuring": round(seconds, 2),
    }


def _description(job: TuningJob, total: int) -> str:
    chosen = job.settings
    return (
        f"Calibrated for {job.source.name}: {chosen.num_frames} frames of {chosen.width}x{chosen.height}, {total} "
        f"steps; compute budget {chosen.config.compute_budget:g} on average over the sparse calls."
    )


def in_words(found: dict[str, Any]) -> list[str]:
    """The result as lines."""
    facts, schedule = found["calibrated"], found["config"]["budget_schedule"]
    budgets = [budget for point in schedule for budget in point["budget"]]
    return [
        f"{found['file']}: {found['description']}",
        f"Budgets from {min(budgets):.3f} to {max(budgets):.3f}, mean {sum(budgets) / len(budgets):.3f}.",
        f"By what was measured ({facts['seconds_measuring']:.1f} s) the error of attention, weighted by step, is "
        f"{facts['predicted_error']:.4f}; with one budget for all {facts['uniform_error']:.4f}.",
        f"Use it: --config {found['file']}, or PSAConfig.load({found['file']!r}).",
    ]
