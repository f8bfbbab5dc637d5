"""The torch backend by the conformance suite."""

import pytest
import torch

from psa_diffusers.backends.torch_blocks import attend_torch

from . import conformance


@pytest.mark.parametrize(
    "case", conformance.cases(torch.float32, torch.float16, torch.bfloat16, torch.float64), ids=str
)
@pytest.mark.parametrize("check", conformance.CHECKS)
def test_conforms(check, case):
    check(attend_torch, case)
