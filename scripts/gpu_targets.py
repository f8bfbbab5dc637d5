"""Says of each of the project's targets on a GPU what was measured, and whether floor and goal are met.

    python scripts/gpu_targets.py --rows benchmarks/attention_h200.csv \
        --transformer benchmarks/transformer_h200.csv --readme benchmarks/README.md

Reads what ``psa-bench --csv`` and ``scripts/time_transformer.py --csv`` wrote; of rows that were measured again the
last counts. With ``--readme`` the table goes between that file's markers. A target without a row is "not measured".
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from psa_diffusers.report.bench_plots import break_even, read_rows

BEGIN, END = "<!-- targets: written by scripts/gpu_targets.py -->", "<!-- end of targets -->"
WAN_14B, HEADS_14B = 75600, 40
SHORT_HEADS = 12  # of the rows over which the break-even length is sought
CORRECTIONS, ATTENTION = ("covariance", "logit_variance", "query_power"), "attention"
Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One line of the table."""

    name: str
    floor: float
    goal: float
    figure: float | None  # what is compared; None: not measured
    shown: str  # how it is written, with what else is worth knowing
    more_is_better: bool = True

    @property
    def verdict(self) -> str:
        if self.figure is None:
            return "not measured"
        reaches = (lambda aim: self.figure >= aim) if self.more_is_better else (lambda aim: self.figure <= aim)
        return "goal met" if reaches(self.goal) else "floor met" if reaches(self.floor) else "**missed**"


