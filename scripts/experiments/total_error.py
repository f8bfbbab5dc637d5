"""Beyond the paper: is a wanted total error met on other prompts, and at what compute, beside one budget for all?

    python scripts/experiments/total_error.py --output benchmarks/experiments

As ``psa-tune --target-error`` does, the tuning prompts are run, a schedule is made of what is measured in one dense
step, and corrected once by what their runs err ("tuned"). Then other prompts are run with it, with a schedule made in
the run itself ("in the run": ``calibrate=True``), and with one budget for all calls, the mean of the tuned schedule.
Each run's own total error is measured (``watch_errors``), and PSNR against the dense video of the same noise. Writes
total_error.csv (a row a prompt, target and setting), total_error.json (means, schedules, machine, versions) and a plot.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import _laboratory  # noqa: F401
import typer
from calibration import IN_RUN, UNIFORM, read_prompts, row_of
from harness import mean, pick, save_figure, write_rows

from psa_diffusers import PSAConfig
from psa_diffusers.cli import pipeline, run_record, tuning
from psa_diffusers.cli.denoise import generate
from psa_diffusers.cli.generation import resolve_settings
from psa_diffusers.cli.settings import GenerationSettings
from psa_diffusers.integration import watch_errors
from psa_diffusers.integration.calibrating import step_weights
from psa_diffusers.report.figure import new_figure

TUNED = "tuned"


def tuned_config(pipe: Any, settings: GenerationSettings, prompts: list[str]) -> tuple[PSAConfig, dict[str, float]]:
    """What psa-tune would write, and the total error that it found."""
    job = tuning.TuningJob(None, prompts, settings, Path(), "")
    runs = [
        generate(pipe, prompt, settings, sparse=True, quiet=True, calibrate=True, decode=False) for prompt in prompts
    ]
    found = [run.statistics.calibration.allocations for run in runs]
    weights = step_weights(pipe.scheduler, settings.steps)
    tuned, facts = tuning.choose(job, pipe, found, weights, settings.steps, quiet=True)
    return tuning.tuned_config(job, tuned), {"predicted_error": tuned.predicted_error, **facts}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    table = []
    for target, setting in dict.fromkeys((row["target"], row["setting"]) for row in rows):
        own = pick(rows, target=target, setting=setting)
        ratios = [row["total_error"] / target for row in own]
        table.append(
            {
                **{"target": target, "setting": setting, "prompts": len(own)},
                **{name: mean(row[name] for row in own) for name in ("compute_budget", "total_error", "psnr", "ssim")},
                **{"least_ratio": min(ratios), "mean_ratio": mean(ratios), "largest_ratio": max(ratios)},
            }
        )
    return table


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    figure = new_figure(9, 4)
    left, right = figure.subplots(1, 2)
    for number, setting in enumerate((TUNED, IN_RUN, UNIFORM)):
        own = pick(rows, setting=setting)
        targets = sorted({row["target"] for row in own})
        left.plot([row["target"] for row in own], [row["total_error"] for row in own], "o", alpha=0.6, label=setting)
        means = [pick(own, target=target) for target in targets]
        points = [[mean(row[name] for row in part) for part in means] for name in ("compute_budget", "total_error")]
        right.plot(*points, "osD"[number] + "-", label=setting)
    ends = [min(row["target"] for row in rows), max(row["target"] for row in rows)]
    left.plot(ends, ends, color="gray", linewidth=1)
    left.set(xlabel="wanted total error", ylabel="total error of a run", xscale="log", yscale="log")
    right.set(xlabel="mean compute budget of the sparse steps", ylabel="total error, mean over prompts", yscale="log")
    left.legend(frameon=False, fontsize=8)
    save_figure(path, figure)


def main(
    output: Annotated[Path, typer.Option(help="Folder for the results.")],
    model: Annotated[str | None, typer.Option(help="Model; default the bundled one.")] = None,
    tuning_prompts: Annotated[int, typer.Option("--tuning", help="Prompts to measure for the schedule.")] = 2,
    reported: Annotated[int, typer.Option(help="Other prompts, to report.")] = 8,
    target: Annotated[list[float] | None, typer.Option(help="Total errors. Default 0.05, 0.1, 0.15.")] = None,
    steps: Annotated[int | None, typer.Option()] = None,
    height: Annotated[int | None, typer.Option()] = None,
    width: Annotated[int | None, typer.Option()] = None,
    num_frames: Annotated[int | None, typer.Option()] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    device: Annotated[str | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
) -> None:
    source = pipeline.find_model(model)
    video = {"num_inference_steps": steps, "height": height, "width": width, "num_frames": num_frames}
    settings = resolve_settings(source, PSAConfig(), video, (device, dtype, "none"), seed)
    pipe = pipeline.load_pipeline(source, settings.dtype, settings.device)
    for_tuning, prompts = read_prompts(tuning_prompts, 0, reported)
    configs: dict[tuple[float, str], PSAConfig] = {}
    facts: dict[str, Any] = {"tuned": {}}
    for wanted in target or [0.05, 0.1, 0.15]:
        asked = PSAConfig(target_error=wanted)
        configs[wanted, TUNED], facts["tuned"][f"{wanted:g}"] = tuned_config(
            pipe, replace(settings, config=asked), for_tuning
        )
        configs[wanted, IN_RUN] = asked
        configs[wanted, UNIFORM] = PSAConfig(compute_budget=configs[wanted, TUNED].compute_budget)
    rows, weights = [], step_weights(pipe.scheduler, settings.steps)
    for number, prompt in enumerate(prompts, start=1):
        dense = generate(pipe, prompt, settings, sparse=False, quiet=True)
        for (wanted, setting), config in configs.items():
            with watch_errors(pipe) as errors:
                own = replace(settings, config=config)
                run = generate(pipe, prompt, own, sparse=True, quiet=True, calibrate=setting == IN_RUN)
            row = row_of({"prompt": prompt, "target": wanted, "setting": setting}, dense, run, settings.device)
            rows.append({**row, "total_error": round(errors.total(weights), 6)})
        last = ", ".join(f"{row['setting']} {row['total_error']:.3f}" for row in rows[-len(configs) :])
        print(f"{number} of {len(prompts)}: {last}", file=sys.stderr, flush=True)
        write_rows(output / "total_error.csv", rows)
    facts |= {
        "table": summary(rows),
        "configs": {f"{wanted:g}, {setting}": config.to_dict() for (wanted, setting), config in configs.items()},
        "tuning_prompts": for_tuning,
        "settings": settings.to_dict(),
        "model": source.identity(),
        **run_record.describe_environment(settings, shlex.join(["python", *sys.argv])),
    }
    run_record.write_json(output / "total_error.json", facts)
    for row in facts["table"]:
        print("  ".join(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
    plot(output / "total_error.png", rows)


if __name__ == "__main__":
    typer.run(main)
