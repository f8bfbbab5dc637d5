"""Importance, spread and similarity against their definitions in float64."""

import math

import pytest
import torch

from psa_diffusers.planning.blocks import real_positions, unpadded_positions
from psa_diffusers.planning.errors import pair_errors
from psa_diffusers.planning.importance import (
    antidiagonal_importance,
    block_means,
    centroid_energy,
    pooled_importance,
    sampled_importance,
)
from psa_diffusers.planning.sampling import draw_samples
from psa_diffusers.planning.similarity import similarity_cap
from psa_diffusers.planning.spread import measure_spread

CPU = torch.device("cpu")


def tokens(batch, length, heads=2, head_dim=8, seed=0):
    return torch.randn(batch, length, heads, head_dim, generator=torch.Generator().manual_seed(seed))


def real_of(length, block_size, order=None, lengths=None):
    if lengths is None:
        return None
    return real_positions(length, block_size, order, torch.tensor(lengths), CPU)


def blocks_of(tensor, block_size, order=None, lengths=None):
    """[sample][block]: float64 [real tokens, heads, head_dim] and their places in the block."""
    batch, length = tensor.shape[:2]
    order = torch.arange(length) if order is None else order
    out = []
    for sample in range(batch):
        limit = length if lengths is None else lengths[sample]
        runs = [run[run < limit] for run in order.split(block_size)]
        places = [torch.nonzero(run < limit)[:, 0] for run in order.split(block_size)]
        out.append([(tensor[sample, run].double(), place) for run, place in zip(runs, places, strict=True)])
    return out


CASES = [
    dict(length=64),
    dict(length=53),
    dict(length=64, lengths=[64, 37, 0]),
    dict(length=53, lengths=[53, 1, 20], shuffled=True),
]


def case(length, lengths=None, shuffled=False):
    order = torch.randperm(length, generator=torch.Generator().manual_seed(1)) if shuffled else None
    return tokens(3, length), order, lengths


