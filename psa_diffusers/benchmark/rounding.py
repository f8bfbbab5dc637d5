"""How much the number format costs: the error against float64, beside that of dense attention."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..backends.reference import attend_reference
from ..config import PSAConfig
from ..planning.plan import Plan
from .rivals import Attention

HEADS = 3  # that float64 is computed for, evenly spread over all: it is slow
CHUNK = 1024  # queries of dense attention in float64 at a time


def rounding_errors(
    inputs: tuple[Tensor, Tensor, Tensor], out: Tensor, plan: Plan, config: PSAConfig, dense: Attention
) -> dict[str, float]:
    """Relative errors, in the norm, over a few heads.

    Args:
        inputs: query, key, value [batch, seq, heads, head_dim].
        out: What sparse attention made of them by ``plan``.
        dense: The dense attention to compare with.

    Returns:
        ``sparse_error``: of ``out`` against the definition in float64 on the same plan, so that what the plan leaves
        out does not count. ``dense_error``: of dense attention against dense attention in float64. ``error_ratio``.
    """
    heads = _spread(out.shape[2], HEADS)
    precise = [tensor[:, :, heads].double() for tensor in inputs]
    plan_of_heads = _of_heads(plan, heads)
    scale = out.shape[-1] ** -0.5
    corrections = {
        "logit_correction": config.logit_correction,
        "value_correction": config.value_correction or "none",
    }
    true_sparse, _ = attend_reference(*precise, plan_of_heads, scale=scale, **corrections)
    true_dense = _dense(*precise, scale)
    sparse_error = relative_error(out[:, :, heads], true_sparse)
    dense_error = relative_error(dense(*inputs)[:, :, heads], true_dense)
    return {"sparse_error": sparse_error, "dense_error": dense_error, "error_ratio": sparse_error / dense_error}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected, in the latter's dtype."""
    return ((found.to(expected.dtype) - expected).norm() / expected.norm()).item()


def _spread(number: int, few: int) -> list[int]:
    """At most ``few`` indices of ``number``, evenly spread, the first and the last among them."""
    few = min(number, few)
    return [round(i * (number - 1) / max(1, few - 1)) for i in range(few)]


def _of_heads(plan: Plan, heads: list[int]) -> Plan:
    return replace(plan, level_mask=plan.level_mask[:, heads], cache={})


def _dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Dense attention by its formula, a few queries of one head at a time."""
    out = torch.empty_like(query)
    for sample in range(query.shape[0]):
        for head in range(query.shape[2]):
            keys, values = key[sample, :, head], value[sample, :, head]
            for start in range(0, query.shape[1], CHUNK):
                rows = slice(start, start + CHUNK)
                logits = query[sample, rows, head] @ keys.mT * scale
                out[sample, rows, head] = logits.softmax(-1) @ values
    return out
