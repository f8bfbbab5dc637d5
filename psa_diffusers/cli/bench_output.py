"""What psa-bench writes: rows as a CSV, as a table, as a plot."""

from __future__ import annotations

import csv
import datetime
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from .errors import CommandError, WrongUsageError, as_wrong_usage

PICTURES = (".png", ".svg", ".pdf")


def environment_of(device: str) -> dict[str, Any]:
    import torch

    from .run_record import device_name, versions

    found = versions()
    return {
        "device": device,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": found["torch"],
        "triton": found["triton"],
        "psa_diffusers": found["psa_diffusers"],
        "commit": found["commit"],
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def describe_row(case, figures: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    config = case.config
    sizes = {
        "tokens": case.tokens,
        "grid": "x".join(map(str, case.grid)),
        "text_tokens": case.text_tokens,
        "batch": case.batch,
        "heads": case.heads,
        "head_dim": case.head_dim,
        "dtype": case.dtype,
        "rule": config.rule,
        "compute_budget": config.compute_budget,
        "query_block_size": config.query_block_size,
        "kv_block_size": config.kv_block_size,
        "num_levels": config.num_levels,
        "seed": case.seed,
    }
    return {**sizes, **figures, **environment}


def check_csv(path: Path) -> None:
    if not path.resolve().parent.is_dir():
        raise WrongUsageError(f"there is no folder {path.parent} for --csv {path}.")
    if path.is_dir():
        raise WrongUsageError(f"--csv {path} is a folder; name a file.")
    _check_writable(path, "--csv")


def _check_writable(path: Path, option: str) -> None:
    """Before anything is measured."""
    if not os.access(path if path.exists() else path.resolve().parent, os.W_OK):
        raise WrongUsageError(f"cannot write to {path} (Permission denied). Name another file by {option}.")


def append_csv(path: Path, row: dict[str, Any]) -> None:
    """Append a row; a new file gets the column names first, and one with other columns is left alone."""
    is_new = not path.exists() or path.stat().st_size == 0
    if not is_new:
        with path.open(newline="", encoding="utf-8") as file:
            columns = next(csv.reader(file))
        if columns != list(row):
            raise WrongUsageError(f"{path} has other columns than this version writes; name a new file by --csv.")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow({name: f"{item:.6g}" if isinstance(item, float) else item for name, item in row.items()})


def check_plot(path: Path) -> None:
    if path.suffix not in PICTURES:
        raise WrongUsageError(f"--plot must end in {', '.join(PICTURES)}, but is {path}.")
    if not path.resolve().parent.is_dir():
        raise WrongUsageError(f"there is no folder {path.parent} for --plot {path}.")
    _check_writable(path, "--plot")
    if importlib.util.find_spec("matplotlib") is None:  # before anything is measured
        raise CommandError("--plot needs matplotlib: pip install 'psa-diffusers[notebooks]'.")


def rows_to_draw(csv_file: Path | None, measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All rows of the CSV, which those just measured are the last of; without one, what was measured."""
    from ..report.bench_plots import read_rows

    return measured if csv_file is None else read_rows(csv_file)


def save_plot(rows: list[dict[str, Any]], path: Path) -> None:
    from ..report.bench_plots import plot_benchmark

    with as_wrong_usage(ValueError, KeyError, hint="(--plot)"):
        figure = plot_benchmark(rows)
    figure.savefig(path, dpi=150)


def show(rows: list[dict[str, Any]]) -> None:
    """Tables: times, what else was timed, stages."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # a file has no width to keep to
        console.width = 120
    first = rows[0]
    _print(
        console, f"{first['device_name']}, {first['threads']} threads, torch {first['torch']}; milliseconds, medians"
    )
    console.print(_times(rows))
    for row in rows:
        title = f"{row['tokens']} tokens x {row['heads']} x {row['head_dim']}, budget {row['achieved_budget']:.3f}"
        others, missing = (json.loads(row[name]) for name in ("rivals", "rivals_missing"))
        if len(others) > 1:
            _print(console, f"{title}: ours against others, without our planning where they are given a plan")
            console.print(_others(row, others))
        if row["stages"]:
            on_gpu = row["device"].startswith("cuda")
            _print(console, f"{title}: stages{', the host left out' if on_gpu else ''}")
            console.print(_stages(json.loads(row["stages"])))
        for name, why in missing.items():
            _print(console, f"not timed: {name}: {why}")


def _print(console: Any, line: str) -> None:
    """As it is: a table's own title would be wrapped at the table's width."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _table(*names: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in names:
        table.add_column(name, justify="right")
    return table


def _times(rows: list[dict[str, Any]]) -> Any:
    sizes, times = ("tokens", "dtype", "backend", "budget"), ("dense", "plan", "attend")
    table = _table(*sizes, *times, "speedup", "ideal", "error", "memory/KV")
    for row in rows:
        memory = row["peak_extra_over_kv"]
        table.add_row(
            str(row["tokens"]),
            row["dtype"],
            row["backend"],
            f"{row['achieved_budget']:.3f}",
            *(f"{1e3 * row[f'{stage}_median']:.1f}" for stage in times),
            f"{row['speedup']:.2f}x",
            f"{row['ideal_speedup']:.2f}x",
            f"{row['relative_error']:.3f}",
            "-" if memory is None else f"{memory:.2f}",
        )
    return table


def _others(row: dict[str, Any], others: dict[str, float]) -> Any:
    budgets, errors, speedups = (json.loads(row[name]) for name in ("rivals_budget", "rivals_error", "speedups"))
    table = _table("other", "ms", "ours is faster", "budget", "error")
    for name, seconds in others.items():
        budget = f"{budgets[name]:.3f}" if name in budgets else "dense"
        error = f"{errors[name]:.3f}" if name in errors else "-"
        table.add_row(name, f"{1e3 * seconds:.2f}", f"{speedups[name]:.2f}x", budget, error)
    return table


def _stages(stages: dict[str, Any]) -> Any:
    table = _table("stage", "ms", "p20", "p80")
    for name, taken in stages.items():
        figures = taken.values() if isinstance(taken, dict) else [taken]
        table.add_row(name, *(f"{1e3 * seconds:.3f}" for seconds in figures))
    return table