@pytest.mark.parametrize("setting", CASES)
def test_spread_is_the_deviation_within_groups(setting):
    key, order, lengths = case(**setting)
    value = tokens(3, setting["length"], seed=5)
    real = real_of(setting["length"], 16, order, lengths)
    spread = measure_spread(key, value, order, real, 16, 4)
    assert spread.key.shape == (4, 3, 2, -(-setting["length"] // 16), 8)
    keys, values = blocks_of(key, 16, order, lengths), blocks_of(value, 16, order, lengths)
    for sample in range(3):
        for block, (rows, places) in enumerate(keys[sample]):
            if len(rows) == 0:
                assert not spread.key[:, sample, :, block].any()
                continue
            torch.testing.assert_close(spread.key_mean[sample, :, block].double(), rows.mean(0), rtol=1e-5, atol=1e-6)
            for level, size in enumerate((2, 4, 8, 16)):
                for source, got in ((keys, spread.key), (values, spread.value)):
                    rows = source[sample][block][0]
                    deviation = torch.zeros_like(rows)
                    for group in range(16 // size):
                        inside = places // size == group
                        deviation[inside] = rows[inside] - rows[inside].mean(0)
                    expected = deviation.square().mean(0)
                    expected = expected if source is keys else expected.sum(-1)
                    torch.testing.assert_close(got[level, sample, :, block].double(), expected, rtol=1e-5, atol=1e-6)


def test_spread_of_constant_blocks_is_exactly_zero():
    key = tokens(1, 4).repeat_interleave(16, dim=1) * 1000
    spread = measure_spread(key, key, None, None, 16, 4)
    assert not spread.key.any()
    assert not spread.value.any()


@pytest.mark.parametrize("setting", CASES)
def test_all_tokens_sampled_give_the_exact_shares(setting):
    key, order, lengths = case(**setting)
    query, length = tokens(3, 40, seed=9), setting["length"]
    real = real_of(length, 16, order, lengths)
    keys = draw_samples(key, order, real, 16, 16, seed=0, kind="key")
    queries = draw_samples(query, None, None, 8, 8, seed=0, kind="query")
    got = sampled_importance(queries, keys, scale=0.5, reduction="sum")
    peak = sampled_importance(queries, keys, scale=0.5, reduction="max").score
    blocks = blocks_of(key, 16, order, lengths)
    for sample in range(3):
        if lengths is not None and lengths[sample] == 0:
            continue
        logits = [torch.einsum("qhd,khd->hqk", query[sample].double(), rows) * 0.5 for rows, _ in blocks[sample]]
        total = torch.cat(logits, -1).exp().sum(-1)
        for block, part in enumerate(logits):
            share = (part.exp() / total[..., None]).view(2, 5, 8, -1)
            mass = share.sum(-1)
            torch.testing.assert_close(got.score[sample, :, :, block].double(), mass.mean(2), rtol=1e-4, atol=1e-6)
            energy = mass.square().mean(2)
            torch.testing.assert_close(got.energy[sample, :, :, block].double(), energy, rtol=1e-4, atol=1e-6)
            largest = share.amax((2, 3)) if share.shape[-1] else torch.zeros(2, 5).double()
            torch.testing.assert_close(peak[sample, :, :, block].double(), largest, rtol=1e-4, atol=1e-6)


def test_samples_weigh_the_tokens_that_they_stand_for():
    # Equal keys: a block's share is its number of real tokens, whatever was sampled.
    key, query = torch.ones(1, 70, 1, 4), tokens(1, 32, heads=1, head_dim=4)
    queries = draw_samples(query, None, None, 16, 4, seed=0, kind="query")
    for lengths in (None, [41]):
        keys = draw_samples(key, None, real_of(70, 16, None, lengths), 16, 4, seed=0, kind="key")
        score = sampled_importance(queries, keys, scale=1.0, reduction="sum").score
        count = torch.tensor([16.0, 16, 16, 16, 6] if lengths is None else [16.0, 16, 9, 0, 0])
        torch.testing.assert_close(score, (count / count.sum()).expand_as(score))


def test_positions_depend_on_seed_and_block_only():
    ramp = torch.arange(96.0).view(1, 96, 1, 1)
    few = draw_samples(ramp[:, :64], None, None, 16, 4, seed=3, kind="key").rows.flatten(3)
    more = draw_samples(ramp, None, None, 16, 4, seed=3, kind="key").rows.flatten(3)
    assert torch.equal(more[..., :4], few)
    other = draw_samples(ramp, None, None, 16, 4, seed=4, kind="key").rows.flatten(3)
    assert not torch.equal(other, more)
    assert not torch.equal(draw_samples(ramp, None, None, 16, 4, seed=3, kind="query").rows.flatten(3), more)
    others = draw_samples(ramp, None, None, 16, 4, seed=3, kind="key", turn=1).rows.flatten(3)
    # One sample in each quarter of a block, no token twice.
    for turn in (more, others):
        quarters = (turn[0, 0].long() - torch.arange(6) * 16) // 4
        assert torch.equal(quarters.sort(0).values, torch.arange(4)[:, None].expand(4, 6))
    both = torch.cat([more, others])
    assert len(both.unique()) == both.numel()


@pytest.mark.parametrize(("length", "real", "shared"), [(3, 3, 3), (4, 4, 4), (6, 4, 2), (8, 4, 0), (16, 4, 0)])
@pytest.mark.parametrize("is_masked", [False, True])
def test_a_second_turn_takes_what_there_is(length, real, shared, is_masked):
    """Of a short block, or one with padding, the last tokens that are drawn; all of them if they are too few."""
    ramp = torch.arange(16.0 if is_masked else float(length)).view(1, -1, 1, 1)
    mask = real_of(16, 16, None, [length]) if is_masked else None
    turns = [draw_samples(ramp, None, mask, 16, 4, seed=3, kind="query", turn=turn) for turn in (0, 1)]
    tokens = []
    for turn in turns:
        valid = torch.ones(1, 4, 1, dtype=torch.bool) if turn.valid is None else turn.valid
        assert valid.sum() == real
        tokens.append(set(turn.rows[0, 0, :, 0, 0][valid[0, :, 0]].long().tolist()))
        assert len(tokens[-1]) == real and max(tokens[-1]) < length
        if turn.weights is not None:
            assert turn.weights.item() == length / real
    assert len(tokens[0] & tokens[1]) == shared


def test_full_length_padding_is_no_padding():
    key = tokens(2, 53)
    plain = draw_samples(key, None, None, 16, 4, seed=0, kind="key")
    padded = draw_samples(key, None, real_of(53, 16, None, [53, 53]), 16, 4, seed=0, kind="key")
    assert torch.equal(plain.rows, padded.rows)
    assert torch.equal(plain.weights.expand(2, -1), padded.weights)


def test_only_real_keys_are_sampled():
    key = tokens(2, 64)
    key[0, 21:] = float("nan")
    real = real_of(64, 16, None, [21, 64])
    rows = draw_samples(key, None, real, 16, 8, seed=0, kind="key")
    assert bool(rows.rows.isfinite().all())
    assert rows.valid[0].sum(0).tolist() == [8, 5, 0, 0]
    torch.testing.assert_close(rows.weights[0], torch.tensor([2.0, 1.0, 0.0, 0.0]))


@pytest.mark.parametrize("setting", CASES)
def test_pooled_importance_is_attention_of_the_means(setting):
    key, order, lengths = case(**setting)
    query, length = tokens(3, 40, seed=9), setting["length"]
    real = real_of(length, 16, order, lengths)
    real = unpadded_positions(length, 16, CPU) if real is None else real
    means = block_means(query, None, unpadded_positions(40, 16, CPU))
    score = pooled_importance(means, block_means(key, order, real), real.sum(2), scale=0.5).score
    blocks = blocks_of(key, 16, order, lengths)
    for sample in range(3):
        if lengths is not None and lengths[sample] == 0:
            continue
        mean_query = torch.stack([part.double().mean(0) for part in query[sample].split(16)])
        logits = [
            torch.einsum("qhd,hd->hq", mean_query, rows.mean(0)) * 0.5 + math.log(len(rows))
            if len(rows)
            else torch.full((2, 3), -torch.inf).double()
            for rows, _ in blocks[sample]
        ]
        expected = torch.softmax(torch.stack(logits, -1), -1)
        torch.testing.assert_close(score[sample].double(), expected, rtol=1e-4, atol=1e-6)


def antidiagonal(query, key, lengths=None, order=None, reduction="sum"):
    return antidiagonal_importance(
        query,
        key,
        order=order,
        real=real_of(key.shape[1], 16, order, lengths),
        query_block_size=32,
        kv_block_size=16,
        scale=0.5,
        reduction=reduction,
    )


def test_antidiagonal_importance_by_its_definition():
    query, key = tokens(1, 64), tokens(1, 48, seed=4)
    got = antidiagonal(query, key)
    logits = torch.zeros(2, 8, 6).double()
    for step in range(8):
        logits += torch.einsum("qhd,khd->hqk", query[0, step::8].double(), key[0, 7 - step :: 8].double())
    shares = torch.softmax(logits * 0.5 / 8, -1).view(2, 2, 4, 3, 2)
    torch.testing.assert_close(got.score[0].double(), shares.sum(-1).mean(2), rtol=1e-4, atol=1e-6)
    peak = antidiagonal(query, key, reduction="max").score
    torch.testing.assert_close(peak[0].double(), shares.amax((2, 4)), rtol=1e-4, atol=1e-6)


def test_antidiagonal_importance_weighs_real_tokens():
    query, key = tokens(2, 50), torch.ones(2, 45, 2, 8)
    score = antidiagonal(query, key).score
    torch.testing.assert_close(score, (torch.tensor([16.0, 16, 13]) / 45).expand_as(score))
    key[1, 20:] = float("nan")
    score = antidiagonal(query, key, lengths=[45, 20]).score[1]
    torch.testing.assert_close(score, (torch.tensor([16.0, 4, 0]) / 20).expand_as(score))


def test_centroid_energy_by_its_definition():
    query, key = tokens(2, 32), tokens(2, 40, seed=4) * 2
    queries = draw_samples(query, None, None, 16, 16, seed=0, kind="query")
    spread = measure_spread(key, key, None, None, 16, 4)
    counts = unpadded_positions(40, 16, CPU).sum(2)
    got = centroid_energy(queries, spread.key_mean, spread.key[-1], counts, 16, scale=0.5)
    mean, variance = spread.key_mean.double(), spread.key[-1].double()
    rows = query.double().transpose(1, 2) * 0.5
    half = (rows.square() @ variance.transpose(2, 3) / 2).clamp(max=math.log(16))
    share = torch.softmax(rows @ mean.transpose(2, 3) + half + counts.double().log(), -1)
    expected = share.view(2, 2, 2, 16, 3).square().mean(3)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("setting", CASES)
def test_similarity_cap_by_its_definition(setting):
    key, order, lengths = case(**setting)
    key = key + 1.0  # so that the cosines spread around the thresholds
    thresholds = (0.55, 0.5, 0.45)
    real = real_of(setting["length"], 16, order, lengths)
    cap = similarity_cap(key, order, real, 16, thresholds)
    blocks = blocks_of(key, 16, order, lengths)
    seen = set()
    for sample in range(3):
        for block, (rows, places) in enumerate(blocks[sample]):
            for head in range(2):
                expected = 1
                for level, threshold in enumerate(thresholds, start=2):
                    size, cosines = 2 ** (level - 1), []
                    for group in range(16 // size):
                        inside = rows[places // size == group, head]
                        if len(inside):
                            cosines.append(torch.cosine_similarity(inside[0], inside[-1], dim=0))
                    if cosines and torch.stack(cosines).mean() > threshold:
                        expected = level
                assert int(cap[sample, head, block]) == expected
                seen.add(expected)
    assert len(seen) > 1


def errors_of(query, key, value, scale=0.5):
    queries = draw_samples(query, None, None, 16, 16, seed=0, kind="query")
    keys = draw_samples(key, None, None, 16, 16, seed=0, kind="key")
    spread = measure_spread(key, value, None, None, 16, 4)
    importance = sampled_importance(queries, keys, scale=scale, reduction="sum")
    second = centroid_energy(queries, spread.key_mean, spread.key[-1], None, 16, scale=scale)
    errors = pair_errors(importance, second, queries, spread, scale=scale)
    return errors, importance, second, spread


def test_pair_errors_by_their_definition():
    query, key, value = tokens(2, 32), tokens(2, 48, seed=4), tokens(2, 48, seed=5)
    errors, importance, second, spread = errors_of(query, key, value)
    assert errors.shape == (4, 2, 2, 2, 3)
    power = query.double().square().unflatten(1, (2, 16)).mean(2).transpose(1, 2) * 0.5**2
    variance = torch.einsum("bhqd,lbhkd->lbhqk", power, spread.key.double())
    output = importance.score.double() @ spread.value_mean.double()
    distance = torch.cdist(output, spread.value_mean.double()).square()
    attention = (importance.energy.double() * second.double()) ** (0.75 / 2)
    lost = (1 - torch.exp(-variance / 2)) ** 2 * distance
    product = variance * spread.value.double()[:, :, :, None, :]
    unit = output.square().sum(-1).mean(-1)[:, :, None, None]
    expected = attention * (0.1 * product + lost) / unit
    torch.testing.assert_close(errors.double(), expected, rtol=1e-3, atol=1e-9)


def test_pair_errors_vanish_where_pooling_loses_nothing():
    query, key, value = tokens(1, 32), tokens(1, 48, seed=4), tokens(1, 48, seed=5)
    alike = torch.ones_like(value)
    assert float(errors_of(query, key, alike)[0].amax()) < 1e-6 * float(errors_of(query, key, value)[0].amin())
    flat_key = key[:, ::16].repeat_interleave(16, dim=1)
    assert not errors_of(query, flat_key, value)[0].any()
    pairs = key[:, ::2].repeat_interleave(2, dim=1)  # level 2 merges equal keys, level 3 does not
    errors = errors_of(query, pairs, value)[0]
    assert not errors[0].any()
    assert bool((errors[1:] > 0).all())
