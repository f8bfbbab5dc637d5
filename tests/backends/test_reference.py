"""The reference against formulas written apart from it, and its gradients."""

import math

import pytest
import torch

from psa_diffusers.backends.reference import attend_reference

from . import conformance


@pytest.mark.parametrize("case", conformance.cases(torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("check", conformance.CHECKS)
def test_conforms(check, case):
    check(attend_reference, case)


def test_value_correction_by_its_formula():
    """Written out token by token: blocks of 4 of 10 tokens, the last short; one head; each level in turn."""
    case = conformance.Case(torch.float64, 3, 10, 10, 16, 4, 2, heads=1)
    query, key, value = conformance.make_inputs(case)
    value = value + key
    centroid, half = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    for size, total in ((4, centroid), (2, half)):
        for start in range(0, 10, size):
            tokens = range(start, min(start + size, 10))
            keys, values = (torch.stack([rows[0, token, 0] for token in tokens]) for rows in (key, value))
            for number in range(len(tokens)):
                total += torch.outer(values[number] - values.mean(0), keys[number] - keys.mean(0)) / 10
    share = (half * centroid).sum() / (centroid * centroid).sum()
    assert 0 < share < 1
    for level, lost in ((1, 0.0), (2, share), (3, 1.0)):
        plan = conformance.make_plan(case, level=level)
        plain, plain_lse = attend_reference(query, key, value, plan, scale=0.7, return_lse=True)
        found, lse = attend_reference(
            query, key, value, plan, scale=0.7, value_correction="covariance", return_lse=True
        )
        expected = plain + 0.7 * lost * (query @ centroid.mT)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(lse, plain_lse)


def test_value_correction_brings_pooled_noise_closer_to_dense():
    """What it is for: keys and values that are projections of the same noise."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 2048, 1, 32, generator=generator, dtype=torch.float64)
    key, value = (tokens @ torch.randn(32, 32, generator=generator, dtype=torch.float64) / 32**0.5 for _ in range(2))
    query = torch.randn(1, 64, 1, 32, generator=generator, dtype=torch.float64)
    case = conformance.Case(torch.float64, 32, 64, 2048, 64, 64, 4, heads=1)
    dense, _ = attend_reference(query, key, value, conformance.make_plan(case, level=1), scale=0.1)
    errors = []
    for correction in ("none", "covariance"):
        plan = conformance.make_plan(case, level=5)
        out, _ = attend_reference(query, key, value, plan, scale=0.1, value_correction=correction)
        errors.append(((out - dense).norm() / dense.norm()).item())
    assert errors[1] < 0.5 * errors[0]


def test_logit_correction_by_its_formula():
    """Written out token by token: blocks of 4 of 10 keys, the last short; 27 queries, of which 3 are looked at."""
    case = conformance.Case(torch.float64, 3, 27, 10, 16, 4, 2, heads=1)
    query, key, value = conformance.make_inputs(case)
    power = sum(query[0, number, 0] ** 2 for number in (0, 13, 26)) / 3
    for level, size in ((1, 1), (2, 2), (3, 4)):
        keys, values, bias = [], [], []
        for start in range(0, 10, size):
            group = key[0, start : start + size, 0]
            keys.append(group.mean(0))
            values.append(value[0, start : start + size, 0].mean(0))
            half = 0.7**2 / 2 * (power * group.var(0, unbiased=False)).sum()
            bias.append(math.log(len(group)) + min(half, math.log(len(group))))
        pooled = (torch.stack(rows)[None, :, None] for rows in (keys, values))
        bias = torch.tensor(bias, dtype=torch.float64)
        expected, expected_lse = conformance.dense(query, *pooled, 0.7, bias)
        plan = conformance.make_plan(case, level=level)
        options = {"scale": 0.7, "logit_correction": "variance", "return_lse": True}
        found, lse = attend_reference(query, key, value, plan, **options)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


def test_logit_correction_gives_pooled_noise_its_mass_back():
    """What it is for: keys that differ inside their blocks attract more than their mean does."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, length, 1, 32, generator=generator, dtype=torch.float64) for length in (256, 2048, 2048)
    )
    case = conformance.Case(torch.float64, 32, 256, 2048, 64, 64, 4, heads=1)
    options = {"scale": 0.2, "return_lse": True}
    _, dense = attend_reference(query, key, value, conformance.make_plan(case, level=1), **options)
    errors = []
    for correction in ("none", "variance"):
        plan = conformance.make_plan(case, level=5)
        _, lse = attend_reference(query, key, value, plan, logit_correction=correction, **options)
        errors.append((lse - dense).abs().mean().item())
    assert errors[1] < 0.3 * errors[0]


def test_gradients():
    case = conformance.Case(torch.float64, 4, 10, 10, 4, 4, 2, heads=1, order=True)
    plan = conformance.make_plan(case)
    plan.level_mask[:, :, 0] = 0
    inputs = [tensor.requires_grad_() for tensor in conformance.make_inputs(case)]
    for options in ({}, {"logit_correction": "variance"}, {"value_correction": "covariance"}):
        assert torch.autograd.gradcheck(
            lambda *tensors, options=options: attend_reference(*tensors, plan, scale=0.5, **options)[0], inputs
        )
