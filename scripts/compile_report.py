"""Compiles every Triton kernel for every GPU target, without a GPU, and reports what the compilers made of them.

    python scripts/compile_report.py --jobs 2 --csv benchmarks/triton_compile.csv

Exit code 1 when a required case (fp16 and bf16, head dims 64, 96, 128) spills registers, needs more shared memory than
its target can launch with, misses wgmma on sm_90, or does not compile. Other cases are only reported.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import dataclasses
import json
import multiprocessing
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from psa_diffusers.backends.triton.inspection import KERNELS, TARGETS, Case, Report, report_case, report_cases

COLUMNS = [field.name for field in dataclasses.fields(Report)]


def main(arguments: list[str] | None = None) -> int:
    """Compiles, prints, writes; returns the exit code."""
    options = parse_arguments(arguments)
    cases = [
        case
        for case in report_cases()
        if case.target in options.targets
        and case.kernel in options.kernels
        and (case.is_required or not options.required_only)
    ]
    reports = compile_all(cases, options.jobs)
    if options.csv:
        write_csv(options.csv, reports)
    if options.json:
        print(json.dumps([dataclasses.asdict(report) for report in reports], indent=2))
    else:
        print_table(reports)
    failures = [report for report in reports if report.required and report.problem]
    for report in failures:
        print(f"FAILED {describe(report)}: {report.problem}", file=sys.stderr)
    return 1 if failures else 0


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), metavar="TARGET")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS), metavar="KERNEL")
    parser.add_argument("--required-only", action="store_true", help="leave out what is only reported")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time (default 1)")
    parser.add_argument("--csv", type=Path, help="also write the table here")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


def compile_all(cases: list[Case], jobs: int) -> list[Report]:
    """One report a case, in the order of the cases."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        return list(tqdm(pool.map(report_case, cases), total=len(cases), unit="kernel", file=sys.stderr))


def describe(report: Report) -> str:
    return f"{report.kernel} {report.target} {report.dtype} head dim {report.head_dim} blocks {report.blocks}"


def write_csv(path: Path, reports: list[Report]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(dataclasses.asdict(report) for report in reports)


def print_table(reports: list[Report]) -> None:
    rows = [COLUMNS] + [[str(value) for value in dataclasses.astuple(report)] for report in reports]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
