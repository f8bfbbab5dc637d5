"""Beyond the paper: does a learned level generator beat the budget rule? (The paper's third open question.)

    python scripts/laboratory/capture.py --output runs/captures --prompts ...    (eight of them, say)
    python scripts/experiments/learned_levels.py --captures runs/captures --train 4

A small network corrects the rule's error estimates (``scripts/laboratory/learned_rule.py``). It is trained on the
captured calls of the first prompts: through a relaxation of the rule, on the outputs' errors at all budgets ("linear",
"network"); or to foretell every pair's first-order error ("network, by regression"). Then each one's plans are compared
with the rule's own, at equal budget and by the same backend, all without the logit correction: on calls that it was
trained on ("seen"), on all calls of the other prompts ("unseen"), and on synthetic cases. Writes learned_levels.csv, a
summary with the geometric mean of the ratios of errors and its 95 % interval, and a plot.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _laboratory  # noqa: F401
import torch
from block_policies import budget_rule
from cases import Case, synthetic_cases
from harness import case_settings, common_arguments, mean, measure, pick, save_figure, write_rows
from learned_rule import CONFIG, Correction, Sample, learned_rule, price_at, rung_weights
from torch import Tensor

from psa_diffusers.metrics import mean_with_interval

RULE = "budget rule"
VARIANTS = {"linear": 0, "network": 16, "network, by regression": 16}  # width of the hidden layers
SEEN, UNSEEN, SYNTHETIC = "seen", "unseen", "synthetic"
WARMEST, COLDEST = 3.0, 0.7  # temperature, in units of a centroid's cost


def captured(files: Sequence[Path], every: int) -> list[Case]:
    cases = []
    for file in files:
        for call in torch.load(file)[every - 1 :: every]:
            tensors = (call[name].float() for name in ("query", "key", "value"))
            label = f"{file.stem}, step {call['step']}, layer {call['layer']}"
            cases.append(Case(label, "captured", *tensors, tuple(call["grid"])))
    return cases


def relaxed_loss(correction: Correction, sample: Sample, budgets: Sequence[float], temperature: float) -> Tensor:
    """Mean over the budgets of the logarithm of the relative error; the price is that of the sample's rows."""
    features, losses = sample.of_rows(sample.features), []
    errors = features[..., -1] + correction(features)
    for budget in budgets:
        price, costs = price_at(errors, budget, CONFIG.kv_block_size, temperature)
        weights = rung_weights(errors, price, costs, temperature)
        losses.append(0.5 * sample.lost(weights.transpose(0, 1)).log())
    return torch.stack(losses).mean()


def regression_loss(correction: Correction, sample: Sample) -> Tensor:
    """Squared difference of logarithms, up to a factor that all pairs of the call have; large errors count more."""
    features, exact = sample.of_rows(sample.features), sample.exact.clamp(min=1e-12)
    weight = exact.sqrt() / exact.sqrt().sum()
    gap = features[..., -1] + correction(features) - exact.log()
    return (weight * (gap - (weight * gap).sum()).square()).sum()


