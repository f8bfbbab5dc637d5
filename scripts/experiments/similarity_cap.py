"""Experiment 6: the similarity cap on and off, at equal compute: PSA-3 shares and the budget rule.

python scripts/experiments/similarity_cap.py --captures runs/captures --every 3
"""

from dataclasses import replace

import _laboratory  # noqa: F401
from block_policies import PRESETS, budget_rule, capped, quantiles
from experiment import run

from psa_diffusers import PSAConfig

CAPS = {
    "0.5 0.5 0.5": (0.5,) * 3,
    "0.7 0.7 0.7": (0.7,) * 3,
    "0.9 0.9 0.9": (0.9,) * 3,
    "0.5 0.6 0.7": (0.5, 0.6, 0.7),
}
SHARES = PRESETS["PSA-3"]
POLICIES = {
    "PSA-3, no cap": quantiles(SHARES),
    **{f"PSA-3, cap {name}": capped(SHARES, values) for name, values in CAPS.items()},
    "ours, no cap": budget_rule(),
    **{
        f"ours, cap {name}": budget_rule(replace(PSAConfig(), similarity_thresholds=values))
        for name, values in CAPS.items()
    },
}

if __name__ == "__main__":
    run("similarity_cap", __doc__, POLICIES, (0.15,))
