"""The attention operations that the processor uses, in one place: replace them here to count or fake them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..config import PSAConfig
from ..planning.plan import Plan


def build_plan(query: Tensor, key: Tensor, value: Tensor, config: PSAConfig, **options: Any) -> Plan:
    """:func:`psa_diffusers.build_plan`."""
    from ..planning import build_plan

    return build_plan(query, key, value, config, **options)


def attend(query: Tensor, key: Tensor, value: Tensor, config: PSAConfig, plan: Plan, scale: float | None) -> Tensor:
    """:func:`psa_diffusers.pyramid_sparse_attention`, with a plan."""
    from ..attention import pyramid_sparse_attention

    return pyramid_sparse_attention(query, key, value, config, plan=plan, scale=scale)


def choose_backend(name: str, query: Tensor, plan: Plan) -> tuple[str, str]:
    """:func:`psa_diffusers.backends.choose_backend`."""
    from ..backends import choose_backend

    return choose_backend(name, query, plan)
