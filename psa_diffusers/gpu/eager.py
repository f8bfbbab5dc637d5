"""Whether a call runs now, or is being traced into a graph."""

from __future__ import annotations

import torch
from torch import Tensor


def is_plain(tensor: Tensor) -> bool:
    """Whether this is a tensor with memory in a call that no one traces, watches or replaces.

    Then a custom operator's function may be called without the operator around it, which takes the host longer than
    some of the kernels that it launches.
    """
    return not torch.compiler.is_compiling() and type(tensor) is Tensor and torch._C._len_torch_dispatch_stack() == 0
