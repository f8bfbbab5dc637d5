"""The true error of one attention call at a few compute budgets, measured on some of its blocks of queries.

The plans are those of the whole call: its one price is shared by all heads and all blocks. Then the chosen blocks
alone are computed, by the plan with the call's own backend, and densely: that is their share of a dense call, and of
each sparse one. Only for the logit correction they stand for all queries, not for themselves alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import PSAConfig
from ..planning.blocks import take_tokens
from ..planning.plan import Plan

BLOCKS = 8  # of queries, at most an eighth of the call's
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the wanted budget


@dataclass(frozen=True, eq=False)
class Probe:
    """What was measured; on the call's device, nothing has been waited for.

    Attributes:
        asked: The compute budgets that were planned for.
        lost: float64 [budgets, batch, heads], squared error of the output, summed over the rows.
        power: float64 [batch, heads], squared length of the dense output of these rows.
    """

    asked: tuple[float, ...]
    lost: Tensor
    power: Tensor


def candidate_budgets(budget: float, kv_block_size: int) -> tuple[float, ...]:
    """Budgets around the wanted one, that a plan can have, rising."""
    return tuple(sorted({min(max(budget * factor, 1 / kv_block_size), 1.0) for factor in FACTORS} - {1.0}))


@torch.no_grad()
def probe_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: PSAConfig,
    budgets: Sequence[float],
    *,
    build_plan: Callable[..., Plan],
    attend: Callable[..., Tensor],
    scale: float | None,
    **where: Any,
) -> Probe:
    """Measure a call.

    Args:
        query, key, value: [batch, seq, heads, head_dim], one sequence.
        config: All settings but the compute budget (or target error).
        budgets: At which to measure.
        build_plan: (query, key, value, config, scale=, **where) -> plan.
        attend: (query, key, value, config, plan, scale) -> output.
        scale: Of the logits; None = the default.
        where: ``grid``, ``full_tokens``, ``key_lengths`` of the call; see :func:`can_probe`.
    """
    lost, rows = [], None
    for budget in budgets:
        chosen = replace(config, compute_budget=budget, target_error=None, budget_schedule=None)
        plan = build_plan(query, key, value, chosen, scale=scale, **where)
        if rows is None:
            rows = SomeRows(query, key, value, plan, scale)
        output = attend(rows.query, rows.key, rows.value, chosen, rows.of_plan(plan), scale)
        lost.append((output.double() - rows.dense).square().sum((1, 3)))
    return Probe(tuple(budgets), torch.stack(lost), rows.dense.square().sum((1, 3)))


def chosen_blocks(whole: int) -> list[int]:
    """Of so many blocks of queries: the middles of equal parts, known without a draw."""
    count = max(1, min(BLOCKS, whole // 8))
    return [(2 * part + 1) * whole // (2 * count) for part in range(count)]


def can_probe(full_tokens: slice | Tensor | None, key_lengths: Tensor | None) -> bool:
    """Whether the padding of a call, if it has some, lies at the end of the block order too."""
    if key_lengths is None or full_tokens is None:
        return True
    return isinstance(full_tokens, slice) and bool(full_tokens.start)


class SomeRows:
    """Some whole blocks of queries of a call, and its keys and values in block order, so that a plan needs no order."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, plan: Plan, scale: float | None) -> None:
        size = plan.query_block_size
        self.blocks = chosen_blocks(max(1, query.shape[1] // size))
        places = torch.cat([torch.arange(block * size, (block + 1) * size) for block in self.blocks])
        places = places[places < query.shape[1]].to(query.device)
        self._tokens = places if plan.order is None else plan.order[places]
        self.query = self.take(query)
        self.key, self.value = (x if plan.order is None else take_tokens(x, plan.order) for x in (key, value))
        self.dense = self._dense(plan, scale)

    def take(self, tokens: Tensor) -> Tensor:
        """[batch, rows, heads, head_dim] of queries or outputs [batch, seq, heads, head_dim]."""
        return take_tokens(tokens, self._tokens)

    def _dense(self, plan: Plan, scale: float | None) -> Tensor:
        """float64 [batch, rows, heads, head_dim]."""
        real = plan.real_keys()
        mask = None if real is None else real[:, None, None, :]
        heads_first = (x.transpose(1, 2) for x in (self.query, self.key, self.value))
        return F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale).transpose(1, 2).double()

    def of_plan(self, plan: Plan) -> Plan:
        """The plan of these rows alone."""
        mask = plan.level_mask[:, :, self.blocks].contiguous()
        return replace(plan, level_mask=mask, order=None, query_length=self.query.shape[1], cache={})
