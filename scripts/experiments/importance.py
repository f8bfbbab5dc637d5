"""Experiment 4: how importance is estimated, at a fixed budget: sampling counts, antidiagonals, pooled means; cost.

python scripts/experiments/importance.py --captures runs/captures --every 3
"""

from dataclasses import replace

import _laboratory  # noqa: F401
from block_policies import PAPER, PRESETS, budget_rule, quantiles
from experiment import run

from psa_diffusers import PSAConfig

COUNTS = ((4, 2), (8, 4), (16, 4), (16, 8), (16, 16), (32, 8), (32, 16), (64, 32))
OURS = PSAConfig()


def policies():
    found = {}
    for queries, keys in COUNTS:
        chosen = {"sampled_queries": queries, "sampled_keys": keys}
        found[f"PSA-3, {queries} x {keys}, max"] = quantiles(PRESETS["PSA-3"], replace(PAPER, **chosen))
        summed = replace(PAPER, importance_reduction="sum", **chosen)
        found[f"PSA-3, {queries} x {keys}, sum"] = quantiles(PRESETS["PSA-3"], summed)
        found[f"ours, {queries} x {keys}"] = budget_rule(replace(OURS, **chosen))
    for kind in ("antidiagonal", "pooled"):
        other = replace(PAPER, importance=kind, importance_reduction="sum")
        found[f"PSA-3, {kind}"] = quantiles(PRESETS["PSA-3"], other)
        found[f"ours, {kind}"] = budget_rule(replace(OURS, importance=kind))
    return found


if __name__ == "__main__":
    run("importance", __doc__, policies(), (0.15,))
