"""psa-bench: sparse attention against dense attention, on this machine."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .bench_output import append_csv, check_csv, check_plot, describe_row, environment_of, rows_to_draw, save_plot, show
from .errors import WrongUsageError, as_wrong_usage, run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

EXAMPLE = """Time Pyramid Sparse Attention, planning included, against dense attention.

Example: psa-bench --tokens 8192,16384 --compute-budget 0.15 --csv benchmarks/attention_cpu.csv

Inputs are random with the structure of a video's. Dense is the fastest dense attention of this machine: torch's own on
a CPU; on a GPU each of torch's kernels is timed, and FlashAttention-3 if it is installed. All take turns in one run.

Times are those of a caller: a GPU is idle when a call begins, and waits for the host. --stages adds those of the GPU
alone, kernel by kernel.
"""
DTYPES = ("float32", "float16", "bfloat16", "float64")


def _option(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help)


@app.command(help=EXAMPLE)
def bench(
    tokens: Annotated[str, _option("Sequence lengths, separated by commas.")] = "8192",
    grid: Annotated[str | None, _option("Instead: the video's tokens as FRAMESxHEIGHTxWIDTH, by commas.")] = None,
    shape: Annotated[str | None, _option("Instead: a model's call with its heads, by commas; ? lists them.")] = None,
    compute_budget: Annotated[str | None, _option("Compute budgets, by commas. Default: the config's.")] = None,
    heads: Annotated[int, _option("Attention heads.")] = 4,
    head_dim: Annotated[int, _option("Width of a head.")] = 64,
    batch: Annotated[int, _option("Samples.")] = 1,
    dtype: Annotated[str, _option(f"By commas: {', '.join(DTYPES)}.")] = "float32",
    device: Annotated[str, _option("cpu, cuda or cuda:N.")] = "cpu",
    preset: Annotated[str | None, _option("A named PSA config; an unknown name lists them.")] = None,
    flex: Annotated[bool, _option("Also FlexAttention with a binary mask.", "--flex")] = False,
    naive: Annotated[bool, _option("Also naive PSA: a launch a level, tile = pooled block.", "--naive")] = False,
    official: Annotated[Path | None, _option("Also the authors' code: a checkout of their repository.")] = None,
    stages: Annotated[bool, _option("Also GPU time alone, kernel by kernel.", "--stages")] = False,
    rounding: Annotated[bool, _option("Also errors against float64, on the same plan.", "--rounding")] = False,
    backend: Annotated[str, _option("auto, triton, torch or reference.")] = "auto",
    repeats: Annotated[int, _option("How often each is timed.")] = 10,
    threads: Annotated[int | None, _option("CPU threads. Default: torch's.")] = None,
    seed: Annotated[int, _option("Seed of the inputs.")] = 0,
    csv_file: Annotated[Path | None, _option("Append the rows to this file.", "--csv")] = None,
    plot: Annotated[Path | None, _option("Draw time against length and budget: .png, .svg or .pdf.")] = None,
    draw_only: Annotated[bool, _option("Measure nothing: --plot what --csv holds.", "--draw-only")] = False,
    as_json: Annotated[bool, _option("Print the rows as JSON, and nothing else, on stdout.", "--json")] = False,
    quiet: Annotated[bool, _option("No progress bar.", "--quiet", "-q")] = False,
    debug: Annotated[bool, _option("Show the traceback of an error.", "--debug")] = False,
) -> None:
    import torch
    from tqdm import tqdm

    from ..benchmark import Extras, measure

    counts = {"heads": heads, "head-dim": head_dim, "batch": batch, "repeats": repeats, "threads": threads}
    for name, number in counts.items():
        if number is not None and number < 1:
            raise WrongUsageError(f"--{name} must be at least 1, but is {number}.")
    _check_files(csv_file, plot, official, draw_only)
    if draw_only:
        save_plot(rows_to_draw(csv_file, []), plot)
        return
    calls = _named_calls(shape) if shape is not None else []
    if shape is None:
        calls = [{"grid": sizes, "heads": heads, "head_dim": head_dim} for sizes in _grids(tokens, grid)]
    cases = _cases(calls, compute_budget, preset, backend, dtype.split(","), device)
    cases = [replace(case, batch=batch, seed=seed) for case in cases]
    if threads is not None:
        torch.set_num_threads(threads)
    extras = Extras(flex=flex, naive=naive, official=official, stages=stages, rounding=rounding)
    environment, rows = environment_of(device), []
    with tqdm(total=len(cases) * repeats, disable=quiet, unit="repeat", leave=False) as bar:
        for case in cases:
            bar.set_description(f"{case.tokens} tokens, {case.dtype}")
            with as_wrong_usage(ValueError):
                rows.append(describe_row(case, measure(case, repeats, bar.update, extras), environment))
            if csv_file is not None:  # row by row, so that Ctrl-C loses only what is not finished
                append_csv(csv_file, rows[-1])
    if as_json:
        typer.echo(json.dumps(rows, indent=2, allow_nan=False))
    else:
        show(rows)
    if plot is not None:
        save_plot(rows_to_draw(csv_file, rows), plot)


def _check_files(csv_file: Path | None, plot: Path | None, official: Path | None, draw_only: bool) -> None:
    if csv_file is not None:
        check_csv(csv_file)
    if plot is not None:
        check_plot(plot)
    if draw_only and (plot is None or csv_file is None or not csv_file.is_file()):
        raise WrongUsageError("--draw-only needs --plot FILE, and --csv with a file that is there.")
    if official is not None:
        from ..benchmark.official import find_package

        with as_wrong_usage(ValueError, hint="Give its folder by --official."):
            find_package(official)


def _named_calls(names: str) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from ..benchmark import SHAPES

    unknown = [name for name in names.split(",") if name not in SHAPES]
    if unknown:
        raise WrongUsageError(f"--shape must be of {', '.join(SHAPES)}, but is {', '.join(unknown)}.")
    return [asdict(SHAPES[name]) for name in names.split(",")]


def _grids(tokens: str, grid: str | None) -> list[tuple[int, int, int]]:
    from ..benchmark import grid_of

    if grid:
        return [_sizes(text) for text in grid.split(",")]
    return [grid_of(number) for number in _numbers(tokens, int, "tokens")]


def _cases(
    calls: list[dict[str, Any]], budgets: str | None, preset: str | None, backend: str, dtypes: list[str], device: str
) -> list:
    """Every call x dtype x compute budget."""
    from ..benchmark import BenchCase
    from ..config import PSAConfig

    for dtype in dtypes:
        if dtype not in DTYPES:
            raise WrongUsageError(f"--dtype must be one of {', '.join(DTYPES)}, but is {dtype!r}.")
    _check_device(device)
    with as_wrong_usage(ValueError):
        config = replace(PSAConfig() if preset is None else PSAConfig.preset(preset), backend=backend)
        configs = [config]
        if budgets is not None:
            configs = [replace(config, compute_budget=x) for x in _numbers(budgets, float, "compute-budget")]
    return [BenchCase(**call, config=c, dtype=t, device=device) for call in calls for t in dtypes for c in configs]


def _numbers(text: str, kind: type, name: str) -> list:
    try:
        numbers = [kind(item) for item in text.split(",")]
    except ValueError as error:
        raise WrongUsageError(f"--{name} must be numbers separated by commas, but is {text!r}.") from error
    if min(numbers) <= 0:
        raise WrongUsageError(f"--{name} must be above 0, but is {text!r}.")
    return numbers


def _sizes(text: str) -> tuple[int, int, int]:
    sizes = text.lower().split("x")
    if len(sizes) != 3 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise WrongUsageError(f"--grid must be FRAMESxHEIGHTxWIDTH, e.g. 8x32x32, but is {text!r}.")
    frames, height, width = (int(size) for size in sizes)
    return frames, height, width


def _check_device(device: str) -> None:
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise WrongUsageError(f"--device must be cpu, cuda or cuda:N, but is {device!r}.") from error
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise WrongUsageError(f"--device {device} is not on this machine; use --device cpu.")


def main() -> None:
    """Console script."""
    sys.exit(run_command("psa-bench", app))


if __name__ == "__main__":
    main()
