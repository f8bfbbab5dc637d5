"""Experiment 8: block sizes of queries and keys at a fixed budget; the estimator samples one token in 8 x 8.

python scripts/experiments/block_sizes.py --captures runs/captures --every 3
"""

import _laboratory  # noqa: F401
from block_policies import PRESETS, budget_rule, quantiles
from experiment import run

from psa_diffusers import PSAConfig

SIZES = ((256, 128), (128, 128), (256, 64), (128, 64), (64, 64), (64, 32), (32, 32))


def policies():
    found = {}
    for query, key in SIZES:
        blocks = {"query_block_size": query, "kv_block_size": key}
        samples = {"sampled_queries": query // 8, "sampled_keys": key // 8}
        paper = PSAConfig(importance_reduction="max", **blocks, **samples)
        found[f"PSA-3, {query} x {key}"] = quantiles(PRESETS["PSA-3"], paper)
        found[f"ours, {query} x {key}"] = budget_rule(PSAConfig(**blocks, **samples))
    return found


if __name__ == "__main__":
    run("block_sizes", __doc__, policies(), (0.15,))
