"""Experiment 3: the paper's presets PSA-1 .. PSA-5 at a quarter of dense attention's FLOPs.

python scripts/experiments/presets.py --captures runs/captures --every 3
"""

import _laboratory  # noqa: F401
from block_policies import PRESETS, budget_rule, quantiles
from experiment import run

POLICIES = {**{name: quantiles(shares) for name, shares in PRESETS.items()}, "budget rule (ours)": budget_rule()}

if __name__ == "__main__":
    run("presets", __doc__, POLICIES, (0.25,))
