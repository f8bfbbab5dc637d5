"""Beyond the paper: calibrated budgets against one budget for all, on whole videos of other prompts, at equal compute.

    python scripts/experiments/calibration.py --output benchmarks/experiments

As psa-tune does, the tuning prompts are run once each, and a schedule is made of what is measured in one dense step.
Then for every other prompt, from the same noise and with the same dense warm-up: dense; one budget for all sparse
calls; the schedule ("tuned"); and budgets measured in that very run ("in the run", ``enable_psa(pipe,
calibrate=True)``). PSNR and SSIM are against the dense video. Writes calibration.csv (a row a
prompt, budget and setting), calibration.json (means, paired differences with 95 % intervals, schedules, machine,
versions) and calibration.png.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import _laboratory  # noqa: F401
import typer
from harness import mean, pick, save_figure, write_rows

from psa_diffusers import PSAConfig
from psa_diffusers.cli import pipeline, run_record
from psa_diffusers.cli.denoise import Generated, generate
from psa_diffusers.cli.generation import resolve_settings
from psa_diffusers.cli.settings import GenerationSettings
from psa_diffusers.integration.calibrating import step_weights, tune_together
from psa_diffusers.metrics import mean_with_interval, psnr, ssim
from psa_diffusers.report.figure import new_figure

PROMPTS = Path(__file__).parents[1] / "demo_model" / "eval_prompts.txt"
UNIFORM, TUNED, IN_RUN = "one budget", "tuned", "in the run"


def read_prompts(tuning: int, reported: int) -> tuple[list[str], list[str]]:
    """The first ones are for tuning."""
    lines = [line.split("\t")[-1] for line in PROMPTS.read_text().splitlines() if line and line[0] != "#"]
    return lines[:tuning], lines[tuning : tuning + reported]


def tuned_schedule(pipe: Any, settings: GenerationSettings, prompts: list[str]) -> dict[str, Any]:
    """What psa-tune would write: the config, with what was expected of it."""
    found = []
    for prompt in prompts:
        run = generate(pipe, prompt, settings, sparse=True, quiet=True, calibrate=True, decode=False)
        found.append(run.statistics.calibration.allocations)
    total = run.statistics.last_step[1]
    weights = step_weights(pipe.scheduler, total)
    tuned = tune_together(found, weights, settings.config.compute_budget, total)
    config = replace(settings.config, budget_schedule=tuned.schedule)
    return {"config": config, "uniform_error": tuned.uniform_error, "predicted_error": tuned.predicted_error}


def row_of(prompt: str, budget: float, setting: str, dense: Generated, run: Generated) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "budget": budget,
        "setting": setting,
        "compute_budget": round(run.statistics.compute_budget_sparse, 5),
        "psnr": round(psnr(dense.frames, run.frames), 4),
        "ssim": round(ssim(dense.frames, run.frames), 6),
        "seconds": round(run.total_seconds, 3),
        "seconds_measuring": round(run.statistics.calibration_seconds, 3),
    }


def summary(rows: list[dict[str, Any]], budgets: list[float]) -> list[dict[str, Any]]:
    """Means of each budget and setting, and by how much it is ahead of one budget, prompt by prompt."""
    table = []
    for budget in budgets:
        base = {row["prompt"]: row for row in pick(rows, budget=budget, setting=UNIFORM)}
        for setting in (UNIFORM, TUNED, IN_RUN):
            own = pick(rows, budget=budget, setting=setting)
            gains = [row["psnr"] - base[row["prompt"]]["psnr"] for row in own]
            table.append(
                {
                    **{"budget": budget, "setting": setting, "prompts": len(own)},
                    **{name: mean(row[name] for row in own) for name in ("compute_budget", "psnr", "ssim", "seconds")},
                    "seconds_measuring": mean(row["seconds_measuring"] for row in own),
                    "ahead_db": asdict(mean_with_interval(gains, [row["prompt"] for row in own], 0.95)),
                    "ahead_on": sum(gain > 0 for gain in gains),
                }
            )
    return table


def plot(path: Path, rows: list[dict[str, Any]], budgets: list[float]) -> None:
    figure = new_figure(4.6 * len(budgets), 4.2)
    for axes, budget in zip(figure.subplots(1, len(budgets), squeeze=False)[0], budgets, strict=True):
        base = [row["psnr"] for row in pick(rows, budget=budget, setting=UNIFORM)]
        for setting in (TUNED, IN_RUN):
            axes.plot(base, [row["psnr"] for row in pick(rows, budget=budget, setting=setting)], "o", label=setting)
        axes.plot([min(base), max(base)], [min(base), max(base)], color="gray", linewidth=1)
        axes.set(title=f"compute budget {budget:g}", xlabel="PSNR, one budget for all (dB)", ylabel="PSNR (dB)")
        axes.legend(frameon=False)
    save_figure(path, figure)


def main(
    output: Annotated[Path, typer.Option(help="Folder for the results.")],
    model: Annotated[str | None, typer.Option(help="Model; default the bundled one.")] = None,
    tuning: Annotated[int, typer.Option(help="Prompts to tune on.")] = 2,
    reported: Annotated[int, typer.Option(help="Other prompts, to report.")] = 16,
    budget: Annotated[list[float] | None, typer.Option(help="Mean compute budgets. Default 0.1 and 0.15.")] = None,
    steps: Annotated[int | None, typer.Option()] = None,
    height: Annotated[int | None, typer.Option()] = None,
    width: Annotated[int | None, typer.Option()] = None,
    num_frames: Annotated[int | None, typer.Option()] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    device: Annotated[str | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
) -> None:
    source, budgets = pipeline.find_model(model), budget or [0.1, 0.15]
    video = {"num_inference_steps": steps, "height": height, "width": width, "num_frames": num_frames}
    settings = resolve_settings(source, PSAConfig(), video, (device, dtype, "none"), seed)
    pipe = pipeline.load_pipeline(source, settings.dtype, settings.device)
    of_budget = {b: replace(settings, config=PSAConfig(compute_budget=b)) for b in budgets}
    for_tuning, prompts = read_prompts(tuning, reported)
    tuned = {b: tuned_schedule(pipe, own, for_tuning) for b, own in of_budget.items()}
    rows = []
    for number, prompt in enumerate(prompts, start=1):
        dense = generate(pipe, prompt, settings, sparse=False, quiet=True)
        for b, own in of_budget.items():
            runs = {
                UNIFORM: generate(pipe, prompt, own, sparse=True, quiet=True),
                TUNED: generate(pipe, prompt, replace(own, config=tuned[b]["config"]), sparse=True, quiet=True),
                IN_RUN: generate(pipe, prompt, own, sparse=True, quiet=True, calibrate=True),
            }
            rows += [row_of(prompt, b, setting, dense, run) for setting, run in runs.items()]
            found = ", ".join(f"{row['setting']} {row['psnr']:.2f}" for row in rows[-3:])
            print(f"{number} of {len(prompts)}, budget {b:g}: {found}", file=sys.stderr, flush=True)
    write_rows(output / "calibration.csv", rows)
    facts = {
        "table": summary(rows, budgets),
        "tuned": {b: {**found, "config": found["config"].to_dict()} for b, found in tuned.items()},
        "tuning_prompts": for_tuning,
        "settings": settings.to_dict(),
        "model": source.identity(),
        **run_record.describe_environment(settings, shlex.join(["python", *sys.argv])),
    }
    run_record.write_json(output / "calibration.json", facts)
    plot(output / "calibration.png", rows, budgets)
    for entry in facts["table"]:
        ahead = entry["ahead_db"]
        means = f"achieved {entry['compute_budget']:.4f}, {entry['psnr']:.2f} dB, ahead {ahead['value']:+.2f}"
        where = f"({ahead['low']} to {ahead['high']}), on {entry['ahead_on']} of {entry['prompts']}"
        print(f"{entry['budget']:g} {entry['setting']}: {means} {where}")


if __name__ == "__main__":
    typer.run(main)
