"""The kernels of the rules without a budget, of other importances and of the cap, under Triton's interpreter."""

import pytest
import torch

from psa_diffusers import PSAConfig
from psa_diffusers.planning import build_plan
from psa_diffusers.planning.blocks import real_positions
from psa_diffusers.planning.budget import Limits, rung_costs, spend, step_prices
from psa_diffusers.planning.similarity import similarity_cap
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

CHECKS, RULES = "tests.triton.planning_checks", "tests.triton.rules_checks"
SHAPE = (2, 1, 3, 47)
SMALL = {"query_block_size": 16, "kv_block_size": 16, "sampled_queries": 8, "sampled_keys": 4}
CAP = (0.9, 0.8, 0.7)


def levels_of(interpreter, score, config, **limits):
    return interpreter.call(RULES, "levels_of_scores", score, config, **limits)


@pytest.mark.parametrize("make", [random_scores, tied_scores])
@pytest.mark.parametrize("fractions", FRACTIONS, ids=str)
def test_topk_is_exactly_that_of_torch(interpreter, fractions, make):
    score, config = make(SHAPE), topk(fractions)
    assert torch.equal(levels_of(interpreter, score, config), expected_levels(score, config))


def test_topk_rounds_halves_up(interpreter):
    """Of 50 blocks a quarter is 12.5, and 0.05 + 0.05 + 0.35, whose sum falls short, 22.5."""
    for fractions in ((0.25, 0, 0, 0), (0.05, 0.05, 0.35, 0)):
        score, config = random_scores((1, 1, 1, 50)), topk(fractions)
        levels = levels_of(interpreter, score, config)
        assert torch.equal(levels, expected_levels(score, config))
        assert int((levels > 0).sum()) == (23 if fractions[1] else 13)


@pytest.mark.parametrize("shape", [SHAPE, (1, 1, 3, 1182)], ids=str)
@pytest.mark.parametrize("thresholds", THRESHOLDS, ids=str)
def test_threshold_is_exactly_that_of_torch_where_sums_are_exact(interpreter, thresholds, shape):
    """Some blocks of the long rows have no mass at all."""
    score, config = exact_scores(shape), threshold(thresholds)
    assert torch.equal(levels_of(interpreter, score, config), expected_levels(score, config))


def test_threshold_takes_ties_in_order(interpreter):
    """Also of rows of zeros, and of single blocks. No partial sum of these rows is such a share of the whole."""
    for score in (tied_scores(SHAPE), torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 2, 1)):
        for config in (threshold((0.6181, 0.8181, 0.9181, 0.9181)), threshold((0, 0, 0.5181, 0))):
            assert torch.equal(levels_of(interpreter, score, config), expected_levels(score, config))


def test_threshold_of_any_scores(interpreter):
    """Sums are rounded in float64 by the definition, in whole numbers of 30 bits here: too little to show."""
    score = random_scores((1, 1, 12, 300)) ** 2
    score[..., :6, :] *= 1e-20  # the scale of a row does not matter
    for config in (threshold((0.7, 0.8, 0.9, 0.9)), threshold((0.3, 0.95, 0.99, 0.999))):
        assert torch.equal(levels_of(interpreter, score, config), expected_levels(score, config))


def test_threshold_of_everything(interpreter):
    """All that has any mass, however little: peaked rows leave most blocks less than a sum can resolve."""
    score, config = random_scores((1, 1, 4, 60)) ** 8, threshold((0.5, 0.9, 0.99, 1.0))
    levels = levels_of(interpreter, score, config)
    assert (levels > 0).all()
    expected = expected_levels(score, config)
    assert torch.equal(levels[expected > 0], expected[expected > 0])


@pytest.mark.parametrize("config", [topk(FRACTIONS[0]), topk(FRACTIONS[3]), threshold(THRESHOLDS[0])], ids=str)
def test_limits(interpreter, config):
    score, limits = random_scores(SHAPE), limits_of(SHAPE)
    score[0, 0, 1, 3] = torch.nan
    for some in (limits, {"cap": limits["cap"]}, {"counted": limits["counted"]}, {"full": (None, limits["full"][1])}):
        assert torch.equal(levels_of(interpreter, score, config, **some), expected_levels(score, config, **some))


@pytest.mark.parametrize(
    "head_dim, block, lengths, shuffled, dtype, thresholds",
    [
        (24, 16, None, False, torch.float32, (0.5, 0.4, 0.35)),
        (40, 64, None, True, torch.float16, (0.15, 0.23, 0.22)),
        (16, 32, (189, 70, 0), True, torch.float32, (0.15, 0.2, 0.2)),
        (96, 64, (33, 189, 1), False, torch.float32, (0.45, 0.2, 0.3)),
    ],
)
def test_similarity_cap_is_that_of_torch(interpreter, head_dim, block, lengths, shuffled, dtype, thresholds):
    _, key, _ = video_like_qkv(3, (3, 7, 9), 2, head_dim, dtype=dtype)
    order = torch.randperm(189, generator=torch.Generator().manual_seed(1)) if shuffled else None
    real = None
    if lengths is not None:
        lengths = torch.tensor(lengths)
        real = real_positions(189, block, order, lengths, key.device)
        for sample, length in enumerate(lengths):
            key[sample, length:] = torch.nan
    unpadded = torch.nan_to_num(key)
    expected = similarity_cap(unpadded, order, real, block, thresholds)
    assert len(expected.unique()) >= 3  # or the test would be of little use
    assert torch.equal(interpreter.call(RULES, "cap_of_keys", key, order, lengths, block, thresholds), expected)


