"""Pictures of a benchmark's rows: time against length, and against compute budget, with the ideal line."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

# What two rows must share to be points of one line.
CALL = ("device_name", "dtype", "batch", "heads", "head_dim", "rule", "query_block_size", "kv_block_size", "num_levels")
DENSE, SPARSE = "#888888", "#1b6ca8"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV that ``psa-bench --csv`` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def break_even(rows: Sequence[Row], column: str = "sparse_median", dense: str = "dense_median") -> float | None:
    """Tokens from which on sparse attention is faster than dense, None if it is not at the largest length.

    Between two lengths by a straight line, of the logarithm of the ratio over that of the length; the smallest length
    if sparse attention is faster at all of them.
    """
    points = sorted((int(row["tokens"]), math.log(float(row[dense]) / float(row[column]))) for row in rows)
    if not points or points[-1][1] <= 0:
        return None
    last_slower = max((i for i, point in enumerate(points) if point[1] <= 0), default=None)
    if last_slower is None:
        return float(points[0][0])
    (short, below), (long, above) = points[last_slower : last_slower + 2]
    return short * (long / short) ** (-below / (above - below))


def plot_benchmark(rows: Sequence[Row]) -> Figure:
    """Two panels: over lengths, the series with the most of them at one budget; over budgets, likewise at one length.

    Each shows dense attention, sparse attention with its planning (bars from p20 to p80), and the ideal: dense
    attention's time times the compute budget. The right one also shows the other sparse attentions that were timed.

    Raises:
        ValueError: no two rows differ in length or in compute budget alone.
    """
    lengths = _largest_series(rows, "tokens", (*CALL, "text_tokens", "compute_budget"))
    budgets = _largest_series(rows, "compute_budget", (*CALL, "text_tokens", "tokens"))
    panels = [(_draw_lengths, lengths), (_draw_budgets, budgets)]
    panels = [(draw, series) for draw, series in panels if len(series) > 1]
    if not panels:
        raise ValueError("a plot needs rows of two lengths at one budget, or of two budgets at one length.")
    figure = new_figure(7.2 * len(panels), 4.2)
    from matplotlib.ticker import LogLocator

    for axes, (draw, series) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, series)
        axes.set(ylabel="milliseconds, median", yscale="log")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    first = panels[0][1][0]
    figure.suptitle(f"{first['device_name']}, {first['dtype']}, torch {first['torch']}", fontsize=9)
    return figure


def _largest_series(rows: Sequence[Row], along: str, fixed: Sequence[str]) -> list[Row]:
    """The rows that differ in ``along`` alone, of which there are most; in its order, a repeated one the last time."""
    series: dict[tuple, dict[float, Row]] = {}
    for row in rows:
        if row[along] not in (None, ""):
            series.setdefault(tuple(str(row[name]) for name in fixed), {})[float(row[along])] = row
    points = max(series.values(), key=len, default={})
    return [points[place] for place in sorted(points)]


def _draw_lengths(axes: Any, rows: Sequence[Row]) -> None:
    tokens = [int(row["tokens"]) for row in rows]
    _draw_times(axes, tokens, rows)
    if all(row.get("gpu_sparse") for row in rows):
        for column, colour, name in (("gpu_dense", DENSE, "dense"), ("gpu_sparse", SPARSE, "sparse")):
            label = f"{name}, without the host's time"
            axes.plot(tokens, [1e3 * float(row[column]) for row in rows], ":", color=colour, label=label)
    axes.set(xscale="log", xlabel="tokens")
    axes.set_title(f"compute budget {float(rows[0]['compute_budget']):g}, {_heads(rows[0])}", fontsize=9)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xticks(tokens, [f"{number:,}" for number in tokens], rotation=45, fontsize=7)
    axes.set_xticks([], minor=True)
    if (even := break_even(rows)) is not None:
        axes.axvline(even, color=SPARSE, linestyle=":", linewidth=1)
        axes.annotate(f"faster from {even:,.0f}", (even, 0.02), xycoords=("data", "axes fraction"), fontsize=7)


def _draw_budgets(axes: Any, rows: Sequence[Row]) -> None:
    budgets = [float(row["achieved_budget"]) for row in rows]
    _draw_times(axes, budgets, rows)
    others: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        seconds, reached = (json.loads(row[name] or "{}") for name in ("rivals", "rivals_budget"))
        for name, budget in reached.items():
            others.setdefault(name, []).append((budget, 1e3 * seconds[name]))
    for number, (name, points) in enumerate(others.items()):
        style = {"marker": "s^DvP*"[number % 6], "color": f"C{1 + number % 9}", "linewidth": 0.8}
        axes.plot(*zip(*sorted(points), strict=True), label=name, **style)
    axes.set(xscale="log", xlabel="compute budget (dense = 1)")
    axes.set_title(f"{int(rows[0]['tokens']):,} tokens, {_heads(rows[0])}", fontsize=9)
    axes.set_xticks(budgets, [f"{budget:.2g}" for budget in budgets])
    axes.set_xticks([], minor=True)


def _heads(row: Row) -> str:
    return f"{row['heads']} heads x {row['head_dim']}"


def _draw_times(axes: Any, places: Sequence[float], rows: Sequence[Row]) -> None:
    def times(column: str) -> list[float]:
        return [1e3 * float(row[column]) for row in rows]

    median = times("sparse_median")
    low, high = ([abs(m - t) for m, t in zip(median, times(f"sparse_{name}"), strict=True)] for name in ("p20", "p80"))
    axes.plot(places, times("dense_median"), "o-", color=DENSE, label=f"dense, {rows[-1]['dense_backend']}")
    axes.errorbar(places, median, [low, high], fmt="o-", color=SPARSE, capsize=2, label="sparse, planning included")
    ideal = [t * float(row["achieved_budget"]) for t, row in zip(times("dense_median"), rows, strict=True)]
    axes.plot(places, ideal, "--", color=SPARSE, linewidth=1, label="ideal: dense x budget")
