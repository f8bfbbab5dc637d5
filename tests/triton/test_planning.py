"""The planner's kernels on the CPU, under Triton's interpreter, against the torch planner that defines them."""

import dataclasses

import pytest
import torch

from psa_diffusers import PSAConfig
from psa_diffusers.planning import build_plan
from psa_diffusers.planning.blocks import real_positions, unpadded_positions
from psa_diffusers.planning.budget import Limits, rung_costs, spend, step_prices
from psa_diffusers.planning.dispatch import choose_planner
from psa_diffusers.planning.errors import SHRINKAGE, pair_errors, query_power
from psa_diffusers.planning.importance import centroid_energy, sampled_importance
from psa_diffusers.planning.sampling import draw_samples
from psa_diffusers.planning.spread import measure_spread
from psa_diffusers.planning.triton.spending import FULL, UNCOUNTED
from psa_diffusers.synthetic import video_like_qkv

CHECKS = "tests.triton.planning_checks"
CPU = torch.device("cpu")
SMALL = {"query_block_size": 16, "kv_block_size": 16, "sampled_queries": 8, "sampled_keys": 4}


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and settings of one plan."""

    grid: tuple[int, int, int]
    heads: int = 2
    head_dim: int = 16
    batch: int = 1
    keys: int | None = None  # the first so many tokens alone are keys
    key_lengths: tuple[int, ...] | None = None
    shuffled: bool = False
    dtype: torch.dtype = torch.float32
    settings: tuple[tuple[str, object], ...] = ()

    @property
    def config(self) -> PSAConfig:
        return PSAConfig(**SMALL | dict(self.settings))

    def __str__(self) -> str:
        size = "x".join(map(str, self.grid))
        extras = [f"{name}={value}" for name, value in self.settings]
        return "-".join([size, str(self.dtype)[6:], f"{self.heads}x{self.head_dim}", *extras])


CASES = [
    Case((4, 8, 8)),
    Case((3, 7, 9), batch=2, shuffled=True, settings=(("num_levels", 3),)),
    Case((3, 7, 9), head_dim=40, keys=131, settings=(("sampled_queries", 5), ("sampled_keys", 3))),
    # So many blocks that tiles of samples are whole; a fourth of a tile's columns are no sample.
    Case((3, 11, 17), heads=1, settings=(("sampled_queries", 5), ("sampled_keys", 3))),
    Case((3, 5, 9), batch=3, key_lengths=(135, 61, 0), shuffled=True),
    Case((4, 8, 8), dtype=torch.float16, head_dim=32, settings=(("kv_block_size", 32), ("sampled_queries", 16))),
    Case((4, 5, 5), heads=1, head_dim=96, settings=(("num_levels", 1), ("query_block_size", 8))),
]


def inputs_of(case: Case):
    """query, key, value, order and key_lengths."""
    query, key, value = video_like_qkv(case.batch, case.grid, case.heads, case.head_dim, dtype=case.dtype)
    key, value = key[:, : case.keys], value[:, : case.keys]
    order = None
    if case.shuffled:
        order = torch.randperm(key.shape[1], generator=torch.Generator().manual_seed(1))
    lengths = None if case.key_lengths is None else torch.tensor(case.key_lengths)
    if lengths is not None:  # padding may hold anything
        for sample, length in enumerate(case.key_lengths):
            key[sample, length:] = value[sample, length:] = torch.nan
    return query, key, value, order, lengths


def reference_of(case: Case):
    """Samples of queries (for the second estimate) and keys, spread, importance and second estimate, by torch."""
    query, key, value, order, lengths = inputs_of(case)
    config, scale, length = case.config, 0.3, key.shape[1]
    block = config.kv_block_size
    real = None if lengths is None else real_positions(length, block, order, lengths, CPU)
    drawn = (query, order, None, config.query_block_size, config.sampled_queries)
    first, queries = (draw_samples(*drawn, seed=config.seed, kind="query", turn=turn) for turn in (0, 1))
    keys = draw_samples(key, order, real, block, config.sampled_keys, seed=config.seed, kind="key")
    spread = measure_spread(key, value, order, real, block, config.num_levels)
    importance = sampled_importance(first, keys, scale=scale, reduction="sum")
    counts = (unpadded_positions(length, block, CPU) if real is None else real).sum(2)
    second = centroid_energy(queries, spread.key_mean, spread.key[-1], counts, block, scale=scale)
    return queries, keys, spread, importance, second, counts


@pytest.fixture(scope="module", params=CASES, ids=str)
def stages(request, interpreter):
    """A case, what the kernels made of it, and the reference."""
    case = request.param
    # So little memory for masses that they are made head by head.
    made = interpreter.call(CHECKS, "run_stages", *_arguments(case), 0.3, 2**10)
    return case, made, reference_of(case)


def _arguments(case: Case):
    query, key, value, order, lengths = inputs_of(case)
    return query, key, value, case.config, order, lengths


def samples_with_keys(case: Case) -> list[int]:
    """Samples of the batch that have any real key; the others' numbers mean nothing."""
    lengths = case.key_lengths or (1,) * case.batch
    return [sample for sample, length in enumerate(lengths) if length > 0]


