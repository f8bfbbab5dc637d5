"""What 8-bit floats (e4m3) in the two products cost in accuracy, on the plan that attention has anyway.

    python scripts/experiments/fp8.py --captures runs/captures --every 7 --grid 4 16 32 --head-dim 128

Inputs are rounded to bfloat16 first, as a model hands them over; everything but the rounding that a variant names is
float64. ``rounding`` is the relative error against float64 on the same plan, ``error`` that of the default setting's
output, value correction included, with this rounding added, against dense attention in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import _laboratory  # noqa: F401
import torch
from cases import Case
from experiment import arguments_of, report_cases
from harness import geometric_mean, mean, pick, save_figure, write_rows
from torch import Tensor

from psa_diffusers import PSAConfig, build_plan
from psa_diffusers.backends.reference import PyramidRows, attend_reference, pyramid_rows
from psa_diffusers.planning.plan import Plan
from psa_diffusers.report.figure import new_figure

LARGEST = 448.0  # e4m3's
WEIGHT = 256.0  # what a row's largest weight is scaled to: a factor that kernels get for nothing


@dataclass(frozen=True)
class Variant:
    """Number formats of the two products, and what e4m3 numbers share a scale."""

    logits: str = "bf16"  # of queries and keys: "bf16" or "e4m3"
    output: str = "bf16"  # of weights and values
    # Keys by "head", by "block" (rows of one kv block at one level) or by "row"; queries by "block" (of queries) or, in
    # the other two cases, by "row"; values by "block" if keys are, else by channel of a head.
    scales: str = "head"
    smooth: bool = True  # Take the mean over all tokens off keys and values first.
    rotate: bool = False  # Turn queries and keys first, so that no channel is larger than others.


VARIANTS = {
    "bf16": Variant(),
    "QK e4m3": Variant(logits="e4m3"),
    "QK e4m3, block scales": Variant(logits="e4m3", scales="block"),
    "QK e4m3, row scales": Variant(logits="e4m3", scales="row"),
    "QK e4m3, keys not smoothed": Variant(logits="e4m3", smooth=False),
    "QK e4m3, rotated": Variant(logits="e4m3", rotate=True),
    "PV e4m3": Variant(output="e4m3"),
    "PV e4m3, block scales": Variant(output="e4m3", scales="block"),
    "PV e4m3, values not smoothed": Variant(output="e4m3", smooth=False),
    "both e4m3": Variant("e4m3", "e4m3"),
    "both e4m3, block scales": Variant("e4m3", "e4m3", "block"),
}


def e4m3(numbers: Tensor, largest: Tensor) -> Tensor:
    """Numbers rounded to e4m3 with ``largest``, broadcast, as the largest that there is."""
    scale = LARGEST / largest.clamp(min=1e-30)
    return (numbers * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(numbers.dtype) / scale


def bf16(numbers: Tensor) -> Tensor:
    return numbers.bfloat16().to(numbers.dtype)


def rotation(size: int) -> Tensor:
    """An orthogonal matrix of random signs times Hadamard's, [size, size]; size is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(0, 2, (size, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return matrix * signs / size**0.5


def rounded_rows(rows: PyramidRows, variant: Variant) -> PyramidRows:
    """The keys and values of all levels as a variant stores them."""
    return rows._replace(
        key=_stored(rows.key, rows, variant.logits, variant, by_channel=False),
        value=_stored(rows.value, rows, variant.output, variant, by_channel=True),
    )


def _stored(numbers: Tensor, rows: PyramidRows, name: str, variant: Variant, *, by_channel: bool) -> Tensor:
    if name == "bf16":
        return bf16(numbers)
    finest = rows.level == 1
    mean_token = numbers[finest].mean(0) * variant.smooth
    numbers = numbers - mean_token
    size = numbers.abs()
    if variant.scales == "block":
        number = rows.block * 16 + rows.level  # of a block's rows at a level
        largest = size.new_zeros(int(number.max()) + 1)
        largest = largest.scatter_reduce(0, number, size.amax(1), "amax")[number, None]
    elif by_channel:
        largest = size.amax(0)
    else:
        largest = size.amax(1, keepdim=True) if variant.scales == "row" else size.amax()
    return e4m3(numbers, largest) + mean_token


def rounded_queries(query: Tensor, variant: Variant) -> Tensor:
    """[queries, head_dim] of one block of queries."""
    if variant.logits == "bf16":
        return bf16(query)
    return e4m3(query, query.abs().amax() if variant.scales == "block" else query.abs().amax(1, keepdim=True))


