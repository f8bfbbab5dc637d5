"""Experiment 1: PSA, binary block-sparse and ours at the sparsities of the paper's table, 0.85 to 0.91.

python scripts/experiments/matched_sparsity.py --captures runs/captures --every 3
"""

import _laboratory  # noqa: F401
from block_policies import budget_rule, quantiles
from experiment import run
from policies import BINARY, published

POLICIES = {"binary, top-k": quantiles(BINARY), **published(), "budget rule (ours)": budget_rule()}

if __name__ == "__main__":
    run("matched_sparsity", __doc__, POLICIES, (0.09, 0.12, 0.15))
