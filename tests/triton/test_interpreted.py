"""The kernels on the CPU, under Triton's interpreter, against the float64 reference."""

import dataclasses

import pytest
import torch

from psa_diffusers import PSAConfig, pyramid_sparse_attention
from tests.backends import conformance
from tests.backends.conformance import Case

FP32, FP16 = torch.float32, torch.float16

# Small, since an interpreted launch takes a tenth of a second a block; odd, so that every tail is short.
CONFORMANCE_CASES = [
    Case(FP32, 32, 45, 45, query_block_size=32, kv_block_size=16, num_levels=3, heads=1, order=True),
    Case(FP16, 16, 37, 70, query_block_size=64, kv_block_size=32, num_levels=4, heads=1),
]

# Block sizes x levels x head dims x lengths x dtypes, each against the reference once.
SHAPES = [
    Case(FP32, 64, 150, 150, query_block_size=128, kv_block_size=64, num_levels=4, heads=1, order=True),
    Case(FP16, 64, 150, 150, query_block_size=128, kv_block_size=64, num_levels=4, heads=1, order=True),
    Case(FP32, 80, 33, 97, query_block_size=32, kv_block_size=32, num_levels=4, heads=2),
    Case(FP16, 96, 20, 131, query_block_size=16, kv_block_size=64, num_levels=6, heads=1),
    Case(FP32, 128, 140, 65, query_block_size=256, kv_block_size=128, num_levels=2, heads=1, batch=2),
    Case(FP16, 256, 9, 65, query_block_size=8, kv_block_size=32, num_levels=5, heads=1),
    Case(FP32, 40, 17, 17, query_block_size=4, kv_block_size=8, num_levels=1, heads=1, order=True),
    Case(FP32, 32, 12, 13, query_block_size=16, kv_block_size=2, num_levels=1, heads=1),
    Case(FP32, 64, 1, 1, heads=1),
    Case(FP16, 64, 1, 40, heads=1),
    Case(FP16, 64, 40, 1, heads=1),
]


@pytest.mark.parametrize("case", CONFORMANCE_CASES, ids=str)
@pytest.mark.parametrize("check", conformance.CHECKS)
def test_conforms(interpreter, check, case):
    check(interpreter.attend, case)


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(interpreter, case):
    plan = conformance.make_plan(case, lowest=1 if case.key_length < case.kv_block_size else 0)
    conformance.assert_agrees_with_reference(interpreter.attend, case, conformance.make_inputs(case), plan)


@pytest.mark.parametrize("level", [3, 4, 5])
def test_a_tile_merges_only_the_blocks_of_its_list(interpreter, level):
    """A tile of 64 rows holds 8, 16 or 64 pooled blocks; those between them are skipped, and hold NaN."""
    case = Case(FP32, 32, 20, 20 * 32 - 5, query_block_size=32, kv_block_size=32, num_levels=4, heads=1)
    query, key, value = conformance.make_inputs(case)
    plan = conformance.make_plan(case, level=level)
    plan.level_mask[..., 1::3] = 0
    for block in range(1, plan.kv_blocks, 3):
        key[:, block * 32 : (block + 1) * 32] = torch.nan
        value[:, block * 32 : (block + 1) * 32] = torch.inf
    conformance.assert_agrees_with_reference(interpreter.attend, case, (query, key, value), plan)


def test_an_answer_that_comes_too_late_is_not_the_next_calls(interpreter, monkeypatch):
    with monkeypatch.context() as hasty:
        hasty.setattr(interpreter, "patience", 0)
        with pytest.raises(TimeoutError):
            interpreter.call("time", "sleep", 0.5)
    assert interpreter.call("operator", "add", 1, 2) == 3


def test_levels_beyond_the_centroid_are_skipped(interpreter):
    case = CONFORMANCE_CASES[0]
    inputs, plan = conformance.make_inputs(case), conformance.make_plan(case, lowest=1)
    expected, _ = interpreter.attend(*inputs, plan, scale=1.0)
    unknown = plan.level_mask.clone()
    unknown[..., 0] = case.num_levels + 2
    skipped = plan.level_mask.clone()
    skipped[..., 0] = 0
    found = [
        interpreter.attend(*inputs, dataclasses.replace(plan, level_mask=mask, cache={}), scale=1.0)[0]
        for mask in (unknown, skipped)
    ]
    assert torch.equal(*found)
    assert not torch.equal(found[0], expected)


def test_lists_stay_with_the_plan(interpreter):
    """A plan is used for many calls: the second takes the lists of the first, whatever the dtype."""
    lists = interpreter.call("tests.triton.interpreted_checks", "lists_of_two_calls", Case(FP32, 16, 20, 20, heads=1))
    assert lists == [2, 2]  # the lists, and the totals that come with them


def test_public_operation_takes_this_backend(interpreter):
    """Planned and dispatched by the public function: video tokens in Gilbert order, text at the end, padding."""
    settings = {"query_block_size": 16, "kv_block_size": 16, "num_levels": 3, "compute_budget": 0.3}
    query, key, value = conformance.make_inputs(Case(FP32, 32, 56, 56, heads=2))
    layout = {"grid": (3, 4, 4), "full_tokens": slice(48, 56), "key_lengths": [53], "return_lse": True}
    found = interpreter.call(
        "psa_diffusers",
        "pyramid_sparse_attention",
        query,
        key,
        value,
        PSAConfig(backend="triton", **settings),
        **layout,
    )
    expected = pyramid_sparse_attention(query, key, value, PSAConfig(backend="reference", **settings), **layout)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lengths", [None, [37, 20]])
def test_heads_in_groups_give_the_same(interpreter, lengths):
    """As for long videos: a pyramid for some heads of a sample at a time."""
    case = Case(FP32, 16, 40, 40, query_block_size=32, kv_block_size=16, num_levels=2, heads=3, batch=2, order=True)
    whole, parts = interpreter.call("tests.triton.interpreted_checks", "attention_in_groups", case, lengths)
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", [False, True])
def test_torch_compile_keeps_one_graph(interpreter, order):
    case = Case(FP32, 16, 20, 20, query_block_size=16, kv_block_size=16, num_levels=2, heads=1, order=order)
    plain, compiled = interpreter.call("tests.triton.interpreted_checks", "compiled_attention", case)
    assert torch.equal(plain[0], compiled[0])
    assert torch.equal(plain[1], compiled[1])


@pytest.mark.slow
@pytest.mark.parametrize("case", conformance.cases(FP32, FP16), ids=str)
@pytest.mark.parametrize("check", conformance.CHECKS)
def test_conforms_at_full_size(interpreter, check, case):
    check(interpreter.attend, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", conformance.full_matrix(FP32, FP16), ids=str)
def test_full_matrix(interpreter, case):
    conformance.check_random_plans(interpreter.attend, dataclasses.replace(case, heads=1))
