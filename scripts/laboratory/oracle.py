"""The exact first-order error of every block pair at every level: what no estimate can beat, and what it could gain."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from cases import Case
from torch import Tensor

from psa_diffusers.planning.plan import Plan


def pieces(case: Case, plan: Plan) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """For each head and query block: the mass [levels, queries, kv_blocks] and the weighted values
    [levels, queries, kv_blocks, head_dim] that every block contributes at levels 1, 2, ... and the centroid.

    Blocks must be whole.
    """
    order = slice(None) if plan.order is None else plan.order
    query, key, value = (tensor[0, order].transpose(0, 1) for tensor in case.inputs)
    heads, _, head_dim = key.shape
    size = plan.kv_block_size
    factors = [2**level for level in range(plan.num_levels)] + [size]
    for head in range(heads):
        keys, values = (
            [tensor[head].view(-1, size // factor, factor, head_dim).mean(2) for factor in factors]
            for tensor in (key, value)
        )
        for row, queries in enumerate((query[head] * case.scale).split(plan.query_block_size)):
            top = (queries @ key[head].T).amax(1)[:, None, None]
            weights = [
                torch.exp((queries @ pooled.flatten(0, 1).T).view(len(queries), *pooled.shape[:2]) - top) * factor
                for pooled, factor in zip(keys, factors, strict=True)
            ]
            mass = torch.stack([weight.sum(-1) for weight in weights])
            weighted = torch.stack([torch.einsum("qkr,krd->qkd", *pair) for pair in zip(weights, values, strict=True)])
            yield head, row, mass, weighted


def exact_errors(case: Case, plan: Plan) -> Tensor:
    """float32 [levels from 2, 1, heads, query_blocks, kv_blocks]: mean squared first-order output error of each pair,
    in units of the head's mean squared output."""
    errors = torch.empty(plan.num_levels, *plan.level_mask.shape, device=plan.level_mask.device)
    for head, row, mass, weighted in pieces(case, plan):
        total = mass[0].sum(-1)[:, None, None]
        dense = weighted[0].sum(1, keepdim=True) / total
        moved = (weighted[1:] - weighted[0]) - (mass[1:] - mass[0])[..., None] * dense
        errors[:, 0, head, row] = (moved / total).square().sum(-1).mean(1)
    power = case.dense.square().sum(-1).mean(1)[0]
    return errors / power[None, None, :, None, None]
