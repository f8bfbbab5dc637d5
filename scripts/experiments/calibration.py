"""Beyond the paper: calibrated budgets against one budget for all, on whole videos of other prompts, at equal compute.

    python scripts/experiments/calibration.py --output benchmarks/experiments

As psa-tune does, the tuning prompts are run once each, and a schedule is made of what is measured in one dense step.
Then for every other prompt, from the same noise and with the same dense warm-up: dense; one budget for all sparse
calls; the schedule ("tuned", with the least weight of a step, see ``step_weights``); and budgets measured in that very
run ("in the run", ``enable_psa(pipe, calibrate=True)``). PSNR and SSIM are against the dense video. The least weight is
to be chosen by the prompts of part "select"; those of part "report" had no say in it. Writes calibration.csv (a row a
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
import torch
import typer
from harness import mean, pick, save_figure, write_rows
from video_metrics import psnr_of_videos, ssim_of_videos

from psa_diffusers import PSAConfig
from psa_diffusers.cli import pipeline, run_record
from psa_diffusers.cli.denoise import Generated, generate
from psa_diffusers.cli.generation import resolve_settings
from psa_diffusers.cli.settings import GenerationSettings
from psa_diffusers.integration.calibrating import Allocation, step_weights, tune_together
from psa_diffusers.metrics import mean_with_interval
from psa_diffusers.report.figure import new_figure

PROMPTS = Path(__file__).parents[1] / "demo_model" / "eval_prompts.txt"
UNIFORM, IN_RUN = "one budget", "in the run"
SELECT, REPORT = "select", "report"


def read_prompts(tuning: int, selecting: int, reported: int) -> tuple[list[str], dict[str, str]]:
    """The first ones are for tuning; of the others each with the part that it belongs to, the last ones to select."""
    lines = [line.split("\t")[-1] for line in PROMPTS.read_text().splitlines() if line and line[0] != "#"]
    parts = {prompt: REPORT for prompt in lines[tuning : tuning + reported]}
    return lines[:tuning], {**dict.fromkeys(lines[len(lines) - selecting :], SELECT), **parts}


def measured(pipe: Any, settings: GenerationSettings, prompts: list[str]) -> list[list[Allocation]]:
    """What psa-tune would measure."""
    runs = [
        generate(pipe, prompt, settings, sparse=True, quiet=True, calibrate=True, decode=False) for prompt in prompts
    ]
    return [run.statistics.calibration.allocations for run in runs]


def tuned_config(pipe: Any, config: PSAConfig, found: list[list[Allocation]], total: int, least: float) -> PSAConfig:
    """What psa-tune would write."""
    weights = step_weights(pipe.scheduler, total, least)
    return replace(config, budget_schedule=tune_together(found, weights, config.compute_budget, total).schedule)


def row_of(facts: dict[str, Any], dense: Generated, run: Generated, device: str) -> dict[str, Any]:
    videos = [torch.from_numpy(made.frames)[None].to(device) for made in (dense, run)]
    return {
        **facts,
        "compute_budget": round(run.statistics.compute_budget_sparse, 5),
        "psnr": round(psnr_of_videos(*videos)[0], 4),
        "ssim": round(ssim_of_videos(*videos)[0], 6),
        "seconds": round(run.total_seconds, 3),
        "seconds_measuring": round(run.statistics.calibration_seconds, 3),
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means of each part, budget and setting, and by how much it is ahead of one budget, prompt by prompt."""
    table = []
    for part, budget, setting in dict.fromkeys((row["part"], row["budget"], row["setting"]) for row in rows):
        base = {row["prompt"]: row["psnr"] for row in pick(rows, budget=budget, setting=UNIFORM)}
        own = pick(rows, part=part, budget=budget, setting=setting)
        gains = [row["psnr"] - base[row["prompt"]] for row in own]
        means = ("compute_budget", "psnr", "ssim", "seconds", "seconds_measuring")
        table.append(
            {
                **{"part": part, "budget": budget, "setting": setting, "prompts": len(own)},
                **{name: mean(row[name] for row in own) for name in means},
                "ahead_db": asdict(mean_with_interval(gains, [row["prompt"] for row in own], 0.95)),
                "ahead_on": sum(gain > 0 for gain in gains),
            }
        )
    return table


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    figure = new_figure(4.6 * len(budgets), 4.2)
    for axes, budget in zip(figure.subplots(1, len(budgets), squeeze=False)[0], budgets, strict=True):
        own = pick(rows, part=REPORT, budget=budget)
        base = [row["psnr"] for row in pick(own, setting=UNIFORM)]
        for setting in dict.fromkeys(row["setting"] for row in own if row["setting"] != UNIFORM):
            axes.plot(base, [row["psnr"] for row in pick(own, setting=setting)], "o", label=setting)
        axes.plot([min(base), max(base)], [min(base), max(base)], color="gray", linewidth=1)
        axes.set(title=f"compute budget {budget:g}", xlabel="PSNR, one budget for all (dB)", ylabel="PSNR (dB)")
        axes.legend(frameon=False)
    save_figure(path, figure)


