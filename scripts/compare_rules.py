"""Output error of the planning rules at equal compute budget, on synthetic video-like queries, keys and values.

Every rule gets the same order, blocks and importance; the paper's shares and thresholds are scaled until their plans
cost what is asked. ``oracle`` is the budget rule with the exact first-order error of every pair and level instead of
the estimate, without the value correction: what a better estimate could still gain. Errors are those of the sparse
output against the dense one, relative in the Euclidean norm, over all heads, and for the worst head.

    python scripts/compare_rules.py --output benchmarks/compare_rules.csv
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from psa_diffusers import PSAConfig, pyramid_sparse_attention
from psa_diffusers.planning import Plan, build_plan
from psa_diffusers.planning.budget import Limits, spend, step_prices
from psa_diffusers.synthetic import video_like_qkv

CONTENTS = {
    "typical": dict(correlation=3.0, noise=0.3, temperature=1.0),
    "smooth": dict(correlation=4.0, noise=0.1, temperature=1.0),
    "smooth, peaked": dict(correlation=3.0, noise=0.1, temperature=0.6),
    "noisy, peaked": dict(correlation=2.0, noise=0.5, temperature=0.7),
    "flat": dict(correlation=3.0, noise=0.3, temperature=2.0),
}
PSA3 = (0.15, 0.10, 0.20, 0.0)
THRESHOLDS = (0.7, 0.8, 0.9, 0.9)


def pieces(inputs: tuple[Tensor, Tensor, Tensor], plan: Plan) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """For each head and query block: the mass [levels, queries, kv_blocks] and the weighted values
    [levels, queries, kv_blocks, head_dim] that every block contributes at levels 1, 2, ... and the centroid."""
    query, key, value = (tensor[0, plan.order].transpose(0, 1) for tensor in inputs)
    heads, _, head_dim = key.shape
    size = plan.kv_block_size
    factors = [2**level for level in range(plan.num_levels)] + [size]
    for head in range(heads):
        keys, values = (
            [tensor[head].view(-1, size // factor, factor, head_dim).mean(2) for factor in factors]
            for tensor in (key, value)
        )
        for row, queries in enumerate((query[head] * head_dim**-0.5).split(plan.query_block_size)):
            top = (queries @ key[head].T).amax(1)[:, None, None]
            weights = [
                torch.exp(torch.einsum("qd,krd->qkr", queries, pooled) - top) * factor
                for pooled, factor in zip(keys, factors, strict=True)
            ]
            mass = torch.stack([weight.sum(-1) for weight in weights])
            weighted = torch.stack([torch.einsum("qkr,krd->qkd", *pair) for pair in zip(weights, values, strict=True)])
            yield head, row, mass, weighted


def exact_errors(inputs: tuple[Tensor, Tensor, Tensor], plan: Plan) -> Tensor:
    """[levels from 2, 1, heads, query_blocks, kv_blocks]: mean squared first-order output error of each pair."""
    errors = torch.empty(plan.num_levels, *plan.level_mask.shape, device=plan.level_mask.device)
    for head, row, mass, weighted in pieces(inputs, plan):
        total = mass[0].sum(-1)[:, None, None]
        dense = weighted[0].sum(1, keepdim=True) / total
        moved = (weighted[1:] - weighted[0]) - (mass[1:] - mass[0])[..., None] * dense
        errors[:, 0, head, row] = (moved / total).square().sum(-1).mean(1)
    return errors


def output_errors(
    inputs: tuple[Tensor, Tensor, Tensor], plans: dict[str, tuple[PSAConfig, Plan]]
) -> dict[str, tuple[float, float]]:
    """Relative error of each plan's output: of all heads together, and of the worst head."""
    heads_first = (tensor.transpose(1, 2) for tensor in inputs)
    dense = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    norm, errors = dense.double().square().sum((0, 1, 3)), {}
    for name, (config, plan) in plans.items():
        out = pyramid_sparse_attention(*inputs, config, plan=plan)
        lost = (out.double() - dense).square().sum((0, 1, 3))
        errors[name] = float((lost.sum() / norm.sum()).sqrt()), float((lost / norm).sqrt().amax())
    return errors


def scaled_thresholds(
    inputs: tuple[Tensor, Tensor, Tensor], grid: tuple[int, int, int], budget: float
) -> tuple[PSAConfig, Plan]:
    """The threshold rule with its thresholds times one factor, by bisection: the densest that the budget allows."""
    low, high, best = 0.0, 1.0 / min(THRESHOLDS), None
    for _ in range(14):
        factor = (low + high) / 2
        taus = tuple(min(1.0, tau * factor) for tau in THRESHOLDS)
        config = PSAConfig(rule="threshold", level_thresholds=taus)
        plan = build_plan(*inputs, config, grid=grid)
        if plan.compute_budget <= budget:
            low, best = factor, (config, plan)
        else:
            high = factor
    return best or (config, plan)


def make_plans(
    inputs: tuple[Tensor, Tensor, Tensor], grid: tuple[int, int, int], budget: float
) -> dict[str, tuple[PSAConfig, Plan]]:
    shares = tuple(share * budget / 0.25 for share in PSA3)
    configs = {
        "budget": PSAConfig(compute_budget=budget),
        "budget, value_correction=none": PSAConfig(compute_budget=budget, value_correction="none"),
        "topk, PSA-3 shares": PSAConfig(rule="topk", level_fractions=shares),
        "topk, binary": PSAConfig(rule="topk", level_fractions=(budget, 0.0, 0.0, 0.0)),
    }
    plans = {name: (config, build_plan(*inputs, config, grid=grid)) for name, config in configs.items()}
    plans["threshold, scaled"] = scaled_thresholds(inputs, grid, budget)
    config, ours = plans["budget, value_correction=none"]
    mask = spend(step_prices(exact_errors(inputs, ours), ours.kv_block_size), budget, ours.kv_block_size, Limits())
    plans["oracle"] = config, dataclasses.replace(ours, level_mask=mask, cache={})
    return plans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=int, nargs=3, default=(8, 16, 32), metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--budgets", type=float, nargs="+", default=(0.15, 0.25))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="CSV file to write")
    arguments = parser.parse_args()
    grid, rows = tuple(arguments.grid), []
    for content, settings in CONTENTS.items():
        for seed in arguments.seeds:
            shape = (1, grid, arguments.heads, arguments.head_dim)
            inputs = video_like_qkv(*shape, seed=seed, device=arguments.device, **settings)
            for budget in arguments.budgets:
                plans = make_plans(inputs, grid, budget)
                for name, (error, worst) in output_errors(inputs, plans).items():
                    achieved = plans[name][1].compute_budget
                    print(f"{content:16} {budget:5} {name:29} {achieved:.4f}  error {error:.4f}  worst {worst:.4f}")
                    rows.append(
                        {
                            "content": content,
                            **settings,
                            "seed": seed,
                            "grid": "x".join(map(str, grid)),
                            "heads": arguments.heads,
                            "head_dim": arguments.head_dim,
                            "budget_asked": budget,
                            "rule": name,
                            "compute_budget": round(achieved, 5),
                            "relative_error": round(error, 5),
                            "worst_head_error": round(worst, 5),
                            "device": arguments.device,
                            "torch": torch.__version__,
                        }
                    )
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        with arguments.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
