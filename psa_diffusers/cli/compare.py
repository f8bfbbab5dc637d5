"""psa-compare: how close sparse videos stay to dense ones, and what they save, over prompts, seeds and settings."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import command_line, run_command
from .generate import Offload

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = """Compare Pyramid Sparse Attention with dense attention: prompts x seeds x settings, from the same noise.

Example: psa-compare --preset default,psa-3 --compute-budget 0.25 --seeds 0,1 --output outputs/compare

Writes report.html, compare.json, totals.csv, clips.csv, frames.csv and the videos. A run that was stopped goes on where
it was. Dense videos are kept beside the output folder, by content, for the next comparison.
"""


def _option(help: str, *names: str, panel: str | None = None) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel)


@app.command(help=EXAMPLE)
def compare(
    context: typer.Context,
    prompt: Annotated[str | None, _option("A single prompt.", panel="Prompts")] = None,
    prompts_file: Annotated[Path | None, _option("A text file, one prompt a line.", panel="Prompts")] = None,
    prompt_set: Annotated[
        str | None, _option("A standard set in configs/prompts; an unknown name lists them.", panel="Prompts")
    ] = None,
    limit: Annotated[int | None, _option("Take the first so many prompts.", panel="Prompts")] = None,
    seeds: Annotated[str, _option("Seeds of the noise, by commas.", panel="Prompts")] = "0",
    negative_prompt: Annotated[str | None, _option("What to keep away from (with guidance above 1).")] = None,
    model: Annotated[str | None, _option("A text-to-video model in the diffusers layout: Hub id or folder.")] = None,
    output: Annotated[Path, _option("Folder for the results.")] = Path("outputs/compare"),
    preset: Annotated[str | None, _option("Named PSA configs, by commas.", panel="Settings")] = None,
    config: Annotated[
        list[Path] | None, _option("A PSA config file (YAML or JSON); may be given again.", panel="Settings")
    ] = None,
    compute_budget: Annotated[
        str | None, _option("The default config at these compute budgets, by commas.", panel="Settings")
    ] = None,
    steps: Annotated[int | None, _option("Denoising steps.", panel="Video")] = None,
    guidance_scale: Annotated[float | None, _option("Pull towards the prompt; 1 is none.", panel="Video")] = None,
    height: Annotated[int | None, _option("Pixels.", panel="Video")] = None,
    width: Annotated[int | None, _option("Pixels.", panel="Video")] = None,
    num_frames: Annotated[int | None, _option("Frames.", panel="Video")] = None,
    fps: Annotated[float | None, _option("Frames a second.", panel="Video")] = None,
    device: Annotated[
        str | None, _option("cpu, cuda, cuda:N or mps. Default: cuda, else cpu.", panel="Machine")
    ] = None,
    dtype: Annotated[str | None, _option("float32, float16 or bfloat16. Default: by device.", panel="Machine")] = None,
    offload: Annotated[Offload, _option("Keep parts of a large model off the GPU.", panel="Machine")] = Offload.none,
    lpips_weights: Annotated[Path | None, _option("AlexNet's weights, for LPIPS.", panel="Machine")] = None,
    cache: Annotated[
        Path | None, _option("Folder of dense videos. Default: dense-cache beside the output folder.", panel="Machine")
    ] = None,
    confidence: Annotated[float, _option("Of the intervals.")] = 0.95,
    vbench: Annotated[
        Path | None, _option("Also export the videos to this folder, laid out and named as VBench reads them.")
    ] = None,
    overwrite: Annotated[bool, _option("Make sparse videos anew that are there already.", "--overwrite")] = False,
    as_json: Annotated[bool, _option("Print compare.json, and nothing else, on stdout.", "--json")] = False,
    quiet: Annotated[bool, _option("No progress bar, no remarks.", "--quiet", "-q")] = False,
    debug: Annotated[bool, _option("Show the traceback of an error.", "--debug")] = False,
) -> None:
    from . import comparing
    from .comparison_job import prepare
    from .processes import find_processes
    from .summary import show_comparison

    processes = context.with_resource(find_processes(device, "psa-compare"))
    silent = quiet or not processes.is_main
    say = (lambda text: None) if silent else partial(typer.echo, err=True)
    make_job = partial(
        prepare,
        prompts=(prompt, prompts_file, prompt_set, limit),
        seeds=seeds,
        attention=(preset, config or [], compute_budget),
        model=model,
        video={
            "negative_prompt": negative_prompt,
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "height": height,
            "width": width,
            "num_frames": num_frames,
            "fps": fps,
        },
        machine=(device, dtype, offload.value),
        lpips_weights=lpips_weights,
        folders=(output, cache, vbench),
        confidence=confidence,
        overwrite=overwrite,
        command=command_line("psa-compare", context.obj),
        processes=processes,
    )
    job = processes.together(make_job)[processes.index]
    todo = processes.together(lambda: comparing.plan(job) if processes.is_main else None)[0]
    processes.together(lambda: comparing.run(job, todo, processes, say=say, quiet=silent))
    results = processes.together(lambda: comparing.finish(job, say=say) if processes.is_main else None)[0]
    if not processes.is_main:
        return
    if as_json:
        typer.echo(json.dumps(results, indent=2, allow_nan=False))
    elif not quiet:
        show_comparison(results)


def main() -> None:
    """Console script."""
    sys.exit(run_command("psa-compare", app))


if __name__ == "__main__":
    main()
