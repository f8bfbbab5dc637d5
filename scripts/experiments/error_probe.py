"""Beyond the paper: how well a few queries, computed in full, tell the error of a call: what a target error needs.

    python scripts/experiments/error_probe.py --captures runs/captures --every 3

For each case and budget the relative error of the whole output, and of ROWS queries spread over the sequence, all heads
together; ``ratio`` is the second over the first. The error is read off the output here; planning would get it from the
same two products that fit the value correction.
"""

import _laboratory  # noqa: F401
from block_policies import budget_rule
from experiment import arguments_of, report_cases
from harness import errors, pick, save_figure, write_rows

from psa_diffusers import PSAConfig
from psa_diffusers.planning import value_gain
from psa_diffusers.report.figure import new_figure

ROWS = (16, 64)
POLICY = budget_rule(PSAConfig(value_correction="fitted"))


def main() -> None:
    arguments, rows = arguments_of(__doc__), []
    for case in report_cases(arguments):
        for budget in arguments.budgets:
            result = POLICY(case, budget)
            true = errors(case, result)["error"]
            for count in ROWS:
                value_gain.ROWS = count
                chosen = value_gain.sampled_rows(case.tokens, seed=1)
                lost = (result.output[:, chosen] - case.dense[:, chosen]).double().norm()
                seen = float(lost / case.dense[:, chosen].double().norm())
                facts = {"source": case.source, "case": case.name, "budget": budget, "rows": count}
                rows.append({**facts, "error": round(true, 6), "probe": round(seen, 6), "ratio": round(seen / true, 4)})
            value_gain.ROWS = 16
    write_rows(arguments.output / "error_probe.csv", rows)
    figure = new_figure(4.6, 4.2)
    axes = figure.subplots()
    for count in ROWS:
        part = pick(rows, rows=count)
        ratios = sorted(row["ratio"] for row in part)
        print(f"{count} rows: ratio median {ratios[len(ratios) // 2]:.3f}, from {ratios[0]:.3f} to {ratios[-1]:.3f}")
        axes.plot([r["error"] for r in part], [r["probe"] for r in part], "o", markersize=4, label=f"{count} queries")
    line = [min(r["error"] for r in rows), max(r["error"] for r in rows)]
    axes.plot(line, line, color="gray", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="relative error of the call", ylabel="of the probe")
    axes.legend(frameon=False)
    save_figure(arguments.output / "error_probe.png", figure)


if __name__ == "__main__":
    main()
