"""What the backend refuses, and how it says so."""

import dataclasses

import pytest
import torch

from psa_diffusers.backends.triton import attend_triton, hopper, why_unsupported
from psa_diffusers.backends.triton.launch import head_groups
from tests.backends import conformance
from tests.backends.conformance import Case

CASE = Case(torch.float32, 16, 20, 20, query_block_size=16, kv_block_size=16, num_levels=2, heads=1)


def attend(attend_function, case: Case):
    return attend_function(*conformance.make_inputs(case), conformance.make_plan(case), scale=1.0)


def test_cpu_tensors_need_the_interpreter():
    with pytest.raises(ValueError, match=r"attend_triton: the tensors are on cpu, not on a CUDA or ROCm GPU; use"):
        attend(attend_triton, CASE)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dtype": torch.float64}, "dtype must be float32, float16 or bfloat16, but is torch.float64"),
        ({"dtype": torch.bfloat16}, "interpreter does not compute in bfloat16"),
        ({"head_dim": 257}, "head_dim must be at most 256, but is 257"),
        ({"kv_block_size": 2048}, "kv_block_size must be at most 1024, but is 2048"),
    ],
)
def test_unsupported_inputs(interpreter, change, message):
    with pytest.raises(ValueError, match=message):
        attend(interpreter.attend, dataclasses.replace(CASE, **change))


@pytest.mark.parametrize(
    "batch, heads, query_blocks, groups",
    [
        (1, 12, 128, 1),
        (1, 12, 256, 3),
        (2, 3, 1, 1),
        (1, 40, 591, 4),
        (2, 40, 591, 8),
        (1, 48, 139, 4),
        (1, 1, 100_000, 1),
    ],
)
def test_head_groups_cover_all_heads_once(batch, heads, query_blocks, groups):
    found = head_groups(batch, heads, query_blocks)
    assert len(found) == groups
    seen = torch.zeros(batch, heads, dtype=torch.int64)
    for samples, some_heads in found:
        seen[samples, some_heads] += 1
    assert (seen == 1).all()


SUPPORTED = ("sm_90", 128, torch.bfloat16, 128, 64, 4)


@pytest.mark.parametrize(
    "change, clause",
    [
        ({}, None),
        ({0: "sm_80"}, "needs sm_90"),
        ({1: 96}, "head_dim must be one of"),
        ({2: torch.float32}, "dtype must be"),
        ({3: 64}, "query_block_size must be a multiple of 128"),
        ({4: 128}, "kv_block_size must be at most 64"),
        ({5: 5}, "the coarsest of at most 4 levels"),
        ({4: 32}, "must keep 8 rows"),
    ],
)
def test_hopper_kernel_says_what_it_cannot_compute(change, clause):
    found = hopper.hopper_obstacle(*(change.get(place, value) for place, value in enumerate(SUPPORTED)))
    assert found is None if clause is None else clause in found


def test_why_unsupported_is_a_clause():
    obstacle = why_unsupported(torch.empty(1, 4, 1, 16))
    assert obstacle == "the tensors are on cpu, not on a CUDA or ROCm GPU"
