"""Runs tests and writes down what came of it: a row a run, with the commit and the versions that it is about.

    python scripts/record_tests.py --csv benchmarks/test_runs.csv -- -m slow tests/backends

What follows -- goes to pytest. For what does not run at every change: the full matrices, and what needs a GPU. A run
that is stopped by Ctrl-C has "no" under finished, and the counts until then. The exit code is pytest's.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
COUNTS = ("tests", "failures", "errors", "skipped")
STOPPED = 2  # pytest's exit code
PACKAGES = ("torch", "triton", "diffusers", "transformers")


def read_counts(report: Path) -> dict[str, int]:
    """How many tests passed, failed (errors too) and were skipped, of pytest's JUnit report."""
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    found = [{name: int(suite.get(name, 0)) for name in COUNTS} for suite in suites]
    tests, failures, errors, skipped = (sum(suite[name] for suite in found) for name in COUNTS)
    return {"passed": tests - failures - errors - skipped, "failed": failures + errors, "skipped": skipped}


def run(command: list[str]) -> int:
    """The exit code. Ctrl-C is pytest's to hear: it writes its report then."""
    process = subprocess.Popen(command, cwd=ROOT)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def commit() -> str:
    """The commit that is checked out; with ``-dirty`` where tracked files differ from it."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude", "*"], cwd=ROOT, capture_output=True, text=True
    )
    return described.stdout.strip() or "unknown"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def write_row(path: Path, row: dict[str, object]) -> None:
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="file to add the row to")
    parser.add_argument("arguments", nargs="+", help="pytest's own, after --")
    options = parser.parse_args()
    before, start = commit(), datetime.datetime.now(datetime.timezone.utc)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", *options.arguments, f"--junitxml={report}"]
        code = run(command)
        if code not in (0, 1, STOPPED):  # no tests, or no such option
            return code
        counts = read_counts(report)
    seconds = (datetime.datetime.now(datetime.timezone.utc) - start).total_seconds()
    row = {"command": shlex.join(["pytest", *options.arguments]), **counts}
    row |= {"finished": "no" if code == STOPPED else "yes", "seconds": round(seconds)}
    row |= {"commit": before, "date": f"{start:%Y-%m-%d}", "device": device(), "python": platform.python_version()}
    write_row(options.csv, row | {package: version(package) for package in PACKAGES})
    return code


if __name__ == "__main__":
    sys.exit(main())
