"""The reference against formulas written apart from it, and its gradients."""

import pytest
import torch

from psa_diffusers.backends.reference import attend_reference

from . import conformance


@pytest.mark.parametrize("case", conformance.cases(torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("check", conformance.CHECKS)
def test_conforms(check, case):
    check(attend_reference, case)


def test_gradients():
    case = conformance.Case(torch.float64, 4, 10, 10, 4, 4, 2, heads=1, order=True)
    plan = conformance.make_plan(case)
    plan.level_mask[:, :, 0] = 0
    inputs = [tensor.requires_grad_() for tensor in conformance.make_inputs(case)]
    for correction in ("none", "variance"):
        assert torch.autograd.gradcheck(
            lambda *tensors, c=correction: attend_reference(*tensors, plan, scale=0.5, logit_correction=c)[0], inputs
        )
