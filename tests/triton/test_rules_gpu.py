"""The kernels of all rules, importances and the cap on a real device: run with ``pytest -m gpu tests/triton``."""

import dataclasses

import pytest
import torch

from psa_diffusers import PSAConfig
from psa_diffusers.planning import build_plan
from psa_diffusers.planning.similarity import similarity_cap
from psa_diffusers.planning.triton import hopper
from psa_diffusers.synthetic import video_like_qkv

from .rule_cases import (
    FRACTIONS,
    THRESHOLDS,
    exact_scores,
    expected_levels,
    limits_of,
    random_scores,
    threshold,
    tied_scores,
    topk,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]

GRID = (4, 20, 26)  # 2080 tokens: 17 query blocks, the last of 32; 33 kv blocks, the last of 32
LONG, SHORT = (1, 2, 40, 1182), (2, 3, 17, 33)  # scores, the rows of several warps and of one
CAP = (0.8, 0.7, 0.6)


def levels_of(score, config, **limits):
    from .rules_checks import levels_of_scores

    moved = {name: _to_cuda(limit) for name, limit in limits.items()}
    return levels_of_scores(score.cuda(), config, **moved).cpu()


def _to_cuda(limit):
    return tuple(part.cuda() for part in limit) if isinstance(limit, tuple) else limit.cuda()


@pytest.mark.parametrize("make", [random_scores, tied_scores])
@pytest.mark.parametrize("shape", [LONG, SHORT], ids=str)
def test_topk_is_exactly_that_of_torch(shape, make):
    score = make(shape)
    for fractions in FRACTIONS:
        assert torch.equal(levels_of(score, topk(fractions)), expected_levels(score, topk(fractions)))


@pytest.mark.parametrize("shape", [LONG, SHORT], ids=str)
def test_threshold_is_exactly_that_of_torch_where_sums_are_exact(shape):
    score = exact_scores(shape)
    for thresholds in THRESHOLDS:
        assert torch.equal(levels_of(score, threshold(thresholds)), expected_levels(score, threshold(thresholds)))


def test_threshold_of_any_scores():
    score, config = random_scores((4, 10, 100, 1182)), threshold((0.7, 0.8, 0.9, 0.9))
    apart = levels_of(score, config) != expected_levels(score, config)
    assert int(apart.sum()) <= 1e-4 * apart.numel()


@pytest.mark.parametrize("config", [topk(FRACTIONS[0]), threshold(THRESHOLDS[0])], ids=["topk", "threshold"])
def test_limits(config):
    score, limits = random_scores(SHORT), limits_of(SHORT)
    assert torch.equal(levels_of(score, config, **limits), expected_levels(score, config, **limits))


@pytest.mark.parametrize("dtype, head_dim", [(torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 96)])
def test_similarity_cap(dtype, head_dim):
    from .rules_checks import cap_of_keys

    _, key, _ = inputs(dtype, head_dim)
    order = torch.randperm(key.shape[1], device="cuda")
    for thresholds in ((0.3, 0.2, 0.1), (0.5, 0.4, 0.35)):
        expected = similarity_cap(key, order, None, 64, thresholds)
        assert (cap_of_keys(key, order, None, 64, thresholds) != expected).double().mean() <= 0.001


def inputs(dtype=torch.bfloat16, head_dim=128, heads=3, batch=1):
    return video_like_qkv(batch, GRID, heads, head_dim, dtype=dtype, device="cuda")


def check(query, key, value, config, **options):
    """As the torch planner on the same device, but for what rounding moves; the same to the bit twice."""
    plan = build_plan(query, key, value, config, **options)
    again = build_plan(query, key, value, config, **options)
    expected = build_plan(query, key, value, dataclasses.replace(config, backend="torch"), **options)
    assert (plan.planner, expected.planner) == ("triton", "torch")
    assert torch.equal(plan.level_mask, again.level_mask)
    assert (plan.level_mask == expected.level_mask).double().mean() >= 0.98
    slack = 0.01 if config.rule == "threshold" else 2 / plan.level_mask[0].numel()
    assert abs(plan.compute_budget - expected.compute_budget) <= slack


RULES = [
    {"rule": "topk"},
    {"rule": "topk", "importance_reduction": "max", "similarity_thresholds": CAP},
    {"rule": "threshold"},
    {"rule": "threshold", "importance_reduction": "max"},
    {"rule": "topk", "importance": "pooled"},
    {"rule": "threshold", "importance": "pooled", "similarity_thresholds": CAP},
    {"rule": "topk", "importance": "antidiagonal"},
    {"similarity_thresholds": CAP},
    {"importance_reduction": "max"},
    {"importance": "pooled"},
    {"importance": "antidiagonal", "importance_reduction": "max"},
]


@pytest.mark.parametrize("settings", RULES, ids=str)
def test_plans_are_those_of_torch(settings):
    check(*inputs(), PSAConfig(**settings), grid=GRID)


@pytest.mark.parametrize("settings", RULES[:8], ids=str)
def test_padding_and_full_tokens(settings):
    query, key, value = inputs(batch=2, dtype=torch.float16, head_dim=64)
    config = PSAConfig(**settings)
    check(query, key, value, config, key_lengths=torch.tensor([2080, 1111], device="cuda"))
    check(query, key, value, config, grid=(4, 20, 25), full_tokens=slice(2000, 2080))


@pytest.mark.parametrize("preset", ["psa-3", "psa-threshold"])
def test_kernel_for_hopper(preset, monkeypatch):
    """Largest samples by the kernel that otherwise long videos alone take."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setattr(hopper, "MIN_PROGRAMS", 0)
    monkeypatch.setattr(hopper, "ENABLED", True)
    check(*inputs(), dataclasses.replace(PSAConfig.preset(preset), seed=104), grid=GRID)


@pytest.mark.parametrize("settings", RULES[1:9:2], ids=str)
def test_nothing_waits_for_the_device(settings):
    tensors, config = inputs(), PSAConfig(**settings)
    expected = build_plan(*tensors, config, grid=GRID).level_mask
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        build_plan(*tensors, config, grid=GRID)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = build_plan(*tensors, config, grid=GRID)
    graph.replay()
    assert torch.equal(plan.level_mask, expected)
