"""The error of one denoising step: how far sparse attention moves the model's output, by setting.

Records the transformer's calls in a dense run of the bundled model, computes chosen ones again with each setting (all
layers sparse), and prints the relative error of the guided output.

Example: python scripts/step_error.py --output benchmarks/experiments/step_error.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import typer

from psa_diffusers import PSAConfig
from psa_diffusers.demo import load_pipeline, model_defaults, model_folder
from psa_diffusers.metrics.video_io import whole_file
from psa_diffusers.report.step_error import record_steps, settings_at, step_error

PROMPTS = [
    "an orange square falls on a white background",
    "a blue circle rises on a black background",
    "a green triangle moves left on a yellow background",
]


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Prompts. Default three.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of the dense run.")] = 8,
    step: Annotated[list[int] | None, typer.Option(help="Steps to look at, from 0. Default 2, 4 and 6.")] = None,
    budget: Annotated[list[float] | None, typer.Option(help="Compute budgets. Default 0.15 and 0.25.")] = None,
    guidance_scale: Annotated[float, typer.Option()] = 3.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
) -> None:
    pipe, rows = load_pipeline(), []
    defaults = model_defaults(model_folder())
    run = {name: defaults[name] for name in ("num_frames", "height", "width")} | {"num_inference_steps": steps}
    for text in prompt or PROMPTS:
        recorded = record_steps(pipe, text, guidance_scale=guidance_scale, seed=seed, **run)
        for number in step or [2, 4, 6]:
            for at in budget or [0.15, 0.25]:
                settings = settings_at(at)
                settings["the same, value_correction=fitted"] = PSAConfig(compute_budget=at, value_correction="fitted")
                for name, config in settings.items():
                    found = step_error(pipe, recorded[number], config)
                    row = {"budget": at, "setting": name, "prompt": text, "step": number}
                    rows.append({**row, "achieved": found.compute_budget, "error": found.error})
    for at, name in dict.fromkeys((row["budget"], row["setting"]) for row in rows):
        errors = [row["error"] for row in rows if (row["budget"], row["setting"]) == (at, name)]
        print(f"{at:5g}  {name:42s} {fmean(errors):.4f}  (from {min(errors):.4f} to {max(errors):.4f})")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(output) as partial:
            facts = {"command": ["python", *sys.argv], "torch": torch.__version__, "rows": rows}
            partial.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
