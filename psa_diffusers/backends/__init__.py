"""How a plan is computed: ``reference`` (the definition), ``torch`` (blocked, any device), ``triton`` (GPU kernels).

Every backend has one signature::

    attend(query, key, value, plan, *, scale, logit_correction="none", value_correction="none", return_lse=False)
        -> (out, lse or None)
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

from ..planning.plan import Plan

BACKENDS = {
    "reference": ("reference", "attend_reference"),
    "torch": ("torch_blocks", "attend_torch"),
    "triton": ("triton", "attend_triton"),
}


def choose_backend(config_backend: str, query: Tensor, plan: Plan | None = None) -> tuple[str, str]:
    """The backend for these queries, and why: (name, a sentence for reports).

    Args:
        config_backend: ``PSAConfig.backend``: "auto", or a backend's name.
        query: [batch, seq, heads, head_dim]; its device, dtype, head_dim and requires_grad are read.
        plan: The plan that will be attended with, if it is there: its block sizes may be more than a kernel takes.

    Raises:
        ValueError: an unknown name, or a backend asked for by name that cannot compute this.
    """
    needs_grad = torch.is_grad_enabled() and query.requires_grad
    if config_backend == "auto":
        return _choose(query, plan, needs_grad)
    if config_backend not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, but is {config_backend!r}.")
    if needs_grad and config_backend != "reference":
        raise ValueError(
            f"backend {config_backend!r} has no gradients; use torch.no_grad(), or backend='reference', which has."
        )
    if config_backend == "triton" and (obstacle := triton_obstacle(query, plan)):
        raise ValueError(f"backend 'triton' cannot be used: {obstacle}; use backend='auto' or 'torch'.")
    return config_backend, "The config asks for it."


def _choose(query: Tensor, plan: Plan | None, needs_grad: bool) -> tuple[str, str]:
    if needs_grad:
        return "reference", "Gradients are needed, and only the reference backend has them."
    obstacle = triton_obstacle(query, plan)
    if obstacle is None:
        reason = f"The tensors are on {query.device}, and Triton supports them."
        note = importlib.import_module(".triton", __name__).kernel_note(query, plan) if plan is not None else ""
        return "triton", f"{reason} {note}".rstrip()
    return "torch", f"Triton is not used: {obstacle}."


def triton_obstacle(query: Tensor, plan: Plan | None = None) -> str | None:
    """Why the Triton kernels cannot take these queries, or None if they can."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if query.device.type != "cuda" and not (interpreted and query.device.type == "cpu"):
        return f"the tensors are on {query.device}, not on a CUDA or ROCm GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        module = importlib.import_module(".triton", __name__)
    except Exception as error:  # a Triton that does not fit its driver or its torch fails in many ways
        return f"triton does not import ({type(error).__name__}: {error})"
    if not hasattr(module, "attend_triton"):
        return "this version has no Triton kernels"
    return module.why_unsupported(query, plan) if hasattr(module, "why_unsupported") else None


def get_backend(name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attend function of a backend; its module is imported when first asked for."""
    module, function = BACKENDS[name]
    return getattr(importlib.import_module(f".{module}", __name__), function)
