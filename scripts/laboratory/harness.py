"""Measuring policies on cases, tables as CSV files, and what all scripts here share."""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from block_policies import Policy, Result
from cases import Case

from psa_diffusers.metrics.video_io import whole_file

BUDGETS = (0.05, 0.1, 0.15, 0.25)
RESULTS = Path("benchmarks/experiments")


def errors(case: Case, result: Result) -> dict[str, float]:
    """Relative error of the output (Euclidean norm) of all heads together, and of the worst head."""
    dense = case.dense.double()
    lost, norm = ((x).square().sum((0, 1, 3)) for x in (result.output.double() - dense, dense))
    return {"error": float((lost.sum() / norm.sum()).sqrt()), "worst_head": float((lost / norm).sqrt().amax())}


@torch.no_grad()
def measure(
    cases: Iterable[Case], policies: Mapping[str, Policy], budgets: Iterable[float] = BUDGETS, **facts: Any
) -> Iterator[dict[str, Any]]:
    """A row for each case, budget and policy."""
    for case in cases:
        for budget in budgets:
            for name, policy in policies.items():
                result = policy(case, budget)
                yield {
                    **facts,
                    "source": case.source,
                    "case": case.name,
                    "policy": name,
                    "budget": budget,
                    "compute_budget": round(result.compute_budget, 5),
                    "estimator": round(result.estimator, 5),
                    **{key: round(value, 6) for key, value in errors(case, result).items()},
                }
        print(f"{case.name} done", file=sys.stderr, flush=True)


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(mean(math.log(value) for value in values))


def pick(rows: Iterable[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Numbers as numbers."""

    def value(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text

    with path.open(newline="", encoding="utf-8") as file:
        return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def save_figure(path: Path, figure: Any) -> None:
    from psa_diffusers.report.figure import to_png

    with whole_file(path) as partial:
        partial.write_bytes(to_png(figure))


def common_arguments(description: str | None) -> argparse.ArgumentParser:
    """What every experiment on tensors takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captures", type=Path, help="Folder that capture.py wrote. Default: synthetic cases alone.")
    parser.add_argument("--grid", type=int, nargs=3, default=(8, 16, 32), metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1, help="Of the synthetic cases.")
    parser.add_argument("--every", type=int, default=1, help="Of the captured calls take every so many.")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS, help="Folder for the CSV file and the plot.")
    return parser


def case_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("heads", "head_dim", "seeds", "device", "every")
    return {"grid": tuple(arguments.grid), **{name: getattr(arguments, name) for name in names}}
