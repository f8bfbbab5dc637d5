"""psa-generate: a video from a prompt, by Pyramid Sparse Attention."""

from __future__ import annotations

import json
import sys
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import command_line, run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = """Generate a video from a prompt with Pyramid Sparse Attention.

Example: psa-generate --prompt "a red circle moves right on a blue background" --compare --output outputs/first

Without --model it uses the small trained model inside the package. Writes video.mp4 and run.json.
"""


class Offload(str, Enum):
    """Where the parts of the model wait until they are needed."""

    none = "none"
    model = "model"
    sequential = "sequential"


def _option(help: str, *names: str, panel: str | None = None) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel)


@app.command(help=EXAMPLE)
def generate(
    context: typer.Context,
    prompt: Annotated[str | None, _option("What to draw.")] = None,
    prompts_file: Annotated[
        Path | None, _option("A text file, one prompt a line; one numbered sub-folder each.")
    ] = None,
    negative_prompt: Annotated[str | None, _option("What to keep away from (with guidance above 1).")] = None,
    model: Annotated[str | None, _option("A Wan model in the diffusers layout: Hub id or folder.")] = None,
    output: Annotated[Path | None, _option("Folder for the files. Default: outputs/<prompt>-seed<seed>.")] = None,
    compare: Annotated[
        bool, _option("Also run dense attention from the same noise, and measure both.", "--compare")
    ] = False,
    preset: Annotated[str | None, _option("A named PSA config; an unknown name lists them.", panel="Attention")] = None,
    config: Annotated[Path | None, _option("A PSA config file (YAML or JSON).", panel="Attention")] = None,
    compute_budget: Annotated[
        float | None,
        _option("Share of dense attention's work, in (0, 1]; higher is slower, closer.", panel="Attention"),
    ] = None,
    steps: Annotated[int | None, _option("Denoising steps.", panel="Video")] = None,
    guidance_scale: Annotated[float | None, _option("Pull towards the prompt; 1 is none.", panel="Video")] = None,
    height: Annotated[int | None, _option("Pixels.", panel="Video")] = None,
    width: Annotated[int | None, _option("Pixels.", panel="Video")] = None,
    num_frames: Annotated[int | None, _option("Frames.", panel="Video")] = None,
    fps: Annotated[float | None, _option("Frames a second.", panel="Video")] = None,
    seed: Annotated[int, _option("Seed of the noise: the same seed gives the same video.", panel="Video")] = 0,
    device: Annotated[
        str | None, _option("cpu, cuda, cuda:N or mps. Default: cuda, else cpu.", panel="Machine")
    ] = None,
    dtype: Annotated[str | None, _option("float32, float16 or bfloat16. Default: by device.", panel="Machine")] = None,
    offload: Annotated[Offload, _option("Keep parts of a large model off the GPU.", panel="Machine")] = Offload.none,
    lpips_weights: Annotated[
        Path | None, _option("AlexNet's weights, for LPIPS with --compare.", panel="Machine")
    ] = None,
    overwrite: Annotated[bool, _option("Replace files that are there already.", "--overwrite")] = False,
    as_json: Annotated[bool, _option("Print the record as JSON, and nothing else, on stdout.", "--json")] = False,
    quiet: Annotated[bool, _option("No progress bar, no remarks.", "--quiet", "-q")] = False,
    debug: Annotated[bool, _option("Show the traceback of an error.", "--debug")] = False,
) -> None:
    from . import generation
    from .processes import find_processes
    from .summary import show

    processes = context.with_resource(find_processes(device))
    prepare = partial(
        generation.prepare,
        prompts=(prompt, prompts_file),
        attention=(preset, config, compute_budget),
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
        seed=seed,
        compare=compare,
        lpips_weights=lpips_weights,
        output=output,
        overwrite=overwrite,
        command=command_line("psa-generate", context.obj),
        processes=processes,
    )
    silent = quiet or not processes.is_main
    say = (lambda text: None) if silent else partial(typer.echo, err=True)
    job = processes.together(prepare)[processes.index]
    folders = processes.together(lambda: generation.plan(job) if processes.is_main else None)[0]
    shares = processes.together(lambda: generation.run(job, folders, processes, say=say, quiet=silent))
    records = [record for _, record in sorted(item for share in shares for item in share.items())]
    if not processes.is_main:
        return
    if as_json:
        typer.echo(json.dumps(records if prompts_file else records[0], indent=2, allow_nan=False))
    elif not quiet:
        for record in records:
            show(record)


def main() -> None:
    """Console script."""
    sys.exit(run_command("psa-generate", app))


if __name__ == "__main__":
    main()
