"""Beyond the paper: how well a plan meets a target error, and the two numbers that its estimate rests on.

    python scripts/experiments/target_error.py --captures runs/captures --every 3

For each case and target the plan by ``PSAConfig(target_error=...)``, its compute budget, and the error of the output:
the root mean square over heads of each head's relative error. ``estimate`` is what the planner held for the error
before ``FACTOR`` and ``POWER`` (``psa_diffusers/planning/target.py``); the two are fitted to the tuning cases, by least
squares of logarithms, where the plan is neither all centroids nor dense.
"""

from __future__ import annotations

import math
import sys

import _laboratory  # noqa: F401
import torch
from cases import REPORT, TUNING, Case, all_cases
from harness import case_settings, common_arguments, mean, pick, save_figure, write_rows

from psa_diffusers import PSAConfig, build_plan, pyramid_sparse_attention
from psa_diffusers.planning.target import FACTOR, POWER
from psa_diffusers.report.figure import new_figure

TARGETS = (0.02, 0.03, 0.05, 0.1, 0.2)


def error_of(case: Case, output: torch.Tensor) -> float:
    dense = case.dense.double()
    lost, power = (x.square().sum((1, 3)) for x in (output.double() - dense, dense))
    return float((lost / power).mean().sqrt())


def row_of(case: Case, part: str, target: float) -> dict:
    config = PSAConfig(target_error=target)
    plan = build_plan(*case.inputs, config, grid=case.grid)
    error = error_of(case, pyramid_sparse_attention(*case.inputs, config, plan=plan))
    free = 1.05 / config.kv_block_size < plan.compute_budget < 0.99
    return {
        **{"part": part, "source": case.source, "case": case.name, "target": target},
        "compute_budget": round(plan.compute_budget, 5),
        "error": round(error, 6),
        "ratio": round(error / target, 4),
        "estimate": round((target / FACTOR) ** (1 / POWER), 6),
        "free": free,
    }


def fit(rows: list[dict]) -> tuple[float, float]:
    """FACTOR and POWER by these rows."""
    logs = torch.tensor([[math.log(row["estimate"]), 1.0, math.log(row["error"])] for row in rows], dtype=torch.float64)
    power, factor = torch.linalg.lstsq(logs[:, :2], logs[:, 2:]).solution[:, 0].tolist()
    return math.exp(factor), power


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("--targets", type=float, nargs="+", default=TARGETS)
    arguments, rows = parser.parse_args(), []
    for part in (TUNING, REPORT):
        for case in all_cases(part, arguments.captures, **case_settings(arguments)):
            rows += [row_of(case, part, target) for target in arguments.targets]
            print(f"{part}: {case.name} done", file=sys.stderr, flush=True)
    write_rows(arguments.output / "target_error.csv", rows)
    print("FACTOR and POWER by the tuning cases: {:.3f}, {:.3f}".format(*fit(pick(rows, part=TUNING, free=True))))
    figure = new_figure(4.6, 4.2)
    axes = figure.subplots()
    for source in dict.fromkeys(row["source"] for row in rows):
        own = pick(rows, part=REPORT, source=source, free=True)
        ratios = sorted(row["ratio"] for row in own)
        spread = math.sqrt(mean(math.log(ratio) ** 2 for ratio in ratios))
        ends = f"median {ratios[len(ratios) // 2]:.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f}"
        print(f"{source}: error / target {ends}, typically off by {spread:.0%}, {len(ratios)} plans")
        axes.plot([row["target"] for row in own], [row["error"] for row in own], "o", markersize=4, label=source)
    line = [min(arguments.targets), max(arguments.targets)]
    axes.plot(line, line, color="gray", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="target error", ylabel="error")
    axes.legend(frameon=False)
    save_figure(arguments.output / "target_error.png", figure)


if __name__ == "__main__":
    main()
