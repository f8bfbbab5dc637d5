"""What the tests of the rules want from inside the interpreter's process, or from a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from psa_diffusers import PSAConfig
from psa_diffusers.gpu.target import target_of
from psa_diffusers.planning.blocks import Layout
from psa_diffusers.planning.triton import planner, sources
from psa_diffusers.planning.triton.cuts import make_cuts
from psa_diffusers.planning.triton.mass_buffers import Masses, MassesLayout
from psa_diffusers.planning.triton.ranks import ranks_launch
from psa_diffusers.planning.triton.similarity import device_thresholds, similarity_launch


def levels_of_scores(
    score: Tensor,
    config: PSAConfig,
    counted: Tensor | None = None,
    cap: Tensor | None = None,
    full: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """int8 levels of scores [batch, heads, query_blocks, kv_blocks], as if they were the masses of one query each."""
    batch, heads, query_blocks, kv_blocks = score.shape
    tiles = -(-kv_blocks // 8)
    rows = batch * heads * query_blocks
    mass = score.new_full((rows, tiles * 8), torch.nan)
    mass[:, :kv_blocks] = score.flatten(0, 2)
    masses = Masses(mass, score.new_zeros(rows, tiles), score.new_zeros(rows))
    layout = MassesLayout(1, query_blocks, 1, 8, 8, tiles, num_warps=1, num_stages=1)
    levels = torch.full(score.shape, 77, dtype=torch.int8, device=score.device)
    counts = None if counted is None else counted.int() * 3
    known = {"counts": counts, "cap": cap, "full": full, "is_max": False, "target": target_of(score.device)}
    ranks_launch(masses, layout, make_cuts(config, score.device), levels, range(heads), **known).run()
    return levels


def cap_of_keys(
    key: Tensor, order: Tensor | None, key_lengths: Tensor | None, block: int, thresholds: tuple[float, ...]
) -> Tensor:
    """int8 [batch, heads, kv_blocks], see :func:`similarity_launch`."""
    batch, length, heads, _ = key.shape
    cap = torch.full((batch, heads, -(-length // block)), 77, dtype=torch.int8, device=key.device)
    where = {"order": order, "key_lengths": key_lengths, "kv_block_size": block}
    similarity_launch(key, cap, device_thresholds(thresholds, key.device), **where).run()
    return cap


def plan_with_masses_of(size: int, query: Tensor, key: Tensor, value: Tensor, config: PSAConfig) -> tuple[int, Tensor]:
    """Launches, and int8 levels; masses of so many bytes are made at a time, or of a quarter of the keys."""
    before, sources.MASSES_BYTES = sources.MASSES_BYTES, size
    try:
        layout = Layout(None, None, None, 0)
        plan = planner.level_plan(query, key, value, config, layout, None, scale=0.2, target="cpu")
        for launch in plan.launches:
            launch.run()
        return len(plan.launches), plan.levels
    finally:
        sources.MASSES_BYTES = before
