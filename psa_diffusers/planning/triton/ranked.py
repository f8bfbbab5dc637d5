"""A plan by the rules of the paper, ``topk`` and ``threshold``: its launches in their order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...config import PSAConfig
from ...gpu.kernel_launch import KernelLaunch
from ...gpu.sizes import ceil_div
from ..blocks import Layout
from .cuts import make_cuts
from .ranks import ranks_launch
from .sources import massed_heads, prepare_source


class LevelPlan(NamedTuple):
    """How levels are made."""

    levels: Tensor  # int8 [batch, heads, query_blocks, kv_blocks], filled by the launches
    launches: list[KernelLaunch]
    constants: list[Tensor]  # tables that are read, and kept for the next time


def ranked_plan(
    query: Tensor,
    key: Tensor,
    config: PSAConfig,
    layout: Layout,
    key_lengths: Tensor | None,
    cap: Tensor | None,
    *,
    scale: float,
    full_blocks: int,
    target: str,
) -> LevelPlan:
    """Of the masses of the config's importance the levels, row by row; the masses of some heads after others.

    Args:
        query, key: [batch, seq, heads, head_dim], any strides.
        cap: int8 [batch, heads, kv_blocks], the coarsest levels allowed; None = any.
        full_blocks: so many kv blocks, from the first, have no key missing in any sample of the batch.
    """
    batch, length, heads, _ = query.shape
    blocks = (ceil_div(length, config.query_block_size), ceil_div(key.shape[1], config.kv_block_size))
    levels = query.new_empty(batch, heads, *blocks, dtype=torch.int8)
    where = {"scale": scale, "full_blocks": full_blocks, "target": target}
    source, launches, constants = prepare_source(query, key, config, layout.order, key_lengths, **where)
    cuts, full = make_cuts(config, query.device), (layout.full_query_blocks, layout.full_kv_blocks)
    counts = source.counts if key_lengths is not None else None
    known = {"counts": counts, "cap": cap, "full": full, "is_max": source.is_max, "target": target}
    for masses, some, launch in massed_heads(source, key, config):
        launches += [launch, ranks_launch(masses, source.layout, cuts, levels, some, **known)]
    return LevelPlan(levels, launches, [*constants, cuts.places, cuts.levels])
