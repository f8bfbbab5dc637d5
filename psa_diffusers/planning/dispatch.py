"""Which planner runs: ``torch`` (the definition, any device and every rule) or ``triton`` (fused GPU kernels)."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..config import PSAConfig


def choose_planner(
    query: Tensor, key_length: int, config: PSAConfig, heads_group: Any | None = None
) -> tuple[str, str]:
    """The planner for these queries [batch, seq, heads, head_dim], and why: (name, a sentence for reports)."""
    if heads_group is not None and config.rule == "budget":  # which has one price for all heads
        return "torch", "The planning kernels are not used: other processes hold heads of the layer."
    if config.backend in ("torch", "reference"):
        return "torch", f"The config asks for backend {config.backend!r}."
    obstacle = planner_obstacle(query, key_length, config)
    if obstacle is None:
        return "triton", f"The tensors are on {query.device}, and the planning kernels support them and the config."
    return "torch", f"The planning kernels are not used: {obstacle}."


def planner_obstacle(query: Tensor, key_length: int, config: PSAConfig) -> str | None:
    """Why the planning kernels cannot be used, as a clause for a message; None if they can."""
    if config.target_error is not None:
        return f"they plan with target_error=None alone, but it is {config.target_error!r}"
    if torch.compiler.is_compiling():
        return "torch.compile is tracing, and they are not part of its graph"
    if query.device.type != "cuda" and not (_is_interpreted() and query.device.type == "cpu"):
        return f"the tensors are on {query.device}, not on a CUDA or ROCm GPU"
    obstacle = _import_obstacle()
    if obstacle is not None:
        return obstacle
    from .triton import why_unsupported

    return why_unsupported(query, key_length, config)


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=1)
def _import_obstacle() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        importlib.import_module(".triton", __package__)
    except Exception as error:  # a Triton that does not fit its driver or its torch fails in many ways
        return f"triton does not import ({type(error).__name__}: {error})"
    return None
