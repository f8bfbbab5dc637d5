"""What a test wants to know from inside the interpreter's process."""

import torch

from psa_diffusers.backends.triton import attend_triton
from tests.backends import conformance


def lists_of_two_calls(case: conformance.Case) -> list[int]:
    """Entries in the plan's cache after one call, and after a second in another dtype."""
    plan = conformance.make_plan(case)
    entries = []
    for dtype in (torch.float32, torch.float16):
        attend_triton(*(tensor.to(dtype) for tensor in conformance.make_inputs(case)), plan, scale=1.0)
        entries.append(len(plan.cache))
    return entries
