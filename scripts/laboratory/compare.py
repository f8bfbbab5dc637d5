"""All policies at equal compute on cases that none was tuned on: errors, ranks, a curve against the budget.

    python scripts/laboratory/compare.py --captures runs/captures --every 3

Takes tuning.json from the output folder. Writes policies.csv (a row a case, budget and policy), policies_summary.csv
(means over cases, ranks) and policies.png.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from block_policies import Policy, Result, oracle
from cases import REPORT, Case, all_cases
from harness import case_settings, common_arguments, geometric_mean, mean, measure, pick, save_figure, write_rows
from policies import OURS, PUBLISHED, families, published

ORACLE = "oracle (exact errors)"


def tuned(file: Path) -> dict[str, Policy]:
    """Each family with the variant that tuning chose for the case's source and the budget."""
    chosen, every = json.loads(file.read_text(encoding="utf-8")), families()

    def of_family(family: str) -> Policy:
        def policy(case: Case, budget: float) -> Result:
            by_budget = chosen[family][case.source]
            nearest = min(by_budget, key=lambda text: abs(float(text) - budget))
            return every[family][by_budget[nearest]](case, budget)

        return policy

    return {family: of_family(family) for family in every}


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over cases; ``against_paper`` is the mean error over that of the best published PSA setting."""
    table = []
    for source, budget in sorted({(row["source"], row["budget"]) for row in rows}):
        part = pick(rows, source=source, budget=budget)
        groups = {name: pick(part, policy=name) for name in dict.fromkeys(row["policy"] for row in part)}
        means = {name: mean(row["error"] for row in group) for name, group in groups.items()}
        paper = min(means[name] for name in PUBLISHED)
        ranked = sorted((name for name in means if name != ORACLE), key=means.get)
        for name, group in groups.items():
            table.append(
                {
                    **{"source": source, "budget": budget, "policy": name, "cases": len(group)},
                    "compute_budget": round(mean(row["compute_budget"] for row in group), 5),
                    "estimator": round(mean(row["estimator"] for row in group), 5),
                    "mean_error": round(means[name], 5),
                    "geometric_mean_error": round(geometric_mean(row["error"] for row in group), 5),
                    "worst_head": round(max(row["worst_head"] for row in group), 5),
                    "against_paper": round(means[name] / paper, 4),
                    "rank": ranked.index(name) + 1 if name in ranked else "",
                }
            )
    return table


def draw(table: list[dict[str, Any]]) -> Any:
    """Mean error against compute budget, one panel a source; the paper's presets as their best."""
    from psa_diffusers.report.figure import new_figure

    sources = sorted({row["source"] for row in table})
    figure = new_figure(5.2 * len(sources) + 2.4, 4.6)
    grid = figure.subplots(1, len(sources), squeeze=False)[0]
    for axes, source in zip(grid, sources, strict=True):
        part = pick(table, source=source)
        for number, name in enumerate(dict.fromkeys(row["policy"] for row in part)):
            if name in PUBLISHED[:-1]:
                continue
            curve = sorted((row["compute_budget"], row["mean_error"]) for row in pick(part, policy=name))
            bold = {"linewidth": 2.5, "color": "black"} if name == OURS else {"linewidth": 1.2}
            axes.plot(*zip(*curve, strict=True), marker="osD^vPX*<>hp"[number % 12], markersize=4, label=name, **bold)
        best = [
            (budget, min(row["mean_error"] for row in part if row["policy"] in PUBLISHED and row["budget"] == budget))
            for budget in sorted({row["budget"] for row in part})
        ]
        axes.plot(*zip(*best, strict=True), "--", color="gray", label="best published PSA setting")
        axes.set(title=source, xlabel="compute budget (dense = 1)", ylabel="mean relative error", yscale="log")
        axes.grid(alpha=0.3, which="both")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=7)
    return figure


def main() -> None:
    parser = common_arguments(__doc__)
    arguments = parser.parse_args()
    policies = {**tuned(arguments.output / "tuning.json"), **published(), ORACLE: oracle()}
    cases = all_cases(REPORT, arguments.captures, **case_settings(arguments))
    rows = list(measure(cases, policies, arguments.budgets))
    write_rows(arguments.output / "policies.csv", rows)
    table = summarise(rows)
    write_rows(arguments.output / "policies_summary.csv", table)
    save_figure(arguments.output / "policies.png", draw(table))


if __name__ == "__main__":
    main()
