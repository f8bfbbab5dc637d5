"""Experiment 5: content heterogeneity: errors as the tokens of a block get less alike; where pooling stops paying.

    python scripts/experiments/heterogeneity.py

Synthetic cases alone; the x axis is the share of noise in every feature, and the CSV file has the mean cosine
similarity of two tokens of a key block beside it.
"""

import _laboratory  # noqa: F401
from block_policies import PAPER, PRESETS, _means_and_likeness, budget_rule, quantiles
from cases import Case
from equal_compute import token_order
from experiment import arguments_of, finish
from harness import measure
from policies import BINARY

from psa_diffusers.synthetic import video_like_qkv

NOISES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0)
POLICIES = {
    "binary, top-k": quantiles(BINARY),
    **{name: quantiles(PRESETS[name]) for name in ("PSA-2", "PSA-3", "PSA-5")},
    "budget rule (ours)": budget_rule(),
}


def main() -> None:
    arguments, rows = arguments_of(__doc__), []
    for noise in NOISES:
        tensors = video_like_qkv(
            *(1, tuple(arguments.grid), arguments.heads, arguments.head_dim),
            noise=noise,
            position=0.3,
            device=arguments.device,
        )
        case = Case(f"noise {noise}", "synthetic", *tensors, tuple(arguments.grid))
        _, likeness = _means_and_likeness(case.key, token_order(case, PAPER), PAPER.kv_block_size)
        facts = {"noise": noise, "similarity": round(float(likeness.mean()), 4)}
        rows += measure([case], POLICIES, (0.15,), **facts)
    finish(arguments.output, "heterogeneity", rows, by="noise")


if __name__ == "__main__":
    main()
