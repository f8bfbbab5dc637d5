"""How much of a query block's attention goes to each key block: exactly, and as the planner estimates it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import PSAConfig
from ..integration import AttentionCall
from ..planning.importance import sampled_importance
from ..planning.sampling import draw_samples


@torch.no_grad()
def exact_mass(call: AttentionCall, config: PSAConfig | None = None, *, head: int = 0, sample: int = 0) -> Tensor:
    """float32 [query_blocks, kv_blocks], rows adding up to 1, by dense attention in the plan's order. No padding."""
    plan = call.plan(config)
    order = slice(None) if plan.order is None else plan.order
    query, key = (tensor[sample, order, head].float() for tensor in (call.query, call.key))
    scale = _scale(call)
    rows = []
    for block in query.split(plan.query_block_size):
        shares = torch.softmax(block @ key.T * scale, dim=-1).mean(0)
        missing = plan.kv_blocks * plan.kv_block_size - len(shares)
        rows.append(torch.nn.functional.pad(shares, (0, missing)).view(plan.kv_blocks, -1).sum(1))
    return torch.stack(rows)


@torch.no_grad()
def sampled_mass(call: AttentionCall, config: PSAConfig | None = None, *, head: int = 0, sample: int = 0) -> Tensor:
    """float32 [query_blocks, kv_blocks]: the estimate from a few sampled queries and keys of every block.

    Raises:
        ValueError: the config estimates importance in another way.
    """
    config = config or PSAConfig()
    if config.importance != "sampled":
        raise ValueError(f"sampled_mass: config must have importance='sampled', but has {config.importance!r}.")
    order = call.plan(config).order
    blocks = {"query": (call.query, config.query_block_size, config.sampled_queries)}
    blocks["key"] = (call.key, config.kv_block_size, config.sampled_keys)
    drawn = {
        kind: draw_samples(tensor[sample : sample + 1], order, None, size, count, seed=config.seed, kind=kind)
        for kind, (tensor, size, count) in blocks.items()
    }
    reduction = config.importance_reduction
    return sampled_importance(drawn["query"], drawn["key"], scale=_scale(call), reduction=reduction).score[0, head]


def _scale(call: AttentionCall) -> float:
    scale = call.options.get("scale")
    return call.query.shape[-1] ** -0.5 if scale is None else scale
