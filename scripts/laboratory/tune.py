"""Tune every policy on the tuning set: of a family's variants, the one of least mean error, for each source of cases.

    python scripts/laboratory/tune.py --captures runs/captures --every 3 --budgets 0.1

The tuning set is synthetic seed 100 and the first captured prompt; ``compare.py`` reports on others. Writes tuning.csv
(a row a variant, source and budget, means over cases) and tuning.json (family -> source -> budget -> variant).
"""

from __future__ import annotations

import json

from cases import TUNING, all_cases
from harness import case_settings, common_arguments, geometric_mean, mean, measure, pick, write_rows
from policies import families


def main() -> None:
    parser = common_arguments(__doc__)
    arguments = parser.parse_args()
    settings = case_settings(arguments)
    variants = {(family, name): policy for family, group in families().items() for name, policy in group.items()}
    cases = all_cases(TUNING, arguments.captures, **settings)
    rows = list(measure(cases, variants, arguments.budgets))
    table, chosen = [], {}
    for (family, name), source, budget in sorted({(row["policy"], row["source"], row["budget"]) for row in rows}):
        group = pick(rows, policy=(family, name), source=source, budget=budget)
        errors = [row["error"] for row in group]
        table.append(
            {
                **{"source": source, "budget": budget, "family": family, "variant": name, "cases": len(group)},
                "compute_budget": round(mean(row["compute_budget"] for row in group), 5),
                "estimator": round(mean(row["estimator"] for row in group), 5),
                "mean_error": round(mean(errors), 6),
                "geometric_mean_error": round(geometric_mean(errors), 6),
            }
        )
        best = chosen.setdefault(family, {}).setdefault(source, {})
        if table[-1]["mean_error"] <= best.get(budget, (float("inf"), None))[0]:
            best[budget] = (table[-1]["mean_error"], name)
    write_rows(arguments.output / "tuning.csv", table)
    names = {
        family: {source: {str(b): name for b, (_, name) in best.items()} for source, best in sources.items()}
        for family, sources in chosen.items()
    }
    (arguments.output / "tuning.json").write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
