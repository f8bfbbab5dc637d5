"""Other sparse attentions at the same compute budget: FlexAttention, naive PSA, the authors' implementation."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention import pyramid_sparse_attention
from ..gpu.target import tensor_obstacle
from ..planning import Plan, build_plan
from .cases import BenchCase
from .rivals import Attention, Rival, reason
from .stages import kernel_seconds

Inputs = tuple[Tensor, Tensor, Tensor]
LEVEL_1_REPEATS = 7


@dataclass(frozen=True)
class Extras:
    """What a row measures beside dense attention, planning and sparse attention."""

    flex: bool = False  # FlexAttention with a binary mask of the same budget (compiles for a while)
    naive: bool = False  # naive PSA, see :mod:`.naive`
    official: Path | None = None  # the authors' implementation in this checkout, see :mod:`.official`
    stages: bool = False  # times on the GPU alone, kernel by kernel
    rounding: bool = False  # the error against float64 on the same plan, beside dense attention's


def sparse_rivals(case: BenchCase, inputs: Inputs, plan: Plan, extras: Extras) -> tuple[dict[str, Rival], dict]:
    """Those that are asked for and work here, by name, each run once; and why the others do not."""
    makers: dict[str, Callable[[], dict[str, Rival]]] = {}
    if extras.flex:
        makers["flex, binary mask"] = lambda: {"flex, binary mask": _binary_flex(case, inputs)}
    if extras.naive:
        makers["naive psa"] = lambda: _naive(case, inputs, plan)
    if extras.official is not None:
        makers["official"] = lambda: _official(case, inputs, plan, extras.official)
    found, missing = {}, {}
    for name, make in makers.items():
        try:
            rivals = make()
            for rival in rivals.values():
                rival.run()
            found |= rivals
        except Exception as error:  # kernels that do not compile, packages that do not import, memory that runs out
            missing[name] = reason(error)
    return found, missing


def _official(case: BenchCase, inputs: Inputs, plan: Plan, checkout: Path) -> dict[str, Rival]:
    from .official import official_rivals

    return official_rivals(checkout, case, *inputs, plan.compute_budget)


def _naive(case: BenchCase, inputs: Inputs, plan: Plan) -> dict[str, Rival]:
    """With a pyramid that torch operators make at every call; and with one that is there, so that kernels compare."""
    query, key, value = inputs
    if obstacle := tensor_obstacle(query):
        raise ValueError(obstacle)
    from .naive import attend_levels, naive_lists, naive_pyramid

    lists, ready, scale = naive_lists(plan), naive_pyramid(key, value, plan), case.head_dim**-0.5

    def attend(pyramid: list | None) -> Tensor:
        return attend_levels(query, pyramid or naive_pyramid(key, value, plan), lists, plan, scale)[0]

    return {
        "naive psa, plan given": Rival(lambda: attend(None), plan.compute_budget, plan_given=True),
        "naive psa, plan and pyramid given": Rival(lambda: attend(ready), plan.compute_budget, plan_given=True),
    }


def naive_level_1(case: BenchCase, inputs: Inputs) -> float:
    """Time of the naive kernel over that of the kernel for all GPUs, by GPU time, on a plan of level 1 alone.

    Near 1, or below: the naive kernel loses nothing but by what it is named for.

    Raises:
        ValueError: the tensors are not on a GPU.
    """
    from .naive import attend_levels, naive_lists, naive_pyramid

    query, key, value = inputs
    if query.device.type != "cuda":
        raise ValueError("kernels are timed on a GPU only")
    plan = binary_plan(case, inputs)
    pyramid, lists, scale = naive_pyramid(key, value, plan), naive_lists(plan), case.head_dim**-0.5
    config = replace(case.config, logit_correction="none", value_correction="none", backend="triton")
    ratios = []
    with kernel_for_all_gpus():
        for _ in range(LEVEL_1_REPEATS + 1):
            portable = kernel_seconds(lambda: pyramid_sparse_attention(query, key, value, config, plan=plan))
            naive = kernel_seconds(lambda: attend_levels(query, pyramid, lists, plan, scale, levels=[1]))
            ratios.append(naive["naive_level_kernel"] / portable["attention_kernel"])
    return statistics.median(ratios[1:])  # the first compiles


@contextmanager
def kernel_for_all_gpus() -> Iterator[None]:
    """Inside, Hopper is left to the kernel for all GPUs."""
    from ..backends.triton import hopper

    before, hopper.ENABLED = hopper.ENABLED, False
    try:
        yield
    finally:
        hopper.ENABLED = before


def binary_plan(case: BenchCase, inputs: Inputs) -> Plan:
    """Level 1 or skip, by importance, at the case's compute budget."""
    config = replace(
        case.config,
        rule="topk",
        level_fractions=(case.config.compute_budget or 1.0,) + (0.0,) * (case.config.num_levels - 1),
        **dict.fromkeys(("compute_budget", "target_error", "budget_schedule", "level_thresholds")),
        **dict.fromkeys(("logit_correction", "value_correction")),
    )
    return build_plan(*inputs, config, grid=case.grid, full_tokens=case.full_tokens)


def _binary_flex(case: BenchCase, inputs: Inputs) -> Rival:
    """FlexAttention over a binary plan, on tensors that are put in its order beforehand."""
    plan = binary_plan(case, inputs)
    ordered = [tensor if plan.order is None else tensor[:, plan.order] for tensor in inputs]
    attention = flex_attention(plan)
    return Rival(lambda: attention(*ordered), plan.compute_budget, plan_given=True, in_order=plan.order is None)


def flex_attention(plan: Plan) -> Attention:
    """FlexAttention, compiled, that reads the pairs of a binary plan.

    Blocks are consecutive runs of the tensors' own order: order them beforehand.
    """
    from torch.nn.attention.flex_attention import flex_attention as flex

    mask = flex_block_mask(plan)
    compiled = torch.compile(flex)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return compiled(*heads_first, block_mask=mask).transpose(1, 2)

    return attention


def flex_block_mask(plan: Plan) -> Any:
    """FlexAttention's BlockMask of the pairs that are read; all of them in full, so that no logit is masked."""
    from torch.nn.attention.flex_attention import BlockMask

    read = (plan.level_mask > 0).to(torch.int32)
    counts = read.sum(-1, dtype=torch.int32)
    blocks = read.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return BlockMask.from_kv_blocks(
        *(torch.zeros_like(counts), blocks, counts, blocks),
        BLOCK_SIZE=(plan.query_block_size, plan.kv_block_size),
        seq_lengths=(plan.query_length, plan.key_length),  # whole blocks otherwise: too long for a short last one
    )
