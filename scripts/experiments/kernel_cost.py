"""Experiment 10: a naive against a decoupled kernel, by a cost model on the plans; columns of keys that are multiplied.

    python scripts/experiments/kernel_cost.py --captures runs/captures --every 3

A kernel that ties blocks to tiles gives every block pair that is read its own tile, however few rows its level has: of
64 columns where tiles are fixed, of 16, the least that matrix units take, where they may shrink. A decoupled one packs
the rows that a query block reads into full tiles of 64. All relative to dense attention; launches, memory traffic and
the latency of a tile are not in the model.
"""

import _laboratory  # noqa: F401
import torch
from experiment import arguments_of, draw, means, report_cases
from harness import save_figure, write_rows

from psa_diffusers import PSAConfig, build_plan

TILE, LEAST = 64, 16


def columns(levels: torch.Tensor, kv_block_size: int, num_levels: int) -> dict[str, float]:
    """Columns multiplied by each kind of kernel, dense = 1; levels int8 [1, heads, query_blocks, kv_blocks]."""
    sizes = [0] + [kv_block_size >> level for level in range(num_levels)] + [1]
    rows = torch.tensor(sizes)[levels.long().cpu()]
    dense = rows.shape[-1] * kv_block_size

    def share(columns: torch.Tensor) -> float:
        return float(columns.sum(-1).double().mean()) / dense

    def whole(rows: torch.Tensor, tile: int) -> torch.Tensor:
        return (rows + tile - 1) // tile * tile

    return {
        "the plan": share(rows),
        "naive, tiles of 64": share(whole(rows, TILE)),
        "naive, tiles of 16 and more": share(whole(rows, LEAST)),
        "decoupled, tiles of 64": share(whole(rows.sum(-1, keepdim=True), TILE)),
    }


def main() -> None:
    arguments, rows = arguments_of(__doc__), []
    for case in report_cases(arguments):
        for budget in arguments.budgets:
            plan = build_plan(*case.inputs, PSAConfig(compute_budget=budget), grid=case.grid)
            for kernel, work in columns(plan.level_mask, plan.kv_block_size, plan.num_levels).items():
                facts = {"source": case.source, "case": case.name, "policy": kernel, "budget": budget}
                # What is drawn and averaged is called "error" by the laboratory; here it is work.
                rows.append({**facts, "compute_budget": plan.compute_budget, "estimator": 0.0, "error": work})
    table = means(rows)
    figure = draw(table, "budget")
    for axes in figure.axes:
        axes.set_ylabel("columns multiplied (dense = 1)")
    save_figure(arguments.output / "kernel_cost.png", figure)
    names = {"policy": "kernel", "error": "work"}
    kept = [{names.get(k, k): v for k, v in row.items() if k not in ("estimator", "geometric")} for row in table]
    write_rows(arguments.output / "kernel_cost.csv", kept)
    for row in kept:
        print(row)


if __name__ == "__main__":
    main()
