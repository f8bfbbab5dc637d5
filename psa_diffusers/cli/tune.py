"""psa-tune: which compute budget each step and layer of a model deserves, measured in a normal run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import command_line, run_command
from .generate import Offload

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = """Measure where a model needs its compute budget, and write settings that spend it there.

Example: psa-tune --prompt "a red circle moves right on a blue background" --output outputs/tuned.yaml

Each prompt is one run. In its last dense step the error of every layer is measured at a few compute budgets, on some of
its queries; then the budgets of all sparse steps are chosen that make the least of the sum, at the same
compute budget on average; or, with --target-error, that have this total error at the least compute, which is checked in
one or two more runs. The file is for the model, size and number of steps that it names: --config of the other commands
and PSAConfig.load read it.
"""


def _option(help: str, *names: str, panel: str | None = None) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel)


@app.command(help=EXAMPLE)
def tune(
    context: typer.Context,
    prompt: Annotated[str | None, _option("What to draw in the run.")] = None,
    prompts_file: Annotated[Path | None, _option("A text file, one prompt a line: the mean over these runs.")] = None,
    negative_prompt: Annotated[str | None, _option("What to keep away from (with guidance above 1).")] = None,
    model: Annotated[str | None, _option("A Wan model in the diffusers layout: Hub id or folder.")] = None,
    output: Annotated[Path, _option("The file to write (.yaml).")] = Path("outputs/tuned.yaml"),
    preset: Annotated[str | None, _option("A named PSA config to start from.", panel="Attention")] = None,
    config: Annotated[Path | None, _option("A PSA config file to start from.", panel="Attention")] = None,
    compute_budget: Annotated[
        float | None, _option("Mean share of dense attention's work, in (0, 1].", panel="Attention")
    ] = None,
    target_error: Annotated[
        float | None,
        _option(
            "Instead: the total error, root mean square of the sparse calls' relative errors, in (0, 1).",
            panel="Attention",
        ),
    ] = None,
    by_layer: Annotated[
        bool,
        _option("Spread the budget over layers too, by their relative errors.", "--by-layer", panel="Attention"),
    ] = False,
    steps: Annotated[int | None, _option("Denoising steps.", panel="Video")] = None,
    guidance_scale: Annotated[float | None, _option("Pull towards the prompt; 1 is none.", panel="Video")] = None,
    height: Annotated[int | None, _option("Pixels.", panel="Video")] = None,
    width: Annotated[int | None, _option("Pixels.", panel="Video")] = None,
    num_frames: Annotated[int | None, _option("Frames.", panel="Video")] = None,
    seed: Annotated[int, _option("Seed of the noise.", panel="Video")] = 0,
    device: Annotated[
        str | None, _option("cpu, cuda, cuda:N or mps. Default: cuda, else cpu.", panel="Machine")
    ] = None,
    dtype: Annotated[str | None, _option("float32, float16 or bfloat16. Default: by device.", panel="Machine")] = None,
    offload: Annotated[Offload, _option("Keep parts of a large model off the GPU.", panel="Machine")] = Offload.none,
    overwrite: Annotated[bool, _option("Replace a file that is there already.", "--overwrite")] = False,
    as_json: Annotated[bool, _option("Print what was found as JSON, and nothing else, on stdout.", "--json")] = False,
    quiet: Annotated[bool, _option("No progress bar, no remarks.", "--quiet", "-q")] = False,
    debug: Annotated[bool, _option("Show the traceback of an error.", "--debug")] = False,
) -> None:
    from . import tuning

    job = tuning.prepare(
        prompts=(prompt, prompts_file),
        attention=(preset, config, compute_budget, target_error),
        model=model,
        video={
            "negative_prompt": negative_prompt,
            "num_inference_steps": steps,
            "guidance_scale": guidance_scale,
            "height": height,
            "width": width,
            "num_frames": num_frames,
        },
        machine=(device, dtype, offload.value),
        seed=seed,
        output=output,
        overwrite=overwrite,
        command=command_line("psa-tune", context.obj),
        by_layer=by_layer,
    )
    found = tuning.run(job, quiet=quiet)
    if as_json:
        typer.echo(json.dumps(found, indent=2, allow_nan=False))
    elif not quiet:
        typer.echo("\n".join(tuning.in_words(found)))


def main() -> None:
    """Console script."""
    sys.exit(run_command("psa-tune", app))


if __name__ == "__main__":
    main()
