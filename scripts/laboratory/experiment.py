"""What the experiments on tensors share: run policies on the reporting cases, write the CSV file, the means, a plot."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from block_policies import Policy
from cases import REPORT, Case, all_cases
from harness import case_settings, common_arguments, geometric_mean, mean, measure, pick, save_figure, write_rows


def run(name: str, description: str | None, policies: Mapping[str, Policy], budgets: Iterable[float]) -> None:
    """A whole experiment: ``policies`` at ``budgets`` on all reporting cases; writes name.csv and name.png."""
    parser = common_arguments(description)
    parser.set_defaults(budgets=tuple(budgets))
    arguments = parser.parse_args()
    cases = all_cases(REPORT, arguments.captures, **case_settings(arguments))
    finish(arguments.output, name, list(measure(cases, policies, arguments.budgets)))


def finish(folder: Path, name: str, rows: list[dict[str, Any]], by: str = "budget") -> list[dict[str, Any]]:
    """Write the rows and the plot, print the means; ``by`` is what a plot's x axis shows."""
    write_rows(folder / f"{name}.csv", rows)
    table = means(rows, by)
    for row in table:
        print("  ".join(f"{value:.4f}" if isinstance(value, float) else str(value) for value in row.values()))
    save_figure(folder / f"{name}.png", draw(table, by))
    return table


def means(rows: list[dict[str, Any]], by: str = "budget") -> list[dict[str, Any]]:
    """Over the cases of each source, for every policy and value of ``by``."""
    table = []
    for source, value, policy in dict.fromkeys((row["source"], row[by], row["policy"]) for row in rows):
        group = pick(rows, source=source, policy=policy, **{by: value})
        table.append(
            {
                **{"source": source, by: value, "policy": policy, "cases": len(group)},
                "compute_budget": mean(row["compute_budget"] for row in group),
                "estimator": mean(row["estimator"] for row in group),
                "error": mean(row["error"] for row in group),
                "geometric": geometric_mean(row["error"] for row in group),
            }
        )
    return table


def draw(table: list[dict[str, Any]], by: str) -> Any:
    """A line a policy over ``by``, or bars where that has one value; a panel a source."""
    from psa_diffusers.report.figure import new_figure

    sources = list(dict.fromkeys(row["source"] for row in table))
    names = list(dict.fromkeys(row["policy"] for row in table))
    values = list(dict.fromkeys(row[by] for row in table))
    figure = new_figure(4.6 * len(sources) + 2.4, max(3.2, 0.24 * len(names) + 1.2))
    panels = figure.subplots(1, len(sources), squeeze=False, sharey=len(values) == 1)[0]
    for axes, source in zip(panels, sources, strict=True):
        part = pick(table, source=source)
        if len(values) == 1:
            axes.barh([row["policy"] for row in part][::-1], [row["error"] for row in part][::-1], color="#2c7fb8")
            axes.set(title=f"{source}, {by} {values[0]:g}", xlabel="mean relative error")
            continue
        for number, name in enumerate(names):
            line = sorted((row[by], row["error"]) for row in pick(part, policy=name))
            axes.plot(*zip(*line, strict=True), marker="osD^vPX*"[number % 8], markersize=4, label=name)
        axes.set(title=source, xlabel=by, ylabel="mean relative error", yscale="log")
        axes.grid(alpha=0.3, which="both")
    if len(values) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    return figure


def arguments_of(description: str | None) -> argparse.Namespace:
    return common_arguments(description).parse_args()


def report_cases(arguments: argparse.Namespace) -> Iterable[Case]:
    return all_cases(REPORT, arguments.captures, **case_settings(arguments))
