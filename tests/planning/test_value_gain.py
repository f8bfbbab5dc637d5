"""The fitted value correction: its gain by the plain definition, and what the backends make of it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from psa_diffusers import PSAConfig, pyramid_sparse_attention
from psa_diffusers.backends.reference import head_covariance
from psa_diffusers.planning import build_plan
from psa_diffusers.planning.value_gain import GAIN_LIMIT, ROWS, sampled_rows
from psa_diffusers.synthetic import video_like_qkv

GRID = (3, 9, 14)  # 378 tokens: the last block is short
CONFIG = PSAConfig(
    query_block_size=32,
    kv_block_size=16,
    num_levels=3,
    compute_budget=0.2,
    logit_correction="none",
    value_correction="fitted",
)


def inputs(seed: int, shared: float = 0.0):
    """Values that share a part with the keys, so that there is a covariance to correct."""
    query, key, value = video_like_qkv(2, GRID, 3, 16, seed=seed, dtype=torch.float64, noise=0.5, temperature=1.5)
    return query, key, value + shared * key


def plain_rows(query, key, value, plan, config, sample, head):
    """For every sampled row: what pooling loses [head_dim], C q of each level [levels, head_dim], the levels' mass."""
    length = query.shape[1]
    order = torch.arange(length) if plan.order is None else plan.order
    limit = length if plan.key_lengths is None else int(plan.key_lengths[sample])
    sizes = [2**level for level in range(1, config.num_levels)] + [config.kv_block_size]
    key, value = key[sample, order, head], value[sample, order, head]
    blocks = [
        [t for t in range(start, min(start + 16, length)) if order[t] < limit]
        for start in range(0, length, config.kv_block_size)
    ]
    real = [token for block in blocks for token in block]
    matrices = []
    for size in sizes:
        groups = [[t for t in real if t // 16 == g * size // 16 and t // size == g] for g in range(-(-length // size))]
        gaps = [(value[g] - value[g].mean(0)).mT @ (key[g] - key[g].mean(0)) for g in groups if g]
        matrices.append(sum(gaps) / len(real))
    for row in sampled_rows(length, config.seed).tolist():
        q = query[sample, order[row], head] * query.shape[-1] ** -0.5
        logits, values, levels = [], [], []
        for number, block in enumerate(blocks):
            level = int(plan.level_mask[sample, head, row // config.query_block_size, number])
            size = [0, 1, *sizes][level]
            for group in {token // size for token in block} if block else ():
                tokens = [token for token in block if token // size == group]
                logits.append(q @ key[tokens].mean(0) + math.log(len(tokens)))
                values.append(value[tokens].mean(0))
                levels.append(level)
        weights = torch.softmax(torch.stack(logits), 0)
        mass = [weights[torch.tensor(levels) == level].sum() for level in range(2, config.num_levels + 2)]
        lost = torch.softmax(key[real] @ q, 0) @ value[real] - weights @ torch.stack(values)
        yield lost, torch.stack([matrix @ q for matrix in matrices]), torch.stack(mass)


def plain_gain(*arguments):
    lost, shifts, mass = (torch.stack(parts) for parts in zip(*plain_rows(*arguments), strict=True))
    whole = shifts[:, -1]
    shares = [((shift * whole).sum() / whole.square().sum()).clamp(0, 1) for shift in shifts.unbind(1)]
    correction = (mass @ torch.stack(shares))[:, None] * whole
    return float(((lost * correction).sum() / correction.square().sum()).clamp(0, GAIN_LIMIT))


@pytest.mark.parametrize("grid", [GRID, None])
@pytest.mark.parametrize("lengths", [None, [378, 200]])
def test_the_gain_is_what_fits_the_sampled_queries_best(grid, lengths):
    query, key, value = inputs(0, shared=1.0)
    lengths = None if lengths is None else torch.tensor(lengths)
    plan = build_plan(query, key, value, CONFIG, grid=grid, key_lengths=lengths)
    assert plan.value_gain.shape == (2, 3) and plan.value_gain.dtype == torch.float32
    for sample, head in [(0, 0), (0, 2), (1, 1)]:
        expected = plain_gain(query, key, value, plan, CONFIG, sample, head)
        assert float(plan.value_gain[sample, head]) == pytest.approx(expected, rel=1e-4)


def test_without_a_covariance_there_is_little_gain_and_none_below_zero():
    query, key, value = inputs(1)
    plan = build_plan(query, key, -value + 0 * key, CONFIG, grid=GRID)
    assert (plan.value_gain >= 0).all() and (plan.value_gain <= GAIN_LIMIT).all()
    nothing = build_plan(query, key, torch.zeros_like(value), CONFIG, grid=GRID)
    assert (nothing.value_gain == 0).all()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_backends_give_back_that_many_times_the_correction(backend):
    query, key, value = inputs(2, shared=1.0)
    config = dataclasses.replace(CONFIG, backend=backend)
    plan = build_plan(query, key, value, config, grid=GRID)
    gain = torch.tensor([[0.0, 0.5, 1.0], [1.5, 0.25, 0.0]])
    plan = dataclasses.replace(plan, value_gain=gain, cache={})
    none, whole = (
        pyramid_sparse_attention(
            *(query, key, value),
            dataclasses.replace(config, value_correction=kind),
            plan=dataclasses.replace(plan, value_gain=None, cache={}),
        )
        for kind in ("none", "covariance")
    )
    fitted = pyramid_sparse_attention(query, key, value, config, plan=plan)
    torch.testing.assert_close(fitted, none + gain[:, None, :, None] * (whole - none))


def test_it_is_better_than_all_or_nothing_where_heads_differ():
    query, key, value = inputs(3)
    query, value = query.clone(), value.clone()
    value[:, :, 0] += 2 * key[:, :, 0]
    query[:, :, 2] *= 4  # peaked: the first order is wrong
    value[:, :, 2] += 2 * key[:, :, 2]
    dense = pyramid_sparse_attention(query, key, value, PSAConfig(compute_budget=1.0))

    def error(kind):
        config = dataclasses.replace(CONFIG, value_correction=kind)
        return float((pyramid_sparse_attention(query, key, value, config, grid=GRID) - dense).norm())

    assert error("fitted") < 0.98 * min(error("none"), error("covariance"))


def test_only_the_fitted_correction_has_a_gain_and_padding_does_not_reach_it():
    query, key, value = inputs(4, shared=1.0)
    assert build_plan(query, key, value, dataclasses.replace(CONFIG, value_correction="covariance")).value_gain is None
    lengths = torch.tensor([300, 378])
    clean = build_plan(query, key, value, CONFIG, grid=GRID, key_lengths=lengths)
    key, value = key.clone(), value.clone()
    key[0, 300:], value[0, 300:] = torch.nan, torch.inf
    spoilt = build_plan(query, key, value, CONFIG, grid=GRID, key_lengths=lengths)
    assert torch.equal(clean.value_gain, spoilt.value_gain) and clean.value_gain.isfinite().all()


def test_rows_cover_the_sequence_and_follow_the_seed():
    rows = sampled_rows(1000, 0)
    assert len(rows) == ROWS and torch.equal(rows * ROWS // 1000, torch.arange(ROWS))
    assert torch.equal(rows, sampled_rows(1000, 0)) and not torch.equal(rows, sampled_rows(1000, 1))
    assert sampled_rows(3, 0).tolist() == [0, 1, 2]


def test_the_reference_covariance_is_the_mean_over_tokens_of_value_and_logit():
    """What the probe's product rests on: C q without C."""
    _, key, value = (x[0, :48, 0] for x in inputs(5))
    query = torch.randn(16, dtype=torch.float64)
    matrix = head_covariance(key, value, torch.ones(48, dtype=torch.bool), 16, 3).matrix
    logits = key @ query
    gaps = logits - logits.view(-1, 16).mean(1).repeat_interleave(16)
    torch.testing.assert_close(matrix @ query, value.mT @ gaps / 48)