@pytest.mark.parametrize("budget", [0.1, 0.4])
def test_spending_under_a_cap_is_exactly_that_of_torch(interpreter, budget):
    """A step onto a forbidden level is paid for with the next: all prices alike, the last bin is filled in part."""
    shape = (2, 2, 9, 31)
    generator = torch.Generator().manual_seed(3)
    cap = torch.randint(1, 5, (*shape[:2], shape[3]), generator=generator, dtype=torch.int8)
    for errors in (torch.ones(4, *shape), torch.rand(4, *shape, generator=generator).cumsum(0)):
        prices = step_prices(errors, 64, cap)
        expected = spend(prices, budget, 64, Limits(cap))
        known = (None, (None, None), tuple(rung_costs(64, 4)), budget, 4)
        assert torch.equal(interpreter.call(CHECKS, "levels_of_prices", prices, *known, cap), expected)


PLANS = [
    # settings, options of build_plan
    ({"rule": "topk", "importance_reduction": "max"}, {}),
    ({"rule": "topk", "sampled_queries": 5, "sampled_keys": 3}, {"grid": (3, 7, 6), "full_tokens": slice(126, 140)}),
    ({"rule": "threshold"}, {"grid": (4, 7, 5)}),
    ({"rule": "threshold", "importance_reduction": "max", "similarity_thresholds": CAP}, {"key_lengths": [140, 61]}),
    ({"rule": "topk", "importance": "pooled", "similarity_thresholds": CAP}, {"key_lengths": [0, 140]}),
    ({"rule": "threshold", "importance": "pooled", "order": "raster"}, {"grid": (4, 7, 5), "scale": -0.3}),
    ({"rule": "topk", "importance": "antidiagonal"}, {"key_lengths": [140, 61]}),
    ({"rule": "threshold", "importance": "antidiagonal", "importance_reduction": "max"}, {"grid": (4, 7, 5)}),
    ({"importance": "antidiagonal"}, {}),
    ({"similarity_thresholds": CAP}, {"grid": (4, 7, 5)}),
    ({"importance_reduction": "max", "similarity_thresholds": CAP}, {"key_lengths": [140, 99]}),
    ({"importance": "pooled", "sampled_queries": 4}, {}),
]


@pytest.mark.parametrize("settings, options", PLANS, ids=str)
def test_whole_plan(interpreter, settings, options):
    lengths = options.get("key_lengths", ())
    sizes = (2, 1) if lengths else (1, 2)  # samples, heads
    query, key, value = video_like_qkv(sizes[0], (4, 7, 5), sizes[1], 24, dtype=torch.float32)
    for sample, length in enumerate(lengths):
        key[sample, length:] = value[sample, length:] = torch.nan  # padding may hold anything
    config = PSAConfig(**SMALL | settings)
    plan = interpreter.call(CHECKS, "plan", query, key, value, config, **options)
    expected = build_plan(query, key, value, config, **options)
    assert (plan.planner, expected.planner) == ("triton", "torch")
    assert (plan.level_mask == expected.level_mask).double().mean() >= 0.99
    assert abs(plan.compute_budget - expected.compute_budget) <= 2 / plan.level_mask[0].numel()


def test_tail_behind_whole_blocks(interpreter):
    """Of 132 kv blocks the first 128 take the way of blocks that miss nothing; the last one has 9 keys."""
    query, key, value = video_like_qkv(1, (3, 27, 26), 1, 16, dtype=torch.float32)
    query, key, value = (tensor[:, :2105] for tensor in (query, key, value))
    config = PSAConfig(query_block_size=512, kv_block_size=16, rule="threshold", importance="pooled")
    found = interpreter.call(CHECKS, "plan", query, key, value, config).level_mask
    assert torch.equal(found, build_plan(query, key, value, config).level_mask)


def test_a_second_call_takes_its_own_tensors(interpreter):
    """Launches and tables are remembered by shape; the values and the padding may be others."""
    query, key, value = video_like_qkv(1, (1, 7, 10), 1, 16, dtype=torch.float32)
    for importance in ("sampled", "pooled", "antidiagonal"):
        config = PSAConfig(**SMALL, rule="topk", importance=importance, similarity_thresholds=CAP)
        for tensors, lengths in (((query, key, value), [70]), ((key, query, value), [33])):
            found = interpreter.call(CHECKS, "plan", *tensors, config, key_lengths=lengths).level_mask
            expected = build_plan(*tensors, config, key_lengths=lengths).level_mask
            assert torch.equal(found, expected)


def test_masses_of_a_few_heads_at_a_time(interpreter):
    """Half precision and several launches: the same levels as those of all heads at once."""
    query, key, value = video_like_qkv(1, (4, 7, 5), 3, 64, dtype=torch.float16)
    config = PSAConfig(**SMALL, rule="topk", importance_reduction="max")
    (few, whole), (more, parts) = (
        interpreter.call(RULES, "plan_with_masses_of", size, query, key, value, config) for size in (2**25, 1)
    )
    assert (few, more) == (3, 7)
    assert torch.equal(whole, parts)
    expected = build_plan(query, key, value, config, scale=0.2).level_mask
    assert (whole == expected).double().mean() >= 0.99


def test_rows_that_are_too_long(interpreter):
    query = torch.empty(1, 8193 * 2, 1, 16)
    settings = {"kv_block_size": 2, "num_levels": 1, "rule": "topk", "level_fractions": (0.2,)}
    name, sentence = interpreter.call(
        "psa_diffusers.planning.dispatch", "choose_planner", query, query.shape[1], PSAConfig(**settings)
    )
    assert name == "torch"
    assert "with rule='topk' there must be at most 8192 kv blocks, but there are 8193" in sentence
