"""The settings of the experiments on videos: policies at equal budgets; dense steps; budgets over steps; kept plans."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from policies import BEST, DEFAULT, OUR_CONFIGS, OURS, PLAIN, families, published
from video_settings import LEAST, SCHEDULES, Setting

from psa_diffusers import PSAConfig
from psa_diffusers.integration.schedule import dense_steps

TUNING, POLICIES, STEPS, REUSE = "tuning", "policies", "steps", "reuse"
TUNING_BUDGET = 0.15
WARMUP = PSAConfig().dense_warmup
FIRST_SHARES, LAST_STEPS = (0.0, 0.1, 0.25, 0.4), (0, 1, 2)
STEPS_POLICY = PLAIN
REUSED = (STEPS_POLICY, BEST)
KEPT_STEPS = (1, 2, 3, 4, 6, 12)
CONTROL = "every block in full"  # the same kernel without an approximation: rounding alone


def variants() -> dict[str, dict]:
    """For each family that is not ours its variants."""
    return {family: group for family, group in families().items() if family not in (DEFAULT, OURS)}


def tuning_settings(steps: int) -> list[Setting]:
    """Every variant of every family, at one budget."""
    first = dense_steps(WARMUP, steps)
    return [
        Setting(family, policy, TUNING_BUDGET, first, experiment=TUNING, variant=name)
        for family, group in variants().items()
        for name, policy in group.items()
    ]


def chosen_variants(file: Path | None) -> dict[str, str]:
    """Family -> variant: by ``videos_tuning.json``; without it as tuned on captured tensors, ``tuning.json``."""
    if file is not None and file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    tuned = json.loads((Path(__file__).parents[2] / "benchmarks/experiments/tuning.json").read_text(encoding="utf-8"))
    return {family: next(iter(tuned[family]["captured"].values())) for family in variants()}


def policy_settings(steps: int, budgets: Sequence[float], chosen: dict[str, str]) -> list[Setting]:
    """All policies at all budgets, the budgets in their order."""
    first, settings = dense_steps(WARMUP, steps), []
    ours, theirs = OUR_CONFIGS.items(), published().items()
    tuned = [(family, chosen[family], group[chosen[family]]) for family, group in variants().items()]
    everyone = [(name, "", choose) for name, choose in (*ours, *theirs)] + tuned
    full = PSAConfig(rule="topk", level_fractions=(1.0, 0.0, 0.0, 0.0))
    settings = [Setting(CONTROL, full, 1.0, first, experiment=POLICIES)]
    return settings + [
        Setting(name, choose, budget, first, experiment=POLICIES, variant=variant)
        for budget in budgets
        for name, variant, choose in everyone
    ]


def step_settings(steps: int) -> list[Setting]:
    """Experiment 9: which steps are dense, at one sparse budget and at one total; schedules at one mean budget."""
    config, usual = OUR_CONFIGS[STEPS_POLICY], dense_steps(WARMUP, steps)
    shared = {"name": STEPS_POLICY, "choose": config, "experiment": STEPS}
    budget = config.compute_budget
    whole = Setting(**shared, budget=budget, dense_first=usual)
    settings = [
        Setting(**shared, budget=budget, dense_first=dense_steps(share, steps), dense_last=last)
        for share in FIRST_SHARES
        for last in LAST_STEPS
    ]
    for first in range(usual + 2):
        settings += [at_total(whole, first, last, steps) for last in LAST_STEPS]
    for schedule in SCHEDULES:
        settings += [
            Setting(**shared, budget=mean, dense_first=usual, schedule=schedule)
            for mean in (budget, round(budget / 3, 9))
        ]
        settings.append(Setting(**shared, budget=whole.total(steps), dense_first=0, schedule=schedule))
    possible = [
        setting for setting in settings if setting is not None and setting.dense_first + setting.dense_last < steps
    ]
    return list(dict.fromkeys(possible))


def reuse_settings(steps: int) -> list[Setting]:
    """Plans made anew in each sparse step, and kept for several: in the longest case one for all of them."""
    first = dense_steps(WARMUP, steps)
    return [
        Setting(
            *(name, OUR_CONFIGS[name], OUR_CONFIGS[name].compute_budget, first),
            experiment=REUSE,
            variant=kept_variant(kept),
            refresh_every=kept,
        )
        for name in REUSED
        for kept in KEPT_STEPS
        if kept <= steps - first
    ]


def kept_variant(steps: int) -> str:
    """What tables call it; the usual one has no name."""
    return f"plans kept {steps} steps" if steps > 1 else ""


def at_total(whole: Setting, first: int, last: int, steps: int) -> Setting | None:
    """The setting with these dense steps and the budget that leaves the compute of all steps as in ``whole``; None
    where the dense steps alone take it."""
    sparse = steps - first - last
    budget = round((whole.total(steps) * steps - first - last) / max(1, sparse), 9)
    if sparse < 1 or not LEAST < budget <= 1:
        return None
    return Setting(whole.name, whole.choose, budget, first, last, experiment=whole.experiment)
