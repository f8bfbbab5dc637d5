"""What psa-generate and psa-compare say at their end."""

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
    table.caption += f"{_number(record['compute_budget_all_calls'], 3)} over all; "
    table.caption += f"{record['backend']} backend" if record["backend"] else "nothing was sparse"
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


def show_comparison(results: dict[str, Any]) -> None:
    """Print the totals of a comparison, its notes, and where its files are."""
    console = Console()
    if not console.is_terminal:  # a file has no width to keep to
        console.width = 120
    dense = results["totals"][0]
    title = f"{_count(dense['clips'], 'clip')} of {_count(dense['prompts'], 'prompt')}; means"
    if results["totals"][1]["ssim"]["low"] is not None:
        title += f" with {results['confidence']:.0%} intervals"
    names = ("setting", "budget", "PSNR dB", "SSIM", "LPIPS", "flicker", "seconds", "speedup")
    table = Table(*names, title=title, title_justify="left")
    for entry in results["totals"]:
        table.add_row(
            entry["setting"],
            _interval(entry["compute_budget_sparse"], 3),
            _interval(entry["psnr"], 2) if not entry["identical"] else f"{entry['identical']} identical",
            *(_interval(entry[name], digits) for name, digits in (("ssim", 4), ("lpips", 4), ("flicker", 3))),
            _interval(entry["seconds"], 2),
            _interval(entry["speedup"], 2),
        )
    console.print(table)
    for note in results["notes"]:
        console.print(note, soft_wrap=True, markup=False)
    page = "report.html, " * (Path(results["folder"]) / "report.html").is_file()
    files = f"{page}compare.json, totals.csv, clips.csv, frames.csv, videos/"
    console.print(f"{results['folder']}: {files}", soft_wrap=True, markup=False, highlight=False)


def _interval(mean: dict[str, Any], digits: int) -> str:
    value, low, high = (_number(mean[name], digits) for name in ("value", "low", "high"))
    return value if mean["low"] is None else f"{value}\n{low} to {high}"


def _count(number: int, name: str) -> str:
    return f"{number} {name}" + "s" * (number != 1)
