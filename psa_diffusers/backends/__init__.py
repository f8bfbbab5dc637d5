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
from functools import cache
from types import ModuleType

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
        name, reason = _choose(query, plan, needs_grad)
        note = _triton().kernel_note(query, plan) if name == "triton" and plan is not None else ""
        return name, f"{reason} {note}".rstrip()
    check_backend(config_backend, query, plan)
    return config_backend, "The config asks for it."


def find_backend(config_backend: str, query: Tensor, plan: Plan | None = None) -> str:
    """The name that :func:`choose_backend` gives, without the sentence that it makes."""
    if config_backend == "auto":
        return _choose(query, plan, torch.is_grad_enabled() and query.requires_grad)[0]
    check_backend(config_backend, query, plan)
    return config_backend


def check_backend(config_backend: str, query: Tensor, plan: Plan | None = None) -> None:
    """A backend asked for by name can compute this.

    Raises:
        ValueError: it cannot, or the name is unknown.
    """
    if config_backend not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, but is {config_backend!r}.")
    if config_backend != "reference" and torch.is_grad_enabled() and query.requires_grad:
        raise ValueError(
            f"backend {config_backend!r} has no gradients; use torch.no_grad(), or backend='reference', which has."
        )
    if config_backend == "triton" and (obstacle := triton_obstacle(query, plan)):
        raise ValueError(f"backend 'triton' cannot be used: {obstacle}; use backend='auto' or 'torch'.")


def _choose(query: Tensor, plan: Plan | None, needs_grad: bool) -> tuple[str, str]:
    if needs_grad:
        return "reference", "Gradients are needed, and only the reference backend has them."
    obstacle = triton_obstacle(query, plan)
    if obstacle is None:
        return "triton", f"The tensors are on {query.device}, and Triton supports them."
    return "torch", f"Triton is not used: {obstacle}."


def triton_obstacle(query: Tensor, plan: Plan | None = None) -> str | None:
    """Why the Triton kernels cannot take these queries, or None if they can."""
    if query.device.type != "cuda" and not (_is_interpreted() and query.device.type == "cpu"):
        return f"the tensors are on {query.device}, not on a CUDA or ROCm GPU"
    return _import_obstacle() or _triton().why_unsupported(query, plan)


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _import_obstacle() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        _triton()
    except Exception as error:  # a Triton that does not fit its driver or its torch fails in many ways
        return f"triton does not import ({type(error).__name__}: {error})"
    return None


@cache
def _triton() -> ModuleType:
    return importlib.import_module(".triton", __name__)


@cache
def get_backend(name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attend function of a backend; its module is imported when first asked for."""
    module, function = BACKENDS[name]
    return getattr(importlib.import_module(f".{module}", __name__), function)