def tolerance(case: Case) -> dict[str, float]:
    return {"rtol": 2e-5, "atol": 1e-6} if case.dtype == torch.float32 else {"rtol": 4e-3, "atol": 2e-3}


def test_statistics(stages):
    case, made, (_, _, spread, _, _, counts) = stages
    found = made.statistics
    torch.testing.assert_close(found.key_mean.float(), spread.key_mean, **tolerance(case))
    torch.testing.assert_close(found.value_mean.float(), spread.value_mean, **tolerance(case))
    torch.testing.assert_close(found.key_spread.float(), spread.key, **tolerance(case))
    torch.testing.assert_close(found.value_spread, spread.value, **tolerance(case))
    assert torch.equal(found.counts.long(), counts.expand(case.batch, -1))


def test_sampled_keys_are_those_of_torch(stages):
    case, made, (_, keys, _, _, _, _) = stages
    samples, bias = made.statistics.samples, made.statistics.sample_bias  # [batch, heads, samples, blocks, head_dim]
    valid = torch.ones(bias.shape, dtype=torch.bool) if keys.valid is None else keys.valid.expand(bias.shape)
    assert torch.equal(torch.isfinite(bias), valid)
    assert torch.equal(samples.float(), keys.rows)
    weights = torch.ones(1, bias.shape[2]) * case.config.kv_block_size / bias.shape[1]
    weights = (weights if keys.weights is None else keys.weights)[:, None, :].expand(bias.shape)
    expected = weights * bias.shape[1] / case.config.kv_block_size  # 1 in full blocks
    torch.testing.assert_close(torch.exp2(bias)[valid], expected[valid])


def test_second_estimate(stages):
    case, made, (queries, _, _, _, second, _) = stages
    kept = samples_with_keys(case)
    rounding = 1e-4 if case.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(made.second[kept], second[kept], rtol=rounding, atol=1e-7)
    power = query_power(queries) * 0.3**2
    torch.testing.assert_close(made.estimates.features.float(), power, rtol=rounding, atol=1e-6)


def test_attention(stages):
    case, made, (_, _, spread, importance, second, _) = stages
    kept = samples_with_keys(case)
    rounding = 1e-4 if case.dtype == torch.float32 else 2e-2
    expected = (importance.energy * second) ** (SHRINKAGE / 2)
    torch.testing.assert_close(made.estimates.attention[kept], expected[kept], rtol=rounding, atol=1e-6)
    output = importance.score @ spread.value_mean
    torch.testing.assert_close(made.estimates.output[kept].float(), output[kept], rtol=rounding, atol=rounding)
    power = made.estimates.output.float().square().sum(-1)
    torch.testing.assert_close(made.estimates.output_power[kept], power[kept])


def test_prices(stages):
    """A bin is 0.8 % wide: rounding moves a price by a bin at most, and seldom."""
    case, made, (queries, _, spread, importance, second, counts) = stages
    errors = pair_errors(importance, second, queries, spread, scale=0.3)
    expected = step_prices(errors, case.config.kv_block_size).long()
    found = made.choices.prices.long()
    if case.key_lengths is not None:
        uncounted = (counts == 0)[None, :, None, None, :].expand_as(found)
        assert (found[uncounted] == UNCOUNTED).all()
        expected = torch.where(uncounted, UNCOUNTED, expected)
    kept = samples_with_keys(case)
    apart = (found - expected)[:, kept].abs()
    if case.dtype == torch.float32:
        assert int(apart.max()) <= 1
        assert float((apart > 0).float().mean()) < 0.01
    else:
        assert float(apart.float().mean()) < 2


def test_levels_of_stages_are_those_of_their_prices(stages):
    case, made, _ = stages
    config, counts = case.config, made.statistics.counts
    prices = made.choices.prices.clamp(min=0)
    limits = Limits(counted=counts > 0)
    expected = spend(prices, config.compute_budget, config.kv_block_size, limits)
    assert torch.equal(made.choices.levels, expected)


