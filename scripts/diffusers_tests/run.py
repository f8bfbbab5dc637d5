"""diffusers' own model tests, natively and with PSA enabled: the same must pass.

    git clone https://github.com/huggingface/diffusers && git -C diffusers checkout v0.40.0
    python scripts/diffusers_tests/run.py diffusers --csv benchmarks/diffusers_tests.csv

Tests come from the checkout, diffusers itself from the environment. A test file counts only with sparse calls in it:
without them it would prove nothing. The exit code is 1 if a test passes natively and not with PSA.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import diffusers
import torch

from psa_diffusers.cli.run_record import commit
from psa_diffusers.integration.models import known_transformers

HERE = Path(__file__).resolve().parent
FOLDER = Path("tests", "models", "transformers")


def test_files(checkout: Path, names: list[str]) -> list[Path]:
    """The test files of the transformers that PSA knows, or those with one of these names."""
    files = sorted((checkout / FOLDER).glob("test_models_transformer_*.py"))
    if not files:
        sys.exit(f"{checkout} is no checkout of diffusers: there is no {FOLDER}.")
    if names:
        return [file for file in files if file.stem.removeprefix("test_models_transformer_") in names]
    return [file for file in files if any(f"return {name}\n" in file.read_text() for name in known_transformers())]


def run(checkout: Path, file: Path, enable: bool, arguments: list[str]) -> dict:
    """Outcomes by test, sparse calls by test, dense calls by reason."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PSA_TESTS_ENABLE": str(int(enable)),
            "PSA_TESTS_REPORT": str(report),
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "plugin", "-p", "no:cacheprovider", "--tb=short"]
        command += [str(file.relative_to(checkout)), *arguments]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        found = json.loads(report.read_text()) if report.exists() else {"outcomes": {}}
        if not found["outcomes"]:
            sys.exit(f"{file.name} did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return found | {"output": done.stdout}


def checked_out(checkout: Path) -> str:
    """The commit of a checkout; empty where it is none."""
    asked = ["git", "-C", str(checkout), "rev-parse", "--show-toplevel", "HEAD"]
    done = subprocess.run(asked, capture_output=True, text=True)
    top, _, found = done.stdout.strip().partition("\n")
    return found if done.returncode == 0 and Path(top) == checkout else ""


def row_of(name: str, native: dict, sparse: dict, tests_commit: str) -> tuple[dict, list[str]]:
    """The row of a test file, and the tests whose outcome PSA changes."""
    before, after = native["outcomes"], sparse["outcomes"]
    changed = sorted(test for test in before.keys() | after.keys() if before.get(test) != after.get(test))
    worse = [test for test in changed if before.get(test) == "passed"]
    counts = {"native": Counter(before.values()), "psa": Counter(after.values())}
    row = {"tests": name}
    for way in counts:
        row |= {f"{way}_{outcome}": counts[way][outcome] for outcome in ("passed", "failed", "skipped")}
    row |= {
        "passed_natively_only": len(worse),
        "tests_with_sparse_calls": len(sparse["sparse_calls"]),
        "sparse_calls": sum(sparse["sparse_calls"].values()),
        "dense_calls": sum(sparse["dense_calls"].values()),
        "dense_reasons": "; ".join(f"{reason}: {calls}" for reason, calls in sorted(sparse["dense_calls"].items())),
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "commit": commit(),
        "tests_commit": tests_commit,
    }
    return row, worse


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of a clone of diffusers, at about the installed version")
    parser.add_argument("--models", nargs="*", default=[], help="e.g. wan wan_vace; default: all that PSA knows")
    parser.add_argument("--csv", type=Path, help="file to write")
    parser.add_argument("--verbose", action="store_true", help="print the reports of tests that PSA makes fail")
    options, rest = parser.parse_known_args()
    checkout, rows, fine = options.checkout.resolve(), [], True
    tests_commit = checked_out(checkout)
    for file in test_files(checkout, options.models):
        native, sparse = (run(checkout, file, enable, rest) for enable in (False, True))
        row, worse = row_of(file.stem.removeprefix("test_models_transformer_"), native, sparse, tests_commit)
        fine &= not worse and row["sparse_calls"] > 0
        rows.append(row)
        print(json.dumps(row), *(f"  only natively: {test}" for test in worse), sep="\n", flush=True)
        if options.verbose and worse:
            print(sparse["output"])
        if options.csv:  # file by file, so that an interrupted run keeps what it has
            write_csv(options.csv, rows)
    return 0 if fine and rows else 1


if __name__ == "__main__":
    sys.exit(main())
