"""Pyramid Sparse Attention for Hugging Face Diffusers video pipelines."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .config import PSAConfig

if TYPE_CHECKING:
    from .attention import pyramid_sparse_attention
    from .integration import PSAProcessor, disable_psa, enable_psa
    from .planning import build_plan

__version__ = "0.1.0"

__all__ = ["PSAConfig", "PSAProcessor", "build_plan", "disable_psa", "enable_psa", "pyramid_sparse_attention"]

# Imported when first asked for, so that `import psa_diffusers` loads neither torch nor diffusers.
_HOMES = {
    "PSAProcessor": "integration",
    "build_plan": "planning",
    "disable_psa": "integration",
    "enable_psa": "integration",
    "pyramid_sparse_attention": "attention",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