@pytest.mark.parametrize("num_levels, block", [(4, 64), (1, 16), (3, 32), (5, 128)])
def test_price_kernel_is_exact(interpreter, num_levels, block):
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(num_levels, 500, generator=generator).cumsum(0)
    errors *= torch.exp(6 * torch.randn(500, generator=generator))
    errors[:, :20] = errors[:, :20].flip(0)  # a pooled level better than a finer one
    errors[:, 20:30] = 0.0
    costs = tuple(rung_costs(block, num_levels))
    found = interpreter.call(CHECKS, "prices_of_errors", errors, costs)
    expected = step_prices(errors.view(num_levels, 1, 1, 1, -1), block).view(num_levels, -1)
    assert torch.equal(found, expected)


SPENDING = [
    # batch, heads, query blocks, kv blocks, budget, padded, full, chunks
    ((1, 2, 16, 32), 0.15, False, False, 2048),
    ((2, 3, 33, 47), 0.15, True, True, 2048),
    ((2, 3, 33, 47), 0.4, True, False, 1),
    ((1, 2, 40, 60), 0.25, False, True, 2),
    ((1, 2, 40, 60), 1.0, False, False, 2),
    ((1, 2, 40, 60), 1 / 64, False, False, 2),
    ((1, 1, 8, 16), 0.05, False, True, 2048),
    ((1, 1, 1, 1), 0.5, False, False, 2048),
]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape, budget, padded, full, chunks", SPENDING)
def test_spending_is_exactly_that_of_torch(interpreter, shape, budget, padded, full, chunks, ties):
    """Levels from prices, pair by pair: full tokens, padding, budgets at either end, all prices alike."""
    batch, _, query_blocks, kv_blocks = shape
    generator = torch.Generator().manual_seed(3)
    errors = torch.rand(4, *shape, generator=generator).cumsum(0)
    errors *= torch.exp(6 * torch.randn(shape, generator=generator))
    prices = step_prices(torch.ones_like(errors) if ties else errors, 64)
    counted = torch.rand(batch, kv_blocks, generator=generator) < 0.7 if padded else None
    rows = torch.rand(query_blocks, generator=generator) < 0.1
    columns = torch.rand(kv_blocks, generator=generator) < 0.1
    pairs = rows[:, None] | columns[None, :] if full else None
    expected = spend(prices, budget, 64, Limits(None, counted, pairs))
    marked = prices.clone()
    if full:
        marked = torch.where(pairs, FULL, marked)
    if padded:
        marked = torch.where(counted[None, :, None, None, :], marked, UNCOUNTED)
    found = interpreter.call(
        CHECKS,
        "levels_of_prices",
        marked.to(torch.int16),
        None if counted is None else counted.int() * 64,
        (rows, columns) if full else (None, None),
        tuple(rung_costs(64, 4)),
        budget,
        chunks,
    )
    assert torch.equal(found, expected)


PLANS = [
    # a case, and options of build_plan
    (Case((4, 8, 8)), {"grid": (4, 8, 8)}),
    (Case((4, 8, 8), settings=(("order", "raster"), ("compute_budget", 0.3))), {"grid": (4, 8, 8)}),
    (Case((3, 9, 10), batch=2, head_dim=24), {"grid": (3, 9, 9), "full_tokens": slice(243, 270)}),
    (Case((3, 9, 10), batch=2), {"key_lengths": [270, 111]}),
    (Case((3, 9, 10)), {"grid": (3, 9, 9), "full_tokens": slice(0, 27), "key_lengths": [250]}),
    (Case((3, 7, 11), keys=150, settings=(("num_levels", 3), ("seed", 5))), {"scale": 0.7}),
    (Case((2, 8, 9), settings=(("query_block_size", 32), ("kv_block_size", 32))), {}),
    (Case((1, 1, 7), heads=1), {}),
]


@pytest.mark.parametrize("case, options", PLANS, ids=lambda part: str(part) if isinstance(part, Case) else "")
def test_whole_plan(interpreter, case, options):
    query, key, value, _, _ = inputs_of(case)
    plan = interpreter.call(CHECKS, "plan", query, key, value, case.config, **options)
    again = interpreter.call(CHECKS, "plan", query, key, value, case.config, **options)
    expected = build_plan(query, key, value, case.config, **options)
    assert (plan.planner, expected.planner) == ("triton", "torch")
    assert torch.equal(plan.level_mask, again.level_mask)
    assert (plan.level_mask == expected.level_mask).double().mean() >= 0.99
    pairs = plan.level_mask[0].numel()
    assert abs(plan.compute_budget - expected.compute_budget) <= 2 / pairs
    if "full_tokens" not in options:
        assert plan.compute_budget <= case.config.compute_budget + 1 / pairs
    if pairs >= 1024 and "full_tokens" not in options:
        assert plan.compute_budget >= 0.98 * case.config.compute_budget


