"""Writes the least time of every stage beside the measured one, from rows that ``psa-bench --stages`` wrote.

    python scripts/roofline.py --rows benchmarks/attention_h200.csv --csv benchmarks/roofline_h200.csv

``least_ms`` is the largest of three: matrix products, memory, exponentials (``psa_diffusers/benchmark/roofline.py``
says what is counted); ``share_of_limit`` is the least time over the measured one. Stages without a limit are only
measured.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from psa_diffusers.benchmark.roofline import Call, roofline_rows
from psa_diffusers.config import PSAConfig

CALL = ("device_name", "tokens", "heads", "head_dim", "achieved_budget", "commit")
STAGE = (
    *("stage", "gflop", "gigabytes", "giga_exponentials"),
    *("least_ms, matrix products", "least_ms, memory", "least_ms, exponentials"),
    *("bound_by", "least_ms", "measured_ms", "share_of_limit"),
)


def main(arguments: list[str] | None = None) -> int:
    """Reads, counts, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="CSV of psa-bench --stages on a GPU")
    parser.add_argument("--csv", type=Path, help="write the table here")
    options = parser.parse_args(arguments)
    with options.rows.open(newline="", encoding="utf-8") as file:
        measured = [row for row in csv.DictReader(file) if row["gpu_dense"] and row["batch"] == "1"]
    if not measured:
        parser.error(f"{options.rows} holds no row of one sample with stages on a GPU")
    rows = [line for row in measured for line in stages_of(row)]
    for row in rows:
        print(*(row[name] for name in ("tokens", "heads", "stage", "bound_by", "least_ms", "measured_ms")), sep="\t")
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*CALL, *STAGE], lineterminator="\n", restval="")
            writer.writeheader()
            writer.writerows(rows)
    return 0


def stages_of(row: dict[str, str]) -> list[dict[str, object]]:
    """The table's lines for one row of the benchmark; numbers to four digits."""
    sizes = {name: int(row[name]) for name in ("query_block_size", "kv_block_size", "num_levels")}
    config = PSAConfig(**sizes)
    call = Call(int(row["tokens"]), int(row["heads"]), int(row["head_dim"]), float(row["achieved_budget"]), config)
    found = roofline_rows(call, row["device_name"], json.loads(row["stages"]))
    return [{name: row[name] for name in CALL} | {name: _short(line.get(name)) for name in STAGE} for line in found]


def _short(value: object) -> object:
    if value is None:
        return ""
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
