"""Figures of the page: fidelity against budget, PSNR over frames, where the time went, compute by step and layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..figure import new_figure
from ..measures import UNITS
from ..plots import MARKERS, plot_budgets

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_WIDTH = 0.04  # of the axis of budgets
PARTS = ("dense steps", "planning", "sparse attention", "rest of the sparse steps", "outside the steps")
_PART_COLOURS = ("#8a8f98", "#d55e00", "#0072b2", "#5fa8d3", "#b9a44c")


def plot_fidelity(entries: Sequence[Mapping[str, Any]], measure: str, curve: Sequence[str]) -> Figure:
    """A measure against the achieved compute budget, with intervals.

    Args:
        entries: Of ``totals``, without the dense one.
        measure: Its name in them.
        curve: The settings that differ in the budget alone, joined by a line.
    """
    figure = new_figure(6.4, 3.6)
    axes = figure.subplots()
    points = {entry["setting"]: (entry["compute_budget_sparse"], entry[measure]) for entry in entries}
    points = {name: pair for name, pair in points.items() if None not in (pair[0]["value"], pair[1]["value"])}
    line = sorted((points[name][0]["value"], points[name][1]["value"]) for name in curve if name in points)
    if len(line) > 1:
        axes.plot(*zip(*line, strict=True), color="#8a8f98", linewidth=1.2, zorder=1)
    for number, (name, (budget, value)) in enumerate(points.items()):
        errors = None
        if value["low"] is not None:
            errors = [[value["value"] - value["low"]], [value["high"] - value["value"]]]
        place = (budget["value"], value["value"])
        marker = MARKERS[number % len(MARKERS)]
        axes.errorbar(*place, yerr=errors, marker=marker, markersize=7, capsize=4, linestyle="", label=name)
        axes.annotate(name, place, xytext=(8, 5), textcoords="offset points", fontsize=9)
    axes.set(xlabel="compute budget of the sparse calls (dense = 1)", ylabel=UNITS[measure])
    axes.margins(x=0.18, y=0.15)
    _widen(axes, LEAST_WIDTH)
    axes.grid(alpha=0.25)
    return figure


def _widen(axes: Any, least: float) -> None:
    """Settings at next to the same budget would lie at both ends of an axis of millionths."""
    low, high = axes.get_xlim()
    missing = least - (high - low)
    if missing > 0:
        axes.set_xlim(low - missing / 2, high + missing / 2)


def plot_frames(curves: Mapping[str, Sequence[float | None]]) -> Figure:
    """PSNR of every frame, the mean over the clips; a line a setting. Frames identical in all clips have none."""
    figure = new_figure(6.4, 3.2)
    axes = figure.subplots()
    for number, (name, values) in enumerate(curves.items()):
        numbers = [float("nan") if value is None else value for value in values]
        axes.plot(range(1, len(numbers) + 1), numbers, marker=MARKERS[number % len(MARKERS)], markersize=4, label=name)
    axes.set(xlabel="frame", ylabel="PSNR, dB")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def plot_time(parts: Mapping[str, Mapping[str, float]]) -> Figure:
    """Seconds of a clip by part: a bar a setting, parts as in ``PARTS``."""
    figure = new_figure(6.4, 0.42 * len(parts) + 1.6)
    axes = figure.subplots()
    starts = [0.0] * len(parts)
    for part, colour in zip(PARTS, _PART_COLOURS, strict=True):
        widths = [values[part] for values in parts.values()]
        axes.barh(list(parts), widths, left=starts, color=colour, label=part)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds a clip")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def plot_calls(rows: Sequence[Sequence[Any]]) -> Figure:
    """The compute budget of every step and layer; rows of (step, layer, budget)."""
    return plot_budgets({(step, layer): budget for step, layer, budget in rows})


def time_parts(record: Mapping[str, Any]) -> dict[str, float]:
    """Where the seconds of a sparse clip went."""
    pairs = list(zip(record["kinds_of_steps"], record["seconds_of_steps"], strict=True))
    sparse = sum(seconds for kind, seconds in pairs if kind == "sparse")
    planning, attention = record["planning_seconds"], record["attention_seconds"]
    values = (
        sum(seconds for kind, seconds in pairs if kind != "sparse"),
        planning,
        attention,
        max(0.0, sparse - planning - attention),
        max(0.0, record["seconds_total"] - sum(record["seconds_of_steps"])),
    )
    return dict(zip(PARTS, values, strict=True))


def dense_time_parts(row: Mapping[str, Any], steps: Sequence[float]) -> dict[str, float]:
    """The same of a dense clip."""
    outside = max(0.0, row["seconds_total"] - sum(steps))
    return dict(zip(PARTS, (sum(steps), 0.0, 0.0, 0.0, outside), strict=True))


def mean_parts(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(values[name] for values in parts) / len(parts) for name in PARTS}