def test_a_second_call_takes_its_own_tensors(interpreter):
    """Launches are remembered by shape: the values, the padding and what is one tensor may be others each time."""
    config = PSAConfig(**SMALL)
    query, key, value, _, _ = inputs_of(Case((2, 5, 9), batch=2, heads=1))
    calls = [
        ((query, key, value), [90, 61]),
        ((value, query, key), [33, 90]),
        ((query, query, query), [90, 61]),
        ((query, key, value), None),
        ((key, value, query), None),
    ]
    for tensors, lengths in calls:
        found = interpreter.call(CHECKS, "plan", *tensors, config, key_lengths=lengths).level_mask
        expected = build_plan(*tensors, config, key_lengths=lengths).level_mask
        assert (found == expected).double().mean() >= 0.99


def test_strides_do_not_matter(interpreter):
    query, key, value, _, _ = inputs_of(Case((3, 7, 9)))
    variants = [
        [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (query, key, value)],
        [torch.stack((tensor, torch.full_like(tensor, torch.nan)), -1)[..., 0] for tensor in (query, key, value)],
    ]
    config = PSAConfig(**SMALL)
    expected = interpreter.call(CHECKS, "plan", query, key, value, config).level_mask
    for variant in variants:
        assert torch.equal(interpreter.call(CHECKS, "plan", *variant, config).level_mask, expected)


def test_padding_changes_nothing_for_the_other_sample(interpreter):
    query, key, value, _, _ = inputs_of(Case((3, 7, 9), batch=2))
    config = PSAConfig(**SMALL)
    alone = interpreter.call(CHECKS, "plan", query[:1], key[:1], value[:1], config, key_lengths=[150]).level_mask
    both = interpreter.call(CHECKS, "plan", query, key, value, config, key_lengths=[150, 0]).level_mask
    assert torch.equal(both[:1], alone)
    assert not both[1].any()


def test_padded_queries_of_text_do_not_move_the_plan(interpreter):
    """A padded text token is a query too, in a block that is full anyway: the budget of the others stays theirs."""
    query, key, value, _, _ = inputs_of(Case((1, 1, 286)))
    options = {"grid": (4, 8, 8), "full_tokens": slice(256, 286), "key_lengths": [259]}
    value[:, 0] *= 100.0
    other = query.clone()
    other[:, 259:, 0] = 50.0 * key[:, :1, 0]  # one head's padding finds the one great value
    config = PSAConfig(**SMALL, compute_budget=0.5)
    plans = [interpreter.call(CHECKS, "plan", queries, key, value, config, **options) for queries in (query, other)]
    assert torch.equal(plans[0].level_mask, plans[1].level_mask)


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({}, "The planning kernels are not used: the tensors are on cpu, not on a CUDA or ROCm GPU."),
        ({"backend": "torch"}, "The config asks for backend 'torch'."),
        ({"target_error": 0.1}, "they plan with target_error=None alone, but it is 0.1"),
    ],
)
def test_choice_says_why(settings, reason):
    name, sentence = choose_planner(torch.empty(1, 4, 1, 16), 4, PSAConfig(**settings))
    assert name == "torch"
    assert reason in sentence


@pytest.mark.parametrize(
    "shape, settings, reason",
    [
        ((1, 4, 1, 300), {}, "head_dim must be at most 256, but is 300"),
        ((1, 4, 1, 16), {"kv_block_size": 1024}, "kv_block_size must be at most 512, but is 1024"),
        ((1, 4, 1, 16), {"sampled_queries": 65}, "sampled_queries must be at most 64, but is 65"),
        ((1, 4, 1, 16), {"sampled_keys": 17}, "sampled_keys must be at most 16, but is 17"),
    ],
)
def test_limits_say_why(interpreter, shape, settings, reason):
    name, sentence = interpreter.call(
        "psa_diffusers.planning.dispatch", "choose_planner", torch.empty(shape), 4, PSAConfig(**settings)
    )
    assert name == "torch"
    assert reason in sentence
