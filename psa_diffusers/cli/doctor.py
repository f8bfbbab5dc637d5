"""psa-doctor: what Pyramid Sparse Attention would do on this machine, before anything is generated."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import FAILED, run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = """Say what Pyramid Sparse Attention would do here: backend, what would be sparse, and what that can be worth.

Example: psa-doctor --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --height 480 --width 832 --num-frames 81

Generates nothing and loads no weights: it reads a model's configuration files. Without --model it is about the small
trained model inside the package. Exit code 1: nothing would be sparse, with the reason.
"""


def _option(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help)


@app.command(help=EXAMPLE)
def doctor(
    model: Annotated[str | None, _option("A pipeline in the diffusers layout: Hub id or folder.")] = None,
    height: Annotated[int | None, _option("Pixels.")] = None,
    width: Annotated[int | None, _option("Pixels.")] = None,
    num_frames: Annotated[int | None, _option("Frames.")] = None,
    steps: Annotated[int | None, _option("Denoising steps.")] = None,
    preset: Annotated[str | None, _option("A named PSA config; an unknown name lists them.")] = None,
    config: Annotated[Path | None, _option("A PSA config file (YAML or JSON).")] = None,
    compute_budget: Annotated[float | None, _option("Share of dense attention's work, in (0, 1].")] = None,
    device: Annotated[str | None, _option("cpu, cuda, cuda:N or mps. Default: cuda, else cpu.")] = None,
    dtype: Annotated[str | None, _option("float32, float16 or bfloat16. Default: by device.")] = None,
    measure: Annotated[bool, _option("Also time one layer here, with random weights.", "--measure")] = False,
    as_json: Annotated[bool, _option("Print everything as JSON, and nothing else, on stdout.", "--json")] = False,
    debug: Annotated[bool, _option("Show the traceback of an error.", "--debug")] = False,
) -> int:
    from . import machine, pipeline, settings
    from .diagnosis import Question, diagnose, has_forecast, takes_any_frames

    psa_config = settings.read_config(preset, config, compute_budget)
    source = pipeline.find_model(model, any_pipeline=True)
    given = {"height": height, "width": width, "num_frames": num_frames, "num_inference_steps": steps}
    given = {name: value for name, value in given.items() if value is not None}
    size = {**settings.WAN_DEFAULTS, **source.defaults(), **given}
    chosen = machine.pick_device(device)
    settings.check_numbers(size["num_inference_steps"], size["guidance_scale"], size["fps"], 0)
    frames, rows, columns = size["num_frames"], size["height"], size["width"]
    if has_forecast(source.index):
        frame_step, multiples = pipeline.size_rules(source)
        settings.check_size(frames, rows, columns, 1 if takes_any_frames(source.index) else frame_step, multiples)
    question = Question(
        source=source,
        num_frames=frames,
        height=rows,
        width=columns,
        steps=size["num_inference_steps"],
        config=psa_config,
        device=chosen,
        dtype=machine.pick_dtype(dtype, chosen),
        measure=measure,
    )
    found = diagnose(question)
    typer.echo(json.dumps(found, indent=2, allow_nan=False) if as_json else "\n".join(in_words(found)))
    return 0 if found["sparse"] else FAILED


def in_words(found: dict[str, Any]) -> list[str]:
    """The report as lines."""
    lines = [*_machine(found), "", *_model(found), "", *_worth(found)]
    return [*lines, *(f"Problem: {problem}" for problem in found["problems"])]


def _machine(found: dict[str, Any]) -> list[str]:
    packages = {name: version for name, version in found["versions"].items() if version and name != "commit"}
    lines = [", ".join(f"{name} {version}" for name, version in packages.items())]
    for device in found["devices"]:
        threads = f", torch uses {found['threads']} threads" if device["device"] == "cpu" else ""
        memory = f", {device['memory_gib']:.0f} GiB" if "memory_gib" in device else ""
        capability = f", compute capability {device['compute_capability']}" if "compute_capability" in device else ""
        lines.append(f"{device['device']}: {device['name']}{threads}{memory}{capability}")
    if len(found["devices"]) == 1:
        lines.append("There is no GPU that torch can use.")
    backend = found["backend"] or "none"
    lines.append(f"Backend on {found['device']} in {found['dtype']}: {backend}. {found['backend_reason']}")
    return lines


def _model(found: dict[str, Any]) -> list[str]:
    size = f"{found['num_frames']} frames of {found['width']}x{found['height']}"
    lines = [f"{found['model']} ({found['pipeline']}), {size}, {found['steps']['total']} steps"]
    for part in found["transformers"]:
        name = f"{part['component']} ({part['class']})"
        if part.get("sparse_calls"):
            frames, rows, columns = part["grid"]
            lines.append(
                f"{name}: {part['sparse_calls']} self-attention calls sparse in a sparse step, over {part['tokens']:,} "
                f"tokens (grid {frames} x {rows} x {columns}), {part['heads']} heads x {part['head_dim']}."
            )
            if part["counted"]:
                lines.append(f"{name}: a forward is taken to see {part['counted']}.")
            for reason, calls in part["dense_reasons"].items():
                lines.append(f"{name}: {calls} self-attention calls dense: {reason}.")
        elif part["why_dense"]:
            lines.append(f"{name}: {part['why_dense']}")
        else:
            lines.append(f"{name}: {part['sparse_layers']} layers would be sparse. {part['no_forecast']}")
    steps = found["steps"]
    lines.append(f"Steps: {steps['dense']} dense, {steps['sparse']} sparse.")
    return [*lines, steps["note"]] if steps["note"] else lines


def _worth(found: dict[str, Any]) -> list[str]:
    estimate, measured = found["estimate"], found["measured"]
    if estimate is None:
        return ["No estimate of the speedup."]
    lines = [
        f"Self-attention is {estimate['attention_share']:.0%} of a step's floating-point operations (counted, not "
        "measured). Were all equally fast, the ceiling by Amdahl's law would be"
    ]
    if estimate["step"] is not None:
        lines.append(
            f"  {estimate['step']:.2f}x for a sparse step and {estimate['run']:.2f}x for all steps, at compute budget "
            f"{estimate['compute_budget']:.2f};"
        )
    lines.append(
        f"  {estimate['free_attention_step']:.2f}x and {estimate['free_attention_run']:.2f}x if attention cost nothing."
    )
    if estimate["above_asked"] is not None:
        lines.append(
            f"The compute budget is above the {estimate['above_asked']:.2f} asked for: text and conditioning stay at "
            "full resolution."
        )
    lines.append(f"Not in it: {', '.join(estimate['not_counted'])}.")
    if measured and "skipped" in measured:
        lines.append(f"Not measured: {measured['skipped']}")
    elif measured:
        lines.append(
            f"Measured here, one layer with random weights: dense {measured['dense']:.3f} s, attention being "
            f"{measured['attention_share']:.0%} of it; sparse {measured['sparse']:.3f} s, planning being "
            f"{measured['planning']:.3f} of it. That is {measured['step']:.2f}x for a sparse step and "
            f"{measured['run']:.2f}x for all steps."
        )
    return lines


def main() -> None:
    """Console script."""
    sys.exit(run_command("psa-doctor", app))


if __name__ == "__main__":
    main()
