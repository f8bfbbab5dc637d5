"""The naive rival: it must compute the same as the others, or beating it proves nothing."""

import dataclasses

import pytest
import torch
import triton

from psa_diffusers.backends.triton.inspection import _nvidia_registers, gpu_target, source_of
from psa_diffusers.benchmark.naive import (
    SMALLEST_TILE,
    NaiveLevel,
    NaiveLists,
    naive_launch,
    naive_lists,
    naive_pyramid,
)
from psa_diffusers.planning import Plan
from tests.backends import conformance
from tests.backends.conformance import Case

FP32, FP16 = torch.float32, torch.float16
CASES = [
    Case(FP32, 32, 45, 45, query_block_size=32, kv_block_size=16, num_levels=3, heads=2, order=True),
    Case(FP16, 16, 37, 70, query_block_size=64, kv_block_size=32, num_levels=4, heads=1, batch=2),
    Case(FP32, 80, 33, 97, query_block_size=32, kv_block_size=64, num_levels=2, heads=1),
    Case(FP32, 64, 140, 150, query_block_size=128, kv_block_size=128, num_levels=1, heads=1),  # two tiles a block
]


@pytest.fixture
def attend(interpreter):
    return lambda *inputs, **named: interpreter.call("psa_diffusers.benchmark.naive", "attend_naive", *inputs, **named)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    "check", [conformance.check_pooled_levels, conformance.check_random_plans, conformance.check_empty_rows]
)
def test_conforms(attend, check, case):
    check(attend, case)


def test_padding_is_not_read(attend):
    conformance.check_padding(attend, CASES[0])


def test_lists_hold_what_the_plan_reads():
    case = dataclasses.replace(CASES[0], batch=2)
    plan = conformance.make_plan(case)
    plan.level_mask[0, 0, 0, 0] = case.num_levels + 2  # no such level: skipped, as everywhere
    lists = naive_lists(plan)
    mask = plan.level_mask.flatten(0, 2)
    for row, levels in enumerate(mask):
        for level in range(1, case.num_levels + 2):
            found = lists.blocks[row, lists.stops[row, level - 1] : lists.stops[row, level]]
            assert found.tolist() == (levels == level).nonzero()[:, 0].tolist()
    assert sorted(lists.launch_order.tolist()) == list(range(len(mask)))


@pytest.mark.parametrize("level", [1, 4, 5])
def test_compiles_for_hopper(level):
    """With the tile of the kernel for all GPUs where a block has as many rows, else with the block's."""
    query = torch.empty(1, 4680, 12, 128, dtype=torch.bfloat16, device="meta")
    plan = Plan(torch.empty(1, 12, 37, 74, dtype=torch.int8, device="meta"), 4680, 4680, 128, 64, 4)
    rows = 64 >> (level - 1) if level < 5 else 1
    packed = torch.empty(1, 12, 74 * rows, 128, dtype=torch.bfloat16, device="meta")
    pyramid = NaiveLevel(packed, packed, torch.empty(1, 74 * rows, device="meta"))
    int32 = {"dtype": torch.int32, "device": "meta"}
    lists = NaiveLists(torch.empty(444, 74, **int32), torch.empty(444, 6, **int32), torch.empty(444, **int32))
    so_far, lse = torch.empty_like(query, dtype=torch.float32), torch.empty(1, 12, 4680, device="meta")
    before = None if level == 1 else so_far
    launch = naive_launch(query, pyramid, lists, plan, level, before, so_far, lse, None, 1.0, "sm_90")
    compiled = triton.compile(source_of(launch), target=gpu_target("sm_90"), options=launch.options)
    assert launch.arguments["BLOCK_N"] == max(SMALLEST_TILE, rows)
    assert (launch.arguments["BLOCK_M"], launch.num_warps, launch.num_stages) == (128, 8, 3)
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert _nvidia_registers(compiled)[1] == 0  # bytes spilled


def test_pyramid_pools_real_tokens():
    case = dataclasses.replace(CASES[1], batch=1)
    _, key, value = conformance.make_inputs(case)
    plan = conformance.make_plan(case, key_lengths=[66])
    pyramid = naive_pyramid(key, value, plan)
    torch.testing.assert_close(pyramid[1].key[0, 0, 32], key[0, 64:66, 0].mean(0))  # tokens 64 and 65
    assert pyramid[0].bias[0, 65] == 0 and pyramid[0].bias[0, 66] == -torch.inf
    assert pyramid[-1].bias[0].tolist() == [5.0, 5.0, 1.0]
