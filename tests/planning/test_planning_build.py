"""build_plan as a whole: what every plan must be, whatever the shapes and settings."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planning_reference import dense_attention, masked_attention, relative_error

from psa_diffusers import PSAConfig
from psa_diffusers.planning import build_plan
from psa_diffusers.synthetic import video_like_qkv

RULES = [
    dict(rule="budget", compute_budget=0.15),
    dict(rule="budget", compute_budget=0.4, importance_reduction="max"),
    dict(rule="budget", importance="pooled"),
    dict(rule="budget", importance="antidiagonal"),
    dict(rule="threshold", importance_reduction="max"),
    dict(rule="threshold", importance="antidiagonal", importance_reduction="max"),
    dict(rule="topk"),
    dict(rule="topk", importance="pooled"),
]
CAP = (0.7, 0.6, 0.5)


def small(**changes):
    """Small blocks, so that small sequences have many."""
    return PSAConfig(**{"query_block_size": 16, "kv_block_size": 16, "sampled_queries": 8, "sampled_keys": 4} | changes)


def video(batch=1, grid=(4, 8, 8), heads=2, head_dim=16, extra=0, seed=0):
    query, key, value = video_like_qkv(batch, grid, heads, head_dim, correlation=2.0, seed=seed)
    if extra:
        text = video_like_qkv(batch, (1, 1, extra), heads, head_dim, seed=seed + 1)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip((query, key, value), text, strict=True))
    return query, key, value


def same(first, second):
    same_order = (first.order is None) == (second.order is None)
    same_order = same_order and (first.order is None or torch.equal(first.order, second.order))
    return same_order and torch.equal(first.level_mask, second.level_mask)


@st.composite
def calls(draw):
    """Arguments of a call, over shapes, rules, grids, full tokens and padding."""
    options = dict(draw(st.sampled_from(RULES)))
    options["query_block_size"] = draw(st.sampled_from([8, 16, 32]))
    options["kv_block_size"] = draw(st.sampled_from([16, 32]))
    options["order"] = draw(st.sampled_from(["gilbert", "raster"]))
    if draw(st.booleans()):
        options["similarity_thresholds"] = CAP
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    arguments, length = {}, draw(st.integers(1, 200))
    if draw(st.booleans()):
        arguments["grid"] = draw(st.tuples(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)))
        full = draw(st.integers(0, 20))
        length = math.prod(arguments["grid"]) + full
        if full:
            start = draw(st.integers(0, length - full))
            arguments["full_tokens"] = slice(start, start + full)
    if draw(st.booleans()):
        arguments["key_lengths"] = draw(st.lists(st.integers(0, length), min_size=batch, max_size=batch))
    query_length = length if draw(st.booleans()) else draw(st.integers(1, 100))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    query = torch.randn(batch, query_length, heads, 12, generator=generator)
    key, value = (torch.randn(batch, length, heads, 12, generator=generator) for _ in range(2))
    return (query, key, value, PSAConfig(**options)), arguments


@given(calls())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_every_plan_is_valid(call):
    (query, key, value, config), arguments = call
    plan = build_plan(query, key, value, config, **arguments)
    batch, length, heads, _ = key.shape
    mask, budgeted = plan.level_mask, config.rule == "budget"
    assert mask.dtype == torch.int8
    assert mask.shape == (batch, heads, plan.query_blocks, plan.kv_blocks)
    assert int(mask.min()) >= 0
    assert int(mask.max()) <= config.num_levels + budgeted
    if plan.order is not None:
        assert torch.equal(plan.order.sort().values, torch.arange(length))
    if "grid" not in arguments or query.shape[1] != length:
        assert plan.order is None

    real = plan.real_keys()
    real = torch.ones(batch, length, dtype=torch.bool) if real is None else real
    holds = torch.stack([block.any(1) for block in real.split(config.kv_block_size, dim=1)], dim=1)
    assert not (mask.bool() & ~holds[:, None, None, :]).any()
    attends = (mask > 0).any(-1)
    assert torch.equal(attends, holds.any(1)[:, None, None].expand_as(attends))
    if budgeted:
        assert torch.equal(mask > 0, holds[:, None, None, :].expand_as(mask))

    order = torch.arange(length) if plan.order is None else plan.order
    full = torch.zeros(length, dtype=torch.bool)
    full[arguments.get("full_tokens", slice(0, 0))] = True
    columns = torch.stack([block.any() for block in full[order].split(config.kv_block_size)])
    pinned = columns[None, :].expand(plan.query_blocks, -1)
    if query.shape[1] == length:
        rows = torch.stack([block.any() for block in full[order].split(config.query_block_size)])
        pinned = pinned | rows[:, None]
    expected = holds[:, None, None, :].expand_as(mask).to(torch.int8)
    assert torch.equal(mask[:, :, pinned], expected[:, :, pinned])

    if budgeted:
        check_budget(plan, config, pinned, holds)


def check_budget(plan, config, pinned, holds):
    """No sample above its budget by more than a pair, unless only full pairs and centroids are left; that is noted."""
    costs = plan.level_costs()[plan.level_mask.long()]
    for sample in range(costs.shape[0]):
        pairs = int(holds[sample].sum()) * costs.shape[1] * costs.shape[2]
        spent = float(costs[sample].sum())
        if spent > config.compute_budget * pairs + 1:
            free = plan.level_mask[sample][:, ~pinned & holds[sample][None, :]]
            assert bool((free == config.num_levels + 1).all())
            if bool(holds.all()):
                assert len(plan.notes) == 1
                assert "compute_budget" in plan.notes[0]


@pytest.mark.parametrize("options", RULES)
def test_same_inputs_same_plan_and_the_global_generator_is_untouched(options):
    query, key, value = video()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_plan(query, key, value, small(**options), grid=(4, 8, 8))
    torch.rand(3)
    torch.manual_seed(7)
    assert same(first, build_plan(query, key, value, small(**options), grid=(4, 8, 8)))
    torch.manual_seed(5)
    build_plan(query, key, value, small(**options), grid=(4, 8, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_matters():
    query, key, value = video()
    plans = [build_plan(query, key, value, small(seed=seed), grid=(4, 8, 8)) for seed in (0, 1)]
    assert not same(*plans)


@pytest.mark.parametrize("options", RULES)
@pytest.mark.parametrize("lengths", [None, [256, 100, 0]])
def test_a_sample_does_not_depend_on_the_batch(options, lengths):
    query, key, value = video(batch=3)
    config = small(**options, similarity_thresholds=CAP)
    whole = build_plan(query, key, value, config, grid=(4, 8, 8), key_lengths=lengths)
    for sample in range(3):
        one = slice(sample, sample + 1)
        alone = build_plan(
            query[one],
            key[one],
            value[one],
            config,
            grid=(4, 8, 8),
            key_lengths=None if lengths is None else lengths[one],
        )
        assert torch.equal(whole.level_mask[one], alone.level_mask)


@pytest.mark.parametrize("options", RULES)
def test_what_stands_in_the_padding_does_not_matter(options):
    query, key, value = video(batch=2, extra=30)
    arguments = dict(grid=(4, 8, 8), full_tokens=slice(256, 286), key_lengths=[265, 200])
    config = small(**options, similarity_thresholds=CAP)
    clean = build_plan(query, key, value, config, **arguments)
    for junk in (float("nan"), float("inf"), 1e30):
        dirty_key, dirty_value = key.clone(), value.clone()
        for sample, length in enumerate(arguments["key_lengths"]):
            dirty_key[sample, length:] = junk
            dirty_value[sample, length:] = junk
        assert same(clean, build_plan(query, dirty_key, dirty_value, config, **arguments))


def test_padded_queries_of_text_do_not_move_the_plan():
    """A padded text token is a query too, in a block that is full anyway: the budget of the others stays theirs."""
    query, key, value = video(extra=30)
    arguments = dict(grid=(4, 8, 8), full_tokens=slice(256, 286), key_lengths=[259])
    value[:, 0] *= 100.0
    other = query.clone()
    other[:, 259:, 0] = 50.0 * key[:, :1, 0]  # one head's padding finds the one great value
    plans = [build_plan(queries, key, value, small(compute_budget=0.5), **arguments) for queries in (query, other)]
    assert same(*plans)


@pytest.mark.parametrize("options", RULES)
def test_lengths_without_padding_change_nothing(options):
    query, key, value = video(batch=2, extra=5)
    arguments = dict(grid=(4, 8, 8), full_tokens=slice(256, 261))
    plain = build_plan(query, key, value, small(**options), **arguments)
    assert same(plain, build_plan(query, key, value, small(**options), key_lengths=[261, 261], **arguments))


def test_any_strides_and_dtypes():
    query, key, value = video()
    plan = build_plan(query, key, value, small(), grid=(4, 8, 8))
    heads_first = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key, value)]
    assert same(plan, build_plan(*heads_first, small(), grid=(4, 8, 8)))
    spaced = [torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in (query, key, value)]
    assert same(plan, build_plan(*spaced, small(), grid=(4, 8, 8)))
    assert same(plan, build_plan(*(t.double() for t in (query, key, value)), small(), grid=(4, 8, 8)))
    for dtype in (torch.float16, torch.bfloat16):
        low = build_plan(*(t.to(dtype) for t in (query, key, value)), small(), grid=(4, 8, 8))
        assert float((low.level_mask == plan.level_mask).double().mean()) > 0.8


def test_gradients_are_not_followed():
    query, key, value = (tensor.requires_grad_() for tensor in video())
    assert not build_plan(query, key, value, small(), grid=(4, 8, 8)).level_mask.requires_grad


@pytest.mark.parametrize("budget", [0.05, 0.15, 0.25, 0.6])
def test_budget_is_met_within_two_percent(budget):
    query, key, value = video(grid=(4, 16, 16))
    plan = build_plan(query, key, value, small(compute_budget=max(budget, 1 / 16)), grid=(4, 16, 16))
    assert plan.level_mask[0].numel() >= 1024
    assert plan.compute_budget == pytest.approx(max(budget, 1 / 16), rel=0.02)


def test_budget_one_is_dense_under_every_cap():
    query, key, value = video(batch=2)
    for cap in (None, CAP, (1.0, 1.0, 1.0)):
        config = small(compute_budget=1.0, similarity_thresholds=cap)
        plan = build_plan(query, key, value, config, grid=(4, 8, 8), key_lengths=[256, 90])
        assert plan.compute_budget == 1.0
        assert plan.notes == ()


def test_full_tokens_count_in_the_budget():
    query, key, value = video(extra=32, grid=(4, 16, 16))
    arguments = dict(grid=(4, 16, 16), full_tokens=slice(0, 32))
    plan = build_plan(query, key, value, small(compute_budget=0.3), **arguments)
    assert plan.compute_budget == pytest.approx(0.3, rel=0.02)
    assert plan.notes == ()
    plan = build_plan(query, key, value, small(compute_budget=0.07), **arguments)
    assert plan.compute_budget > 0.07
    assert len(plan.notes) == 1
    stated = float(plan.notes[0].split("costs ")[1].split(",")[0])
    assert plan.compute_budget == pytest.approx(stated, abs=1e-4)


def test_full_tokens_as_slice_and_as_mask_are_the_same():
    query, key, value = video(extra=20)
    mask = torch.zeros(276, dtype=torch.bool)
    mask[:20] = True
    first = build_plan(query, key, value, small(), grid=(4, 8, 8), full_tokens=slice(None, 20))
    assert same(first, build_plan(query, key, value, small(), grid=(4, 8, 8), full_tokens=mask))


@pytest.mark.parametrize("thresholds", [CAP, (0.99, 0.99, 0.99)])
@pytest.mark.parametrize("options", RULES)
def test_similarity_cap_holds(options, thresholds):
    query, key, value = video()
    config = small(**options, similarity_thresholds=thresholds)
    plan = build_plan(query, key, value, config, grid=(4, 8, 8))
    ordered = torch.nn.functional.normalize(key[:, plan.order].double(), dim=-1).unflatten(1, (-1, 16))
    cap = torch.ones(1, 2, 16, dtype=torch.int8)
    for level, threshold in enumerate(thresholds, start=2):
        size = 2 ** (level - 1)
        alike = (ordered[:, :, ::size] * ordered[:, :, size - 1 :: size]).sum(-1).mean(2).transpose(1, 2)
        cap[alike > threshold] = level
    mask = plan.level_mask
    assert bool(((mask <= cap[:, :, None, :]) | (mask == 5)).all())


def test_similarity_cap_of_the_published_rules_is_a_minimum():
    query, key, value = video()
    free = build_plan(query, key, value, small(rule="topk"), grid=(4, 8, 8)).level_mask
    capped = build_plan(
        query, key, value, small(rule="topk", similarity_thresholds=(1.0, 1.0, 1.0)), grid=(4, 8, 8)
    ).level_mask
    assert torch.equal(capped, free.clamp(max=1))


def test_heads_that_need_more_get_more():
    query, key, value = video(heads=4, grid=(4, 16, 16))
    query[:, :, 3] *= 0.01  # flat attention: one centroid a block does
    plan = build_plan(query, key, value, small(), grid=(4, 16, 16))
    spent = plan.level_costs()[plan.level_mask[0].long()].mean((1, 2))
    assert float(spent[3]) < 0.5 * float(spent[0])


@pytest.mark.parametrize(("budget", "at_most"), [(0.15, 0.75), (0.25, 0.75)])
def test_budget_rule_beats_the_published_shares_and_binary(budget, at_most):
    """At equal compute budget, on smooth video-like content; scripts/compare_rules.py has the full comparison."""
    grid = (4, 8, 16)
    query, key, value = video_like_qkv(1, grid, 4, 32, correlation=3.0, noise=0.2, seed=1)
    truth = dense_attention(query, key, value)

    def error(**options):
        config = PSAConfig(query_block_size=32, kv_block_size=32, **options)
        plan = build_plan(query, key, value, config, grid=grid)
        assert plan.compute_budget <= budget * 1.1
        return relative_error(masked_attention(query, key, value, plan), truth)

    psa3 = tuple(share * budget / 0.25 for share in (0.15, 0.10, 0.20, 0.0))
    ours = error(compute_budget=budget)
    assert ours < at_most * error(rule="topk", level_fractions=psa3)
    assert ours < at_most * error(rule="topk", level_fractions=(budget, 0.0, 0.0, 0.0))


def test_finer_budget_means_less_error():
    grid = (4, 8, 16)
    query, key, value = video_like_qkv(1, grid, 2, 32, seed=2)
    truth, errors = dense_attention(query, key, value), []
    for budget in (0.05, 0.15, 0.4, 1.0):
        config = PSAConfig(query_block_size=32, kv_block_size=32, compute_budget=budget)
        plan = build_plan(query, key, value, config, grid=grid)
        errors.append(relative_error(masked_attention(query, key, value, plan), truth))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6


def test_one_token():
    tensor = torch.randn(1, 1, 1, 8)
    plan = build_plan(tensor, tensor, tensor, PSAConfig(compute_budget=1.0))
    assert plan.level_mask.tolist() == [[[[1]]]]
    plan = build_plan(tensor, tensor, tensor, PSAConfig(), grid=(1, 1, 1))
    assert plan.level_mask.tolist() in ([[[[5]]]], [[[[4]]]])


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(8, 32, 32), (21, 30, 52)])
def test_default_settings_at_full_size(grid):
    query, key, value = video_like_qkv(1, grid, 2, 64)
    for budget in (0.02, 0.15, 0.5):
        plan = build_plan(query, key, value, PSAConfig(compute_budget=budget), grid=grid)
        assert plan.compute_budget == pytest.approx(budget, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("options", RULES)
def test_nothing_waits_for_the_gpu(options):
    query, key, value = (tensor.cuda() for tensor in video(batch=2, extra=30))
    arguments = dict(grid=(4, 8, 8), full_tokens=slice(0, 30), key_lengths=torch.tensor([286, 270]).cuda())
    config = small(**options, similarity_thresholds=CAP)
    build_plan(query, key, value, config, **arguments)  # fills the caches
    torch.cuda.set_sync_debug_mode("error")
    try:
        first = build_plan(query, key, value, config, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    again = build_plan(query, key, value, config, **arguments)
    assert same(first, again)
    on_cpu = build_plan(query.cpu(), key.cpu(), value.cpu(), config, **arguments | {"key_lengths": [286, 270]})
    assert torch.equal(first.order.cpu(), on_cpu.order)
    assert float((first.level_mask.cpu() == on_cpu.level_mask).double().mean()) > 0.97
