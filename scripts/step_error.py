"""The error of one denoising step: how far sparse attention moves the model's output, by setting.

Records the transformer's calls in a dense run of the bundled model, computes chosen ones again with each setting (all
layers sparse), and prints the relative error of the guided output. Unlike the PSNR of a whole video it does not depend
on what later steps make of an error, and it takes seconds: the measure to develop with.

Example: python scripts/step_error.py --output benchmarks/experiments/step_error.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import typer
from diffusers import DiffusionPipeline

from psa_diffusers import PSAConfig, disable_psa, enable_psa
from psa_diffusers.demo import model_defaults, model_folder
from psa_diffusers.integration.processor import installed_processors
from psa_diffusers.metrics.video_io import whole_file

PROMPTS = [
    "an orange square falls on a white background",
    "a blue circle rises on a black background",
    "a green triangle moves left on a yellow background",
]


def settings_at(budget: float) -> dict[str, PSAConfig]:
    """What is compared, at one compute budget; shares are the paper's PSA-3, scaled."""
    default = PSAConfig(compute_budget=budget)
    shares = tuple(share * budget / 0.25 for share in (0.15, 0.10, 0.20, 0.0))
    return {
        "budget rule (the default)": replace(default, value_correction="covariance"),
        "the same, value_correction=none": replace(default, value_correction="none"),
        "PSA-3 shares": PSAConfig(rule="topk", level_fractions=shares),
        "binary": PSAConfig(rule="topk", level_fractions=(budget, 0.0, 0.0, 0.0)),
    }


def record(pipe, prompt: str, steps: int, guidance_scale: float, seed: int) -> list[tuple[dict, dict]]:
    """The arguments of the transformer's two calls (prompt, no prompt) of each step of a dense run."""
    defaults, calls = model_defaults(model_folder()), []
    size = {name: defaults[name] for name in ("num_frames", "height", "width")}
    hook = pipe.transformer.register_forward_pre_hook(lambda *call: calls.append(call[2]), with_kwargs=True)
    try:
        pipe(
            prompt,
            **size,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        )
    finally:
        hook.remove()
    return list(zip(calls[::2], calls[1::2], strict=True))


@torch.no_grad()
def predict(pipe, calls: tuple[dict, dict], guidance_scale: float, config: PSAConfig | None = None) -> torch.Tensor:
    """The guided output of one denoising step, sparse throughout with a config."""
    if config is None:
        prompted, free = (pipe.transformer(**call)[0] for call in calls)
    else:
        enable_psa(pipe, replace(config, dense_warmup=0.0))
        with installed_processors([pipe.transformer])[0].step(0, 1):
            prompted, free = (pipe.transformer(**call)[0] for call in calls)
        disable_psa(pipe)
    return free + guidance_scale * (prompted - free)


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Prompts. Default three.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of the dense run.")] = 8,
    step: Annotated[list[int] | None, typer.Option(help="Steps to look at, from 0. Default 2, 4 and 6.")] = None,
    budget: Annotated[list[float] | None, typer.Option(help="Compute budgets. Default 0.15 and 0.25.")] = None,
    guidance_scale: Annotated[float, typer.Option()] = 3.0,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
) -> None:
    pipe, rows = DiffusionPipeline.from_pretrained(model_folder()), []
    chosen = step or [2, 4, 6]
    for text in prompt or PROMPTS:
        recorded = record(pipe, text, steps, guidance_scale, seed)
        for number in chosen:
            dense = predict(pipe, recorded[number], guidance_scale)
            for at in budget or [0.15, 0.25]:
                for name, config in settings_at(at).items():
                    sparse = predict(pipe, recorded[number], guidance_scale, config)
                    error = float((sparse - dense).norm() / dense.norm())
                    rows.append({"budget": at, "setting": name, "prompt": text, "step": number, "error": error})
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
