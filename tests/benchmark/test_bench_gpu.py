"""The benchmark on a GPU: run with ``-m gpu``."""

import dataclasses
import json

import pytest
import torch

from psa_diffusers.benchmark import BenchCase, Extras, measure
from psa_diffusers.config import PSAConfig
from tests.backends import conformance
from tests.backends.conformance import Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def attend(*inputs, **named):
    from psa_diffusers.benchmark.naive import attend_naive

    *tensors, plan = inputs
    out, lse = attend_naive(*(tensor.cuda() for tensor in tensors), on_gpu(plan), **named)
    return out.cpu(), None if lse is None else lse.cpu()


def on_gpu(plan):
    moved = {name: getattr(plan, name) for name in ("level_mask", "order", "key_lengths", "value_gain")}
    moved = {name: None if tensor is None else tensor.cuda() for name, tensor in moved.items()}
    return dataclasses.replace(plan, **moved, cache={})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_naive_conforms(dtype):
    case = Case(dtype, 128, 600, 600, query_block_size=128, kv_block_size=64, num_levels=4, order=True)
    conformance.check_random_plans(attend, case)
    conformance.check_pooled_levels(attend, case)


def test_row_holds_kernels_and_rivals():
    case = BenchCase((8, 16, 32), PSAConfig(), heads=4, head_dim=64, dtype="bfloat16", device="cuda")
    row = measure(case, 3, extras=Extras(naive=True, stages=True, rounding=True))
    stages, rivals = json.loads(row["stages"]), json.loads(row["rivals"])
    assert {"dense", "plan", "attend", "whole", "rest"} < set(stages)
    assert any("attention" in name and name.endswith("kernel") for name in stages)
    assert any("pyramid" in name for name in stages)
    assert "naive psa, plan and pyramid given" in rivals and row["naive_level_1"] > 0
    kernels = sum(taken["median"] for name, taken in stages.items() if name.endswith("_kernel"))
    assert 0 < kernels < 2 * stages["whole"]["median"]
    assert row["kernel_tflops"] > 0 and 0 < row["error_ratio"] < 2
