"""Matrix products of the torch operators' paths."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def linear(rows: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    """``rows @ weights.T + bias``: rows [n, k], weights [m, k], bias [m]; float32 or float64.

    Give weights that are contiguous, or the transpose of what is: for other strides oneDNN is a thousand times slower.

    In float32 on a CPU this goes through oneDNN where the build has it: torch's own product takes MKL there, which runs
    at half the speed on processors of other makers.
    """
    plain = rows.dtype != torch.float32 or rows.device.type != "cpu" or torch.compiler.is_compiling()
    if not plain and _has_onednn():  # which the compiler cannot lower when called so
        return torch.ops.mkldnn._linear_pointwise(rows, weights, bias, "none", [], None)
    return torch.nn.functional.linear(rows, weights, bias)


@lru_cache(maxsize=1)
def _has_onednn() -> bool:
    """Whether torch has oneDNN's product with the arguments used here, and it gives what torch's own gives."""
    rows, weights, bias = torch.arange(24.0).view(4, 6), torch.arange(60.0).view(6, 10)[:, 1:8].t() - 7, torch.ones(7)
    try:
        found = torch.ops.mkldnn._linear_pointwise(rows, weights, bias, "none", [], None)
    except Exception:  # an operator of torch's own use, missing or changed
        return False
    return torch.equal(found, torch.nn.functional.linear(rows, weights, bias))
