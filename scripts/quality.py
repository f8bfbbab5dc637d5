"""Quality at equal compute budgets: how close each rule stays to dense attention, on the bundled model.

For every prompt one dense video and one for each method and budget, all from the same noise, with the same dense
kernel and the same dense warm-up; PSNR and SSIM are against the dense video. Methods share importance, order and blocks
(those of the default config). The default rule takes the budget as a setting. Each other method keeps its published
settings but for one factor, which brings its plans to that budget on the attention calls of the default's run for the
same prompt; nothing is tuned for quality. Where shares of a row jump over the budget, the method gets the more.

Example: python scripts/quality.py --output benchmarks/quality

Writes quality.csv (a row a prompt, method and budget), quality.json (means, settings, versions, the command) and
quality.md (the table). Stopped runs go on where they were.
"""

from __future__ import annotations

import csv
import json
import math
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import numpy as np
import typer

from psa_diffusers import PSAConfig
from psa_diffusers.cli import pipeline, run_record
from psa_diffusers.cli.denoise import generate
from psa_diffusers.cli.generation import resolve_settings
from psa_diffusers.cli.settings import GenerationSettings
from psa_diffusers.integration import capture_attention
from psa_diffusers.metrics import psnr, ssim
from psa_diffusers.metrics.video_io import whole_file
from psa_diffusers.report.equal_budget import BUDGET_RULE, METHODS, SCALED, calibrate

PROMPTS = Path(__file__).parent / "demo_model" / "eval_prompts.txt"
COLUMNS = ("prompt", "seed", "method", "budget", "achieved", "achieved_all", "psnr", "ssim", "seconds", "config")


@dataclass(frozen=True)
class Experiment:
    """A loaded model and what to run on it."""

    pipe: Any
    settings: GenerationSettings
    folder: Path
    quiet: bool

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr)

    def run(self, prompt: str, config: PSAConfig | None):
        settings = self.settings if config is None else replace(self.settings, config=config)
        return generate(self.pipe, prompt, settings, sparse=config is not None, quiet=self.quiet)


def read_prompts(path: Path, count: int) -> list[str]:
    """The first ``count`` prompts; of a line with tabs the last column."""
    lines = [line.split("\t")[-1] for line in path.read_text().splitlines() if line.strip() and line[0] != "#"]
    if len(lines) < count:
        raise typer.BadParameter(f"{path} holds {len(lines)} prompts, but {count} are needed.")
    return lines[:count]


def record_calls(experiment: Experiment, prompt: str, every: int) -> list:
    """One default run; of its attention calls every ``every``-th, as functions config -> compute budget."""
    with capture_attention(experiment.pipe, every=every) as calls:
        experiment.run(prompt, experiment.settings.config)
    return [lambda config, call=call: call.plan(config).compute_budget for call in calls]


def calibrated(experiment: Experiment, prompt: str, wanted: list[tuple[str, float]], every: int) -> dict:
    """{(method, budget): config} for a prompt; kept on disk, since finding them takes a minute."""
    identity = json.dumps({"prompt": prompt, "every": every, **experiment.settings.to_dict()}, sort_keys=True)
    file = experiment.folder / "calibration" / f"{run_record.digest(identity)}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(file.read_text()) if file.is_file() else {}
    missing = [(method, budget) for method, budget in wanted if f"{method} @ {budget}" not in found]
    calls = record_calls(experiment, prompt, every) if any(method in SCALED for method, _ in missing) else []
    for method, budget in missing:
        config = calibrate(method, budget, experiment.settings.config, calls)
        found[f"{method} @ {budget}"] = config.to_dict()
        experiment.say(f"{method} @ {budget}: {config.level_thresholds or config.level_fractions or ''}")
    run_record.write_json(file, found)
    return {(method, budget): PSAConfig.from_dict(found[f"{method} @ {budget}"]) for method, budget in wanted}


def dense_video(experiment: Experiment, prompt: str) -> np.ndarray:
    """The dense frames of a prompt, kept on disk between runs."""
    identity = json.dumps({"prompt": prompt, **experiment.settings.to_dict()}, sort_keys=True)
    file = experiment.folder / "dense" / f"{run_record.digest(identity)}.npy"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        frames = experiment.run(prompt, None).frames
        with whole_file(file) as partial:
            np.save(partial, frames)
    return np.load(file)