def attend_block(query: Tensor, rows: PyramidRows, scale: float, variant: Variant) -> Tensor:
    """Output of a block of queries over rows that :func:`rounded_rows` made. Sums are of weights before rounding."""
    logits = rounded_queries(query, variant) @ rows.key.mT * scale + rows.count.log()
    weights = (logits - logits.amax(1, keepdim=True)).exp()
    total = weights.sum(1, keepdim=True)
    weights = bf16(weights) if variant.output == "bf16" else e4m3(weights, weights.new_tensor(LARGEST / WEIGHT))
    return weights @ rows.value / total


def attend(case: Case, plan: Plan, variant: Variant | None) -> Tensor:
    """Attention by the plan, no value correction; None = no rounding. Of float64 tensors, [1, tokens, heads, dim]."""
    query, key, value = (tensor[0, plan.order].transpose(0, 1) for tensor in case.inputs)  # copies
    out = torch.empty_like(case.query)
    is_real = torch.ones(case.tokens, dtype=torch.bool)
    for head in range(case.heads):
        rows = pyramid_rows(key[head], value[head], is_real, plan.kv_block_size, plan.num_levels, torch.float64)
        if variant is not None:
            if variant.rotate:
                turn = rotation(key.shape[2])
                rows = rows._replace(key=rows.key @ turn)
                query[head] = query[head] @ turn
            rows = rounded_rows(rows, variant)
        blocks = []
        for block, levels in zip(query[head].split(plan.query_block_size), plan.level_mask[0, head], strict=True):
            read = PyramidRows(*(item[levels[rows.block] == rows.level] for item in rows))
            blocks.append(attend_block(block, read, case.scale, variant) if variant else _exact(block, read, case))
        out[0, plan.order, head] = torch.cat(blocks)
    return out


def _exact(query: Tensor, rows: PyramidRows, case: Case) -> Tensor:
    return (query @ rows.key.mT * case.scale + rows.count.log()).softmax(-1) @ rows.value


def relative(lost: Tensor, expected: Tensor) -> float:
    return float(lost.norm() / expected.norm())


@torch.no_grad()
def measure(case: Case, budget: float) -> Iterator[dict[str, Any]]:
    """A row a variant, after one of the plan without any rounding."""
    case = Case(case.name, case.source, *(tensor.bfloat16().double() for tensor in case.inputs), case.grid)
    plan = build_plan(*(x.float() for x in case.inputs), PSAConfig(compute_budget=budget), grid=case.grid)
    planned, _ = attend_reference(*case.inputs, plan, scale=case.scale, value_correction="covariance")
    exact = attend(case, plan, None)
    for name, variant in {"no rounding": None, **VARIANTS}.items():
        lost = (attend(case, plan, variant) if variant else exact) - exact
        yield {
            "source": case.source,
            "case": case.name,
            "head_dim": case.query.shape[3],
            "budget": budget,
            "variant": name,
            "rounding": round(relative(lost, exact), 6),
            "error": round(relative(planned + lost - case.dense, case.dense), 6),
        }


def main() -> None:
    arguments, rows = arguments_of(__doc__), []
    for case in report_cases(arguments):
        for budget in arguments.budgets:
            rows += measure(case, budget)
        write_rows(arguments.output / "fp8.csv", rows)
    sources = list(dict.fromkeys(row["source"] for row in rows))
    figure = new_figure(4.6 * len(sources) + 2.4, 3.2)
    for axes, source in zip(figure.subplots(1, len(sources), squeeze=False, sharey=True)[0], sources, strict=True):
        for name in VARIANTS:
            part = pick(rows, source=source, variant=name)
            base = pick(rows, source=source, variant="no rounding")
            grown = geometric_mean(r["error"] / b["error"] for r, b in zip(part, base, strict=True))
            rounding = mean(row["rounding"] for row in part)
            worst = max(row["rounding"] for row in part)
            print(f"{source:10} {name:28} rounding {rounding:.4f} (worst {worst:.4f}), error x{grown:.3f}", end=" ")
            print(f"= {mean(row['error'] for row in part):.4f} from {mean(row['error'] for row in base):.4f}")
            axes.barh(name, rounding, color="#2c7fb8")
        axes.invert_yaxis()
        axes.set(title=source, xlabel="mean relative rounding error", xscale="log")
    save_figure(arguments.output / "fp8.png", figure)


if __name__ == "__main__":
    main()
