"""Experiment 2: multi-level T = {.7, .8, .9, .9} against binary T = {.85 x 4}: as they are, and at equal compute.

python scripts/experiments/multi_level.py --captures runs/captures --every 3
"""

import _laboratory  # noqa: F401
from block_policies import PAPER, THRESHOLDS, _read_only, attend, estimator_share, thresholds
from cases import Case
from equal_compute import make_plan, scores, token_order
from experiment import run

from psa_diffusers.planning.levels import threshold_levels

BINARY = (0.85,) * 4
BASE = _read_only(PAPER)


def as_published(values):
    """Thresholds as they are, whatever they cost."""

    def policy(case: Case, budget: float):
        levels = threshold_levels(scores(case, BASE), values, None)
        return attend(case, make_plan(case, BASE, levels, token_order(case, BASE)), BASE, estimator_share(BASE))

    return policy


POLICIES = {
    "multi-level, as published": as_published(THRESHOLDS),
    "binary, as published": as_published(BINARY),
    "multi-level, scaled to the budget": thresholds(THRESHOLDS),
    "binary, scaled to the budget": thresholds(BINARY),
}

if __name__ == "__main__":
    run("multi_level", __doc__, POLICIES, (0.1, 0.15, 0.2, 0.25))
