"""What psa-generate says at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def show(record: dict[str, Any]) -> None:
    """Print a record for people: where the files are, and the figures."""
    console = Console()
    console.print(_comparison_table(record) if "speedup" in record else _run_table(record))
    for fallback in record["fallbacks"]:
        console.print(f"Stayed dense in {fallback['calls']} calls: {fallback['reason']}", soft_wrap=True, markup=False)
    for note in record["notes"]:
        console.print(note, soft_wrap=True, markup=False)
    for warning, count in record["warnings"].items():
        console.print(f"Warning: {count} {warning}", soft_wrap=True, markup=False)
    files = ", ".join(record["files"].values())
    console.print(f"{Path(record['folder'])}: {files}, run.json", soft_wrap=True, markup=False, highlight=False)


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def _run_table(record: dict[str, Any]) -> Table:
    table = Table("", "steps", "seconds a step", title="Pyramid Sparse Attention", title_justify="left")
    for kind in ("dense", "sparse"):
        seconds = _number(record[f"seconds_per_{kind}_step"], 2)
        table.add_row(f"{kind} steps", str(record[f"{kind}_steps"]), seconds)
    table.caption = f"compute budget {_number(record['compute_budget_sparse_calls'], 3)} over the sparse calls, "
    table.caption += f"{_number(record['compute_budget_all_calls'], 3)} over all; {record['backend']} backend"
    return table


def _comparison_table(record: dict[str, Any]) -> Table:
    table = Table("sparse against dense, same noise", "", title_justify="left")
    infinite = "identical" if record["identical"] else _number(record["psnr"], 2, " dB")
    lpips = _number(record["lpips"], 4) if record["lpips"] is not None else f"null: {record['lpips_reason']}"
    rows = {
        "PSNR": infinite,
        "SSIM": _number(record["ssim"], 4),
        "LPIPS": lpips,
        "seconds a dense step": _number(record["dense_run"]["seconds_per_step"], 3),
        "seconds a sparse step": _number(record["seconds_per_sparse_step"], 3),
        "speedup of sparse steps": _number(record["speedup_sparse_steps"], 2, "x"),
        "speedup of the whole run": _number(record["speedup"], 2, "x"),
        "compute budget, sparse calls": _number(record["compute_budget_sparse_calls"], 3),
        "compute budget, all calls": _number(record["compute_budget_all_calls"], 3),
        "steps": f"{record['dense_steps']} dense, {record['sparse_steps']} sparse",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
