"""What PSA must know of diffusers' caches (``model.enable_cache``): they skip calls, and some extrapolate outputs."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..config import PSAConfig
from .schedule import dense_steps


def cache_config(model: nn.Module) -> Any:
    """The config of the cache that is enabled on this transformer, or None."""
    return getattr(model, "_cache_config", None)


def extrapolation_note(model: nn.Module, config: PSAConfig, total: int) -> str | None:
    """What to change where TaylorSeer would extrapolate from dense outputs and sparse ones together.

    The other caches reuse or blend earlier outputs, so that at the switch a dense one stands in for a sparse one.
    TaylorSeer extends their difference, and with it the difference between dense and sparse attention.
    """
    cache = cache_config(model)
    if type(cache).__name__ != "TaylorSeerCacheConfig" or config.dense_warmup == 0:
        return None
    first_sparse = dense_steps(config.dense_warmup, total)
    needed = first_sparse + cache.max_order + 1
    if first_sparse >= total or cache.disable_cache_before_step >= needed:
        return None
    return (
        f"TaylorSeer extrapolates across the switch from dense to sparse at step {first_sparse}, and enlarges their "
        f"difference: disable_cache_before_step should be at least {needed}, but is {cache.disable_cache_before_step}."
    )
