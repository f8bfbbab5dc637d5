"""What psa-tune does: run the prompts, collect what was measured, and write a preset."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..config import PSAConfig
from ..metrics.video_io import whole_file
from . import pipeline, run_record, settings
from .denoise import generate
from .errors import CommandError, WrongUsageError, as_wrong_usage
from .generation import resolve_settings
from .output import check_writable

if TYPE_CHECKING:
    from ..calibration.tuned import Tuned
    from ..integration.calibrating import Allocation

CLOSE, CORRECTION = 0.05, 8.0  # further off the target error than this: corrected, by at most so many times


@dataclass(frozen=True)
class TuningJob:
    """A checked request."""

    source: pipeline.ModelSource
    prompts: list[str]
    settings: settings.GenerationSettings
    output: Path
    command: str
    by_layer: bool = False


def prepare(
    *,
    prompts: tuple[str | None, Path | None],
    attention: tuple[str | None, Path | None, float | None, float | None],
    model: str | None,
    video: dict[str, Any],
    machine: tuple[str | None, str | None, str],
    seed: int,
    output: Path,
    overwrite: bool,
    command: str,
    by_layer: bool = False,
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
    config = _read_config(*attention)
    source = pipeline.find_model(model)
    settings.check_words(texts, source.vocabulary())
    resolved = resolve_settings(source, config, video, machine, seed, preset=attention[0])
    check_writable(output.parent)
    return TuningJob(source, texts, resolved, output, command, by_layer)


def _read_config(preset: str | None, file: Path | None, budget: float | None, target_error: float | None) -> PSAConfig:
    if budget is not None and target_error is not None:
        raise WrongUsageError("give --compute-budget or --target-error, not both.")
    config = settings.read_config(preset, file, budget)
    if config.rule != "budget" or config.budget_schedule is not None:
        what = f"rule: {config.rule}" if config.rule != "budget" else "a budget_schedule already"
        raise WrongUsageError(
            f"psa-tune sets the budgets of rule: budget itself, but the settings have {what}; leave that out."
        )
    if target_error is None:
        return config
    with as_wrong_usage(ValueError):
        return replace(config, compute_budget=None, target_error=target_error)


def run(job: TuningJob, *, quiet: bool) -> dict[str, Any]:
    """Run every prompt, and write the preset.

    Returns:
        What is in the file, and where it is.

    Raises:
        CommandError: nothing could be measured; the message says why.
    """
    from ..integration.calibrating import step_weights

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
    weights = step_weights(pipe.scheduler, total)
    tuned, checked = choose(job, pipe, found, weights, total, quiet=quiet)
    facts = _facts(job, total, seconds) | {
        "measured_in": [allocation.measured_in for allocation in found[0]],
        "uniform_error": tuned.uniform_error,
        "predicted_error": tuned.predicted_error,
        **checked,
    }
    preset = {
        "description": _description(job, total, tuned),
        "calibrated": facts,
        "config": tuned_config(job, tuned).to_dict(),
    }
    with whole_file(job.output) as partial:
        partial.write_text(yaml.safe_dump(preset, sort_keys=False, default_flow_style=None, width=120))
    PSAConfig.load(job.output)  # what cannot be read again is an error here
    return {"file": str(job.output), **preset}


def choose(
    job: TuningJob, pipe: Any, found: list[list[Allocation]], weights: list[float], total: int, *, quiet: bool
) -> tuple[Tuned, dict[str, float]]:
    """The schedule; for a target error also what its runs err, by which what is wanted is corrected once."""
    from ..integration.calibrating import tune_together

    config, wanted = job.settings.config, job.settings.config.target_error
    tuned = tune_together(found, weights, config.compute_budget, total, wanted, job.by_layer)
    if wanted is None:
        return tuned, {}
    measured = _measure_total(job, pipe, tuned, weights, quiet=quiet)
    if abs(measured / wanted - 1) > CLOSE:
        corrected = wanted * wanted / max(measured, wanted / CORRECTION)
        other = tune_together(found, weights, None, total, corrected, job.by_layer)
        again = _measure_total(job, pipe, other, weights, quiet=quiet)
        if abs(again - wanted) < abs(measured - wanted):
            tuned, measured = other, again
    return tuned, {"target_error": wanted, "measured_error": measured}


def _measure_total(job: TuningJob, pipe: Any, tuned: Tuned, weights: list[float], *, quiet: bool) -> float:
    """The total error of the schedule: the mean over the prompts' runs of its square, and of that the root."""
    from ..integration import watch_errors

    squares, chosen = [], replace(job.settings, config=tuned_config(job, tuned))
    for number, prompt in enumerate(job.prompts, start=1):
        label = f"check {number} of {len(job.prompts)}"
        with watch_errors(pipe) as errors:
            generate(pipe, prompt, chosen, sparse=True, quiet=quiet, label=label, decode=False)
        squares.append(errors.total(weights, tuned.places) ** 2)
    return (sum(squares) / len(squares)) ** 0.5


def tuned_config(job: TuningJob, tuned: Tuned) -> PSAConfig:
    """The settings with the schedule in place of a target error."""
    budget = job.settings.config.compute_budget or float(f"{tuned.mean_budget:.4g}")
    return replace(job.settings.config, compute_budget=budget, target_error=None, budget_schedule=tuned.schedule)


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


def _description(job: TuningJob, total: int, tuned: Tuned) -> str:
    chosen = job.settings
    wanted = chosen.config.target_error
    aim = "" if wanted is None else f"total error {wanted:g}, "
    budget = tuned_config(job, tuned).compute_budget
    return (
        f"Calibrated for {job.source.name}: {chosen.num_frames} frames of {chosen.width}x{chosen.height}, {total} "
        f"steps; {aim}compute budget {budget:g} on average over the sparse calls."
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
        *_checked_words(facts),
        f"Use it: --config {found['file']}, or PSAConfig.load({found['file']!r}).",
    ]


def _checked_words(facts: dict[str, Any]) -> list[str]:
    if "target_error" not in facts:
        return []
    return [
        f"In runs with these budgets the total error was {facts['measured_error']:.4f}; wanted was "
        f"{facts['target_error']:g}."
    ]
