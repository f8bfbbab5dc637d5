"""The torch backend by the conformance suite."""

import pytest
import torch

from psa_diffusers import products
from psa_diffusers.backends import reads, torch_blocks
from psa_diffusers.backends.torch_blocks import attend_torch

from . import conformance


@pytest.mark.parametrize(
    "case", conformance.cases(torch.float32, torch.float16, torch.bfloat16, torch.float64), ids=str
)
@pytest.mark.parametrize("check", conformance.CHECKS)
def test_conforms(check, case):
    check(attend_torch, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", conformance.full_matrix(torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_full_matrix(case):
    conformance.check_random_plans(attend_torch, case)


@pytest.mark.parametrize("case", conformance.cases(torch.float32), ids=str)
@pytest.mark.parametrize("check", conformance.CHECKS)
def test_blocks_alone_and_in_parts(check, case, monkeypatch):
    """What long sequences need: each block of queries on its own, some queries at a time."""
    monkeypatch.setattr(reads, "MOST_ROWS_TOGETHER", 0)
    monkeypatch.setattr(torch_blocks, "MOST_LOGITS", 512)
    monkeypatch.setattr(torch_blocks, "MOST_LOGITS_OF_ONE", 512)
    check(attend_torch, case)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_the_result(threads):
    case = conformance.Case(query_length=300, key_length=300, batch=2, heads=3, order=True)
    inputs, plan = conformance.make_inputs(case), conformance.make_plan(case)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected, _ = attend_torch(*inputs, plan, scale=case.scale)
        torch.set_num_threads(threads)
        found, _ = attend_torch(*inputs, plan, scale=case.scale)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_without_onednn(monkeypatch):
    monkeypatch.setattr(products, "_has_onednn", lambda: False)
    for check in (conformance.check_random_plans, conformance.check_value_correction, conformance.check_isolation):
        check(attend_torch, conformance.cases(torch.float32)[0])