def main(arguments: list[str] | None = None) -> int:
    """Reads, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--transformer", type=Path)
    parser.add_argument("--readme", type=Path)
    options = parser.parse_args(arguments)
    rows = [row for row in read_rows(options.rows) if row["device"].startswith("cuda")]
    transformers = read_rows(options.transformer) if options.transformer and options.transformer.exists() else []
    if not rows:
        parser.error(f"{options.rows} holds no row of a GPU")
    text = table(targets(rows, transformers), rows)
    print(text)
    if options.readme:
        options.readme.write_text(replaced(options.readme.read_text(encoding="utf-8"), text), encoding="utf-8")
    return 0


def replaced(page: str, text: str) -> str:
    """The page with the text between its markers.

    Raises:
        ValueError: the page has no markers.
    """
    if BEGIN not in page or END not in page:
        raise ValueError(f"the page lacks the markers {BEGIN!r} and {END!r}.")
    before, rest = page.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}"


def table(found: Sequence[Target], rows: Sequence[Row]) -> str:
    """Markdown."""
    gpus, commits, torches = (sorted({row[name] for row in rows}) for name in ("device_name", "commit", "torch"))
    made = f"{', '.join(gpus)}; torch {', '.join(torches)}; commit {', '.join(c[:7] or 'unknown' for c in commits)}."
    lines = [made, "", "| target | floor | goal | measured | |", "| --- | --- | --- | --- | --- |"]
    for target in found:
        lines.append(f"| {target.name} | {target.floor:g} | {target.goal:g} | {target.shown} | {target.verdict} |")
    return "\n".join(lines)


def targets(rows: Sequence[Row], transformers: Sequence[Row]) -> list[Target]:
    """All lines, in the order in which they were set."""
    wan = {float(row["compute_budget"]): row for row in rows if _is_wan_14b(row)}
    at_15 = wan.get(0.15)
    return [
        _speedup(at_15, 0.15, 3.5, 5.0),
        _speedup(wan.get(0.25), 0.25, 2.2, 3.2),
        _kernel(at_15),
        _against_flex(wan.get(1.0)),
        _planning(at_15),
        _against_official(at_15),
        _against_naive(at_15),
        _break_even(rows),
        _memory(at_15, rows),
        _transformer([row for row in transformers if row["model"] == "wan2.1-14b-720p"]),
        _rounding(rows),
    ]


def _is_wan_14b(row: Row) -> bool:
    return row["rule"] == "budget" and (int(row["tokens"]), int(row["heads"])) == (WAN_14B, HEADS_14B)


def _json(row: Row | None, column: str) -> dict[str, Any]:
    return json.loads(row[column] or "{}") if row else {}


def _speedup(row: Row | None, budget: float, floor: float, goal: float) -> Target:
    name = f"attention of wan2.1-14b-720p at budget {budget:g}, everything included, over the best dense backend"
    if row is None:
        return Target(name, floor, goal, None, "")
    times = f"{1e3 * float(row['sparse_median']):.1f} ms against {1e3 * float(row['dense_median']):.1f}"
    figure = float(row["speedup"])
    return Target(name, floor, goal, figure, f"{figure:.2f}x ({times}, {row['dense_backend']}; {_gpu_speedup(row)})")


def _gpu_speedup(row: Row) -> str:
    return f"{float(row['gpu_speedup']):.2f}x without the host's time" if row["gpu_speedup"] else "host included"


def _kernel(row: Row | None) -> Target:
    name = "kernel alone at budget 0.15: useful TFLOP/s over the best dense backend's"
    if row is None or not row["kernel_tflops"]:
        return Target(name, 0.6, 0.85, None, "")
    ours, dense = float(row["kernel_tflops"]), float(row["dense_tflops"]) * float(row["dense_median"])
    dense /= float(row["gpu_dense"])
    return Target(name, 0.6, 0.85, ours / dense, f"{ours / dense:.2f} ({ours:.0f} against {dense:.0f})")


def _against_flex(row: Row | None) -> Target:
    name = "kernel alone at budget 1.0 over FlexAttention with the same mask"
    flex = _json(row, "rivals").get("flex, binary mask")
    if flex is None or not row["kernel_tflops"]:
        return Target(name, 1.0, 1.0, None, _json(row, "rivals_missing").get("flex, binary mask", ""))
    kernel = float(row["dense_tflops"]) * float(row["dense_median"]) / float(row["kernel_tflops"])
    whole = _json(row, "speedups")["flex, binary mask"]
    shown = f"{flex / kernel:.2f}x ({1e3 * kernel:.0f} ms against {1e3 * flex:.0f}; with the pyramid {whole:.2f}x)"
    return Target(name, 1.0, 1.0, flex / kernel, shown)


def _planning(row: Row | None) -> Target:
    name = "pyramid, importance and lists at 75,600 tokens, plan at every call: share of dense attention's time"
    stages = _json(row, "stages")
    if "dense" not in stages:
        return Target(name, 0.025, 0.015, None, "", more_is_better=False)
    dense = stages["dense"]["median"]
    kernels = {name: taken["median"] for name, taken in stages.items() if name.endswith("_kernel")}
    correction = sum(taken for name, taken in kernels.items() if name.startswith(CORRECTIONS))
    planning = sum(taken for name, taken in kernels.items() if ATTENTION not in name) - correction
    all_in = float(row["overhead_share"])
    shown = (
        f"{planning / dense:.1%} ({1e3 * planning:.1f} ms; the corrections take {correction / dense:.1%} more, "
        f"all but the attention kernel {all_in:.1%})"
    )
    return Target(name, 0.025, 0.015, planning / dense, shown, more_is_better=False)


def _against_official(row: Row | None) -> Target:
    name = "over the authors' full path at the same budget"
    speedups, errors = _json(row, "speedups"), _json(row, "rivals_error")
    if "official, whole" not in speedups:
        return Target(name, 3.0, 5.0, None, _json(row, "rivals_missing").get("official", ""))
    figure, kernel = speedups["official, whole"], speedups["official, plan given"]
    ours = float(row["relative_error"])
    shown = f"{figure:.2f}x (plan given {kernel:.2f}x; error {ours:.3f} against {errors['official, whole']:.3f})"
    return Target(name, 3.0, 5.0, figure, shown)


def _against_naive(row: Row | None) -> Target:
    name = "over naive PSA, plan given to both"
    speedups = _json(row, "speedups")
    if "naive psa, plan given" not in speedups:
        return Target(name, 5.0, 10.0, None, _json(row, "rivals_missing").get("naive psa", ""))
    figure, conservative = speedups["naive psa, plan given"], speedups["naive psa, plan and pyramid given"]
    shown = f"{figure:.2f}x ({conservative:.2f}x where naive PSA is given its pyramid too and ours is not"
    if row["naive_level_1"]:
        shown += f"; its kernel takes {float(row['naive_level_1']):.2f} of the other's time at level 1 alone"
    return Target(name, 5.0, 10.0, figure, f"{shown})")


def _break_even(rows: Sequence[Row]) -> Target:
    name = f"break-even length at budget 0.15, {SHORT_HEADS} x 128"
    series = [
        row
        for row in rows
        if row["rule"] == "budget" and row["text_tokens"] == "0" and float(row["compute_budget"]) == 0.15
        if (row["heads"], row["head_dim"]) == (str(SHORT_HEADS), "128")
    ]
    series = list({row["tokens"]: row for row in series}.values())
    if len(series) < 2:
        return Target(name, 6144, 2048, None, "", more_is_better=False)
    longest = max(int(row["tokens"]) for row in series)
    host = break_even(series)
    queued = [row for row in series if row["gpu_sparse"]]
    gpu = break_even(queued, "gpu_sparse", "gpu_dense") if queued else None
    shown = f"{_tokens(host, longest)} ({_tokens(gpu, longest)} without the host's time)"
    return Target(name, 6144, 2048, float("inf") if host is None else host, shown, more_is_better=False)


def _tokens(number: float | None, longest: int) -> str:
    return f"above {longest:,}" if number is None else f"{number:,.0f} tokens"


def _memory(row: Row | None, rows: Sequence[Row]) -> Target:
    name = "extra memory (pyramid, plan and all else, at its peak) over K and V at 75,600 tokens"
    if row is None:
        return Target(name, 1.9, 0.95, None, "", more_is_better=False)
    figure = float(row["peak_extra_over_kv"])
    others = {int(r["tokens"]): float(r["peak_extra_over_kv"]) for r in rows if r["heads"] == str(SHORT_HEADS)}
    shown = f"{figure:.2f}"
    if others:
        few = ", ".join(f"{others[tokens]:.2f} at {tokens:,}" for tokens in sorted(others, reverse=True))
        shown += f" (with {SHORT_HEADS} heads: {few})"
    return Target(name, 1.9, 0.95, figure, shown, more_is_better=False)


def _transformer(rows: Sequence[Row]) -> Target:
    name = "Wan2.1-14B-shaped transformer, 50 steps, 13 dense: share of the ceiling (composed from timed blocks)"
    if not rows:
        return Target(name, 0.85, 0.93, None, "")
    row = rows[-1]
    figure = float(row["share_of_ceiling"])
    shown = (
        f"{figure:.3f} ({float(row['run_speedup']):.3f}x of {float(row['ceiling']):.3f}x; attention is "
        f"{float(row['attention_share']):.3f} of a dense step)"
    )
    return Target(name, 0.85, 0.93, figure, shown)


def _rounding(rows: Sequence[Row]) -> Target:
    name = "error against float64 on the same plan over that of dense flash attention in bfloat16"
    found = [row for row in rows if row["error_ratio"] and row["dtype"] == "bfloat16"]
    if not found:
        return Target(name, 2.0, 1.2, None, "", more_is_better=False)
    worst = max(found, key=lambda row: float(row["error_ratio"]))
    figure, longest = float(worst["error_ratio"]), max(int(row["tokens"]) for row in found)
    shown = f"{figure:.2f}x at {int(worst['tokens']):,} tokens (the most of {len(found)} rows up to {longest:,} tokens)"
    return Target(name, 2.0, 1.2, figure, shown, more_is_better=False)


if __name__ == "__main__":
    sys.exit(main())
