"""Beyond the paper: is the budget rule's mean error at most half of the paper's PSA at the same budget?

    python scripts/experiments/half_the_error.py --captures runs/captures --every 3

The paper's PSA is the best of its published settings at each budget, also with query blocks of 64. Writes beside the
rows half_the_error_summary.csv: mean errors over cases, and each one's ratio to that best.
"""

from dataclasses import replace

import _laboratory  # noqa: F401
from block_policies import PAPER, PRESETS, budget_rule, quantiles
from experiment import arguments_of, finish, report_cases
from harness import measure, pick, write_rows
from policies import OUR_CONFIGS, SMALL_BLOCKS, published

THEIRS = {
    **published(),
    **{f"{name}, 64 queries": quantiles(shares, replace(PAPER, **SMALL_BLOCKS)) for name, shares in PRESETS.items()},
}
OURS = {name: budget_rule(config) for name, config in OUR_CONFIGS.items()}


def main() -> None:
    arguments = arguments_of(__doc__)
    rows = list(measure(report_cases(arguments), {**THEIRS, **OURS}, arguments.budgets))
    table = finish(arguments.output, "half_the_error", rows)
    for row in table:
        theirs = [r["error"] for r in pick(table, source=row["source"], budget=row["budget"]) if r["policy"] in THEIRS]
        row["against_paper"] = round(row["error"] / min(theirs), 4)
    rounded = [{k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()} for row in table]
    write_rows(arguments.output / "half_the_error_summary.csv", rounded)


if __name__ == "__main__":
    main()
