"""Every policy of the laboratory by name, with the settings among which tuning chooses."""

from __future__ import annotations

from dataclasses import replace

from block_policies import PAPER, PRESETS, THRESHOLDS, Policy, budget_rule, quantiles, sparge, thresholds
from cluster_policies import svg2, svg_ear
from static_policies import radial, sliding_tiles, svg

from psa_diffusers import PSAConfig

DEFAULT, OURS = "budget rule (ours, default)", "budget rule (ours, tuned)"
PUBLISHED = (*PRESETS, "PSA threshold")  # as published, nothing tuned

BINARY = (1.0, 0.0, 0.0, 0.0)
# The budget rule's settings that are compared by themselves. Rows "variance of each query" in CSV files are of a former
# definition of the logit correction.
SMALL_BLOCKS = {"query_block_size": 64, "sampled_queries": 8}
PLAIN, BEST = "ours, no logit correction", "ours, fitted, 64 queries"
OUR_CONFIGS = {
    "ours, default": PSAConfig(),
    "ours, fitted": PSAConfig(value_correction="fitted"),
    "ours, 64 queries": PSAConfig(**SMALL_BLOCKS),
    BEST: PSAConfig(value_correction="fitted", **SMALL_BLOCKS),
    PLAIN: PSAConfig(logit_correction="none"),
    f"{BEST}, no logit correction": PSAConfig(value_correction="fitted", logit_correction="none", **SMALL_BLOCKS),
}
ESTIMATES = {
    "sampled max": PAPER,
    "sampled sum": replace(PAPER, importance_reduction="sum"),
    "antidiagonal": replace(PAPER, importance="antidiagonal", importance_reduction="sum"),
    "pooled": replace(PAPER, importance="pooled"),
}
ORDERED = {
    f"{name}, {order}": replace(config, order=order)
    for name, config in ESTIMATES.items()
    for order in ("gilbert", "raster")
}
TEMPERED = {
    "T .7 .8 .9 .9": THRESHOLDS,
    "T .6 .8 .95 .98": (0.6, 0.8, 0.95, 0.98),
    "T .5 .7 .8 .9": (0.5, 0.7, 0.8, 0.9),
}
WINDOWS = {
    "one window": [(1, 1, 1)],
    "3 windows": [(1, 1, 1), (4, 1, 1), (1, 4, 4)],
    "7 windows": [(1, 1, 1), (4, 1, 1), (1, 4, 4), (16, 1, 1), (1, 16, 16), (1, 4, 1), (1, 1, 4)],
}


def published() -> dict[str, Policy]:
    """The paper's PSA as published, scaled to a budget: sampled importance by its maximum, Hilbert order."""
    return {**{name: quantiles(shares) for name, shares in PRESETS.items()}, "PSA threshold": thresholds(THRESHOLDS)}


def families() -> dict[str, dict[str, Policy]]:
    """What is tuned: for each family its variants."""
    return {
        DEFAULT: {"default": budget_rule()},
        OURS: {
            "logit_correction=none": budget_rule(PSAConfig(logit_correction="none")),
            "logit_correction=variance": budget_rule(PSAConfig(logit_correction="variance")),
            "value_correction=fitted": budget_rule(PSAConfig(value_correction="fitted", logit_correction="none")),
            "fitted, logit_correction=variance": budget_rule(
                PSAConfig(value_correction="fitted", logit_correction="variance")
            ),
            "value_correction=none": budget_rule(PSAConfig(value_correction="none", logit_correction="none")),
        },
        "binary, top-k": {name: quantiles(BINARY, config) for name, config in ORDERED.items()},
        "binary, threshold": {name: thresholds((1.0,) * 4, config) for name, config in ORDERED.items()},
        "PSA quantile, tuned": {
            f"{preset}, {name}": quantiles(PRESETS[preset], config)
            for preset in ("PSA-3", "PSA-4", "PSA-5")
            for name, config in ESTIMATES.items()
        },
        "PSA threshold, tuned": {
            f"{label}, {name}": thresholds(values, config)
            for label, values in TEMPERED.items()
            for name, config in ESTIMATES.items()
        },
        "SpargeAttn (re-implemented)": {
            f"similarity {limit}, {order}": sparge(limit, replace(PAPER, order=order))
            for limit in (None, 0.1, 0.3, 0.5)
            for order in ("gilbert", "raster")
        },
        "SVG (re-implemented)": {f"sink {sink}": svg(sink) for sink in (False, True)},
        "Radial (re-implemented)": {f"sink {sink}": radial(sink) for sink in (False, True)},
        "sliding tiles (re-implemented)": {
            f"tile {tile}, {name}": sliding_tiles(tile, shapes)
            for tile in ((4, 4, 4), (2, 4, 8))
            for name, shapes in WINDOWS.items()
        },
        "SVG2 (re-implemented)": {f"{q} x {k} clusters": svg2(q, k) for q, k in ((32, 64), (64, 128), (64, 256))},
        "SVG-EAR (re-implemented)": {
            f"{q} x {k} clusters": svg_ear(q, k) for q, k in ((32, 64), (64, 64), (64, 128), (128, 128))
        },
    }