def read_rows(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def measure(experiment: Experiment, prompt: str, method: str, budget: float, config: PSAConfig) -> dict[str, Any]:
    dense, sparse = dense_video(experiment, prompt), experiment.run(prompt, config)
    return {
        "prompt": prompt,
        "seed": experiment.settings.seed,
        "method": method,
        "budget": budget,
        "achieved": sparse.statistics.compute_budget_sparse,
        "achieved_all": sparse.statistics.compute_budget_all,
        "psnr": psnr(dense, sparse.frames),
        "ssim": ssim(dense, sparse.frames),
        "seconds": sparse.total_seconds,
        "config": json.dumps(config.to_dict(), sort_keys=True),
    }


def finite(value: float | None) -> float | None:
    """JSON has no infinity: a mean over a video that is identical to the dense one becomes null."""
    return value if value is not None and math.isfinite(value) else None


def summarise(rows: list[dict[str, Any]], methods: list[str], budgets: list[float]) -> list[dict[str, Any]]:
    """Means over the prompts, and how the default does against each method prompt by prompt."""
    table = []
    for budget in budgets:
        best = {row["prompt"]: row for row in rows if row["budget"] == budget and row["method"] == BUDGET_RULE}
        for method in methods:
            chosen = [row for row in rows if row["budget"] == budget and row["method"] == method]
            if not chosen:
                continue
            values = {name: [row[name] for row in chosen] for name in ("psnr", "ssim", "achieved")}
            gains = [best[row["prompt"]]["psnr"] - row["psnr"] for row in chosen if row["prompt"] in best]
            table.append(
                {
                    "method": method,
                    "budget": budget,
                    "prompts": len(chosen),
                    "achieved": fmean(values["achieved"]),
                    "psnr": finite(fmean(values["psnr"])),
                    "psnr_stdev": stdev(values["psnr"]) if len(chosen) > 1 and finite(sum(values["psnr"])) else None,
                    "ssim": fmean(values["ssim"]),
                    "default_ahead_db": finite(fmean(gains)) if gains else None,
                    "default_ahead_in": sum(gain > 0 for gain in gains),
                }
            )
    return table


def markdown(table: list[dict[str, Any]]) -> str:
    lines = ["| asked | method | achieved | PSNR dB | SSIM | default ahead by | on |", "|---|---|---|---|---|---|---|"]
    for row in table:
        ahead, on = f"{row['default_ahead_db'] or 0:+.2f} dB", f"{row['default_ahead_in']} of {row['prompts']}"
        ahead, on = ("", "") if row["method"] == BUDGET_RULE else (ahead, on)
        ratio = "identical" if row["psnr"] is None else f"{row['psnr']:.2f}"
        figures = f"{row['achieved']:.3f} | {ratio} | {row['ssim']:.4f}"
        lines.append(f"| {row['budget']:g} | {row['method']} | {figures} | {ahead} | {on} |")
    return "\n".join(lines) + "\n"


def main(
    output: Annotated[Path, typer.Option(help="Folder for the results.")],
    model: Annotated[str | None, typer.Option(help="Model; default the bundled one.")] = None,
    prompts_file: Annotated[Path, typer.Option(help="Prompts, one a line (last column).")] = PROMPTS,
    limit: Annotated[int, typer.Option(help="Prompts to report.")] = 8,
    every: Annotated[int, typer.Option(help="To find the factors use one attention call in this many.")] = 7,
    budget: Annotated[list[float] | None, typer.Option(help="Compute budgets. Default 0.15 and 0.25.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Methods. Default all.")] = None,
    steps: Annotated[int | None, typer.Option()] = None,
    height: Annotated[int | None, typer.Option()] = None,
    width: Annotated[int | None, typer.Option()] = None,
    num_frames: Annotated[int | None, typer.Option()] = None,
    guidance_scale: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    device: Annotated[str | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    config: Annotated[Path | None, typer.Option(help="Blocks, importance and order for all methods.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    source = pipeline.find_model(model)
    video = {"num_inference_steps": steps, "height": height, "width": width, "num_frames": num_frames}
    video["guidance_scale"] = guidance_scale
    base = PSAConfig.load(config) if config else PSAConfig()
    settings = resolve_settings(source, base, video, (device, dtype, "none"), seed)
    budgets, methods = budget or [0.15, 0.25], method or list(METHODS)
    prompts = read_prompts(prompts_file, limit)
    output.mkdir(parents=True, exist_ok=True)
    pipe = pipeline.load_pipeline(source, settings.dtype, settings.device)
    experiment = Experiment(pipe, settings, output, quiet)
    rows = measure_all(experiment, prompts, [(name, at) for at in budgets for name in methods], every)
    table = summarise(rows, methods, budgets)
    command = shlex.join(["python", *sys.argv])
    facts = {"table": table, "settings": settings.to_dict(), "prompts": prompts, "model": source.identity()}
    run_record.write_json(output / "quality.json", {**facts, **run_record.describe_environment(settings, command)})
    (output / "quality.md").write_text(markdown(table))
    print(markdown(table))


def measure_all(
    experiment: Experiment, prompts: list[str], wanted: list[tuple[str, float]], every: int
) -> list[dict[str, Any]]:
    """Every row, from the file where it is there already; each is written as soon as it is measured."""
    file = experiment.folder / "quality.csv"
    identity = run_record.digest(json.dumps(experiment.settings.to_dict(), sort_keys=True))
    columns = ("settings", "prompt", "method", "budget", "config")
    kept = {tuple(row[name] for name in columns): row for row in read_rows(file)}
    rows = []
    for number, prompt in enumerate(prompts, start=1):
        for (method, budget), config in calibrated(experiment, prompt, wanted, every).items():
            key = (identity, prompt, method, str(budget), json.dumps(config.to_dict(), sort_keys=True))
            if key not in kept:
                experiment.say(f'prompt {number} of {len(prompts)}, "{prompt}": {method} @ {budget}')
                kept[key] = {**measure(experiment, prompt, method, budget, config), "settings": identity}
                append_row(file, kept[key])
            row = kept[key]
            names = ("budget", "achieved", "achieved_all", "psnr", "ssim", "seconds")
            rows.append({**row, **{name: float(row[name]) for name in names}})
    return rows


def append_row(file: Path, row: dict[str, Any]) -> None:
    new = not file.is_file()
    with file.open("a", newline="") as lines:
        writer = csv.DictWriter(lines, (*COLUMNS, "settings"))
        if new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    typer.run(main)