def train(name: str, samples: list[Sample], budgets: Sequence[float], epochs: int, seed: int) -> Correction:
    torch.manual_seed(seed)
    correction, order, begin = Correction(VARIANTS[name]), random.Random(seed), time.monotonic()
    correction.standardise(torch.cat([sample.features.flatten(0, -2) for sample in samples]))
    optimizer = torch.optim.Adam(correction.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(samples), eta_min=1e-3)
    for epoch in range(epochs):
        temperature = WARMEST * (COLDEST / WARMEST) ** (epoch / max(1, epochs - 1))
        losses = []
        for sample in order.sample(samples, len(samples)):
            regress = name.endswith("regression")
            loss = (
                regression_loss(correction, sample)
                if regress
                else relaxed_loss(correction, sample, budgets, temperature)
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        text = f"{name}, epoch {epoch + 1}: {mean(losses):.4f}, {time.monotonic() - begin:.0f} s"
        print(text, file=sys.stderr, flush=True)
    return correction.requires_grad_(False)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each part, budget and policy the mean error, and the ratio to the rule's: its geometric mean over the cases,
    with an interval over the prompts."""
    table = []
    for part, budget, policy in dict.fromkeys((row["part"], row["budget"], row["policy"]) for row in rows):
        own = pick(rows, part=part, budget=budget, policy=policy)
        rule = {row["case"]: row["error"] for row in pick(rows, part=part, budget=budget, policy=RULE)}
        logs = [math.log(row["error"] / rule[row["case"]]) for row in own]
        found = mean_with_interval(logs, [row["case"].split(", step")[0] for row in own], 0.95)
        ends = {"ratio": found.value, "ratio_low": found.low, "ratio_high": found.high}
        table.append(
            {
                **{"part": part, "budget": budget, "policy": policy, "cases": len(own)},
                "compute_budget": round(mean(row["compute_budget"] for row in own), 5),
                "error": round(mean(row["error"] for row in own), 5),
                **{name: "" if value is None else round(math.exp(value), 4) for name, value in ends.items()},
                "better_in": sum(value < 0 for value in logs),
            }
        )
    return table


def draw(table: list[dict[str, Any]]) -> Any:
    from psa_diffusers.report.figure import new_figure

    parts = list(dict.fromkeys(row["part"] for row in table))
    figure = new_figure(3.6 * len(parts), 3.6)
    panels = figure.subplots(1, len(parts), squeeze=False, sharey=True)[0]
    for axes, part in zip(panels, parts, strict=True):
        for policy in VARIANTS:
            own = pick(table, part=part, policy=policy)
            points = [row["budget"] for row in own], [row["ratio"] for row in own]
            ends = None
            if all(row["ratio_low"] != "" for row in own):
                ends = ([r["ratio"] - r["ratio_low"] for r in own], [r["ratio_high"] - r["ratio"] for r in own])
            axes.errorbar(*points, yerr=ends, marker="o", capsize=2, label=policy)
        axes.axhline(1.0, color="gray", linewidth=1)
        axes.set(title=part, xlabel="budget")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="error over the budget rule's")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = common_arguments(__doc__)
    parser.add_argument("--train", type=int, default=4, help="Prompts to train on; the others are unseen.")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--blocks", type=int, default=12, help="Query blocks a head and call in training.")
    parser.add_argument("--queries", type=int, default=6, help="Queries of each.")
    parser.add_argument("--seed", type=int, default=0, help="Of what is drawn in training.")
    options = parser.parse_args(arguments)
    if options.captures is None:
        parser.error("--captures is needed: there is nothing else to train on.")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    files = sorted(options.captures.glob("*.pt"))
    if len(files) <= options.train:
        raise SystemExit(
            f"{options.captures} holds {len(files)} prompts, but more than --train {options.train} is needed."
        )
    generator = torch.Generator().manual_seed(options.seed)
    drawn = (options.blocks, options.queries, generator)
    training = captured(files[: options.train], options.every)
    samples = [Sample.of(case, CONFIG, *drawn) for case in training]
    rules = {name: train(name, samples, options.budgets, options.epochs, options.seed) for name in VARIANTS}
    policies = {RULE: budget_rule(CONFIG), **{name: learned_rule(rule) for name, rule in rules.items()}}
    settings = {k: v for k, v in case_settings(options).items() if k != "every"}
    parts = {
        UNSEEN: captured(files[options.train :], options.every),
        SEEN: training[::3],
        SYNTHETIC: synthetic_cases("report", **settings) if options.seeds else [],
    }
    rows = [row for part, cases in parts.items() for row in measure(cases, policies, options.budgets, part=part)]
    write_rows(options.output / "learned_levels.csv", rows)
    table = summary(rows)
    write_rows(options.output / "learned_levels_summary.csv", table)
    save_figure(options.output / "learned_levels.png", draw(table))
    for row in table:
        print("  ".join(str(value) for value in row.values()))


if __name__ == "__main__":
    main()