def main(
    output: Annotated[Path, typer.Option(help="Folder for the results.")],
    model: Annotated[str | None, typer.Option(help="Model; default the bundled one.")] = None,
    tuning: Annotated[int, typer.Option(help="Prompts to measure for the schedule.")] = 2,
    selecting: Annotated[int, typer.Option(help="Other prompts, to choose the least weight.")] = 8,
    reported: Annotated[int, typer.Option(help="Other prompts, to report.")] = 16,
    budget: Annotated[list[float] | None, typer.Option(help="Mean compute budgets. Default 0.15.")] = None,
    least: Annotated[list[float] | None, typer.Option(help="Least weights of steps. Default 0.3, 0.6, 1, 2.")] = None,
    steps: Annotated[int | None, typer.Option()] = None,
    height: Annotated[int | None, typer.Option()] = None,
    width: Annotated[int | None, typer.Option()] = None,
    num_frames: Annotated[int | None, typer.Option()] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    device: Annotated[str | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
) -> None:
    source, budgets = pipeline.find_model(model), budget or [0.15]
    video = {"num_inference_steps": steps, "height": height, "width": width, "num_frames": num_frames}
    settings = resolve_settings(source, PSAConfig(), video, (device, dtype, "none"), seed)
    pipe = pipeline.load_pipeline(source, settings.dtype, settings.device)
    for_tuning, prompts = read_prompts(tuning, selecting, reported)
    configs: dict[tuple[float, str], PSAConfig] = {}
    for b in budgets:
        config = PSAConfig(compute_budget=b)
        found = measured(pipe, replace(settings, config=config), for_tuning)
        configs[b, UNIFORM] = configs[b, IN_RUN] = config
        for one in least or [0.3, 0.6, 1.0, 2.0]:
            configs[b, f"tuned, {one:g}"] = tuned_config(pipe, config, found, settings.steps, one)
    rows = []
    for number, (prompt, part) in enumerate(prompts.items(), start=1):
        dense = generate(pipe, prompt, settings, sparse=False, quiet=True)
        for (b, setting), config in configs.items():
            own = replace(settings, config=config)
            run = generate(pipe, prompt, own, sparse=True, quiet=True, calibrate=setting == IN_RUN)
            facts = {"part": part, "prompt": prompt, "budget": b, "setting": setting}
            rows.append(row_of(facts, dense, run, settings.device))
        last = ", ".join(f"{row['setting']}: {row['psnr']:.2f}" for row in rows[-len(configs) :])
        print(f"{number} of {len(prompts)} ({part}): {last}", file=sys.stderr, flush=True)
        write_rows(output / "calibration.csv", rows)
    facts = {
        "table": summary(rows),
        "configs": {f"{b:g}, {setting}": config.to_dict() for (b, setting), config in configs.items()},
        "tuning_prompts": for_tuning,
        "settings": settings.to_dict(),
        "model": source.identity(),
        **run_record.describe_environment(settings, shlex.join(["python", *sys.argv])),
    }
    run_record.write_json(output / "calibration.json", facts)
    plot(output / "calibration.png", rows)
    for entry in facts["table"]:
        ahead = entry["ahead_db"]
        means = f"achieved {entry['compute_budget']:.4f}, {entry['psnr']:.2f} dB, ahead {ahead['value']:+.2f}"
        where = f"({ahead['low']} to {ahead['high']}), on {entry['ahead_on']} of {entry['prompts']}"
        print(f"{entry['part']}, {entry['budget']:g}, {entry['setting']}: {means} {where}")


if __name__ == "__main__":
    typer.run(main)
