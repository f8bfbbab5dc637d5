"""The masses' memory: how sampled queries and kv blocks are cut into tiles, and how many heads' are made at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...gpu.sizes import ceil_div, next_power_of_2
from ...gpu.target import INTERPRETED
from . import hopper
from .key_samples import KeySamples
from .tiles import masses_tile


class Masses(NamedTuple):
    """Attention of sampled queries before division. A row is a sampled query; a tile spans ``BLOCKS_N`` kv blocks."""

    mass: Tensor  # [rows, kv_blocks padded to whole tiles]: sums of exp2(logit - maximum), bfloat16 for half precision
    maximum: Tensor  # float32 [rows, tiles]: the largest logit so far
    denominator: Tensor  # float32 [rows]: log2 of the softmax's denominator; inf where there is no query


@dataclass(frozen=True)
class MassesLayout:
    """How the masses of one shape are cut into tiles.

    Attributes:
        padded: rows of a query block, its samples padded to a power of two.
        rows: of one head, padded to whole programs of ``block_m`` rows.
        blocks_n: kv blocks of a tile of ``block_n`` samples; tiles: of a row.
    """

    padded: int
    rows: int
    block_m: int
    block_n: int
    blocks_n: int
    tiles: int
    num_warps: int
    num_stages: int
    is_hopper: bool = False  # made by :mod:`.hopper_masses`


def masses_layout(
    query: Tensor, query_blocks: int, samples: int, keys: KeySamples, *, scale: float, target: str
) -> MassesLayout:
    """For queries [batch, query_length, heads, head_dim] of so many blocks, ``samples`` of each."""
    key_samples = next_power_of_2(keys.samples.shape[2])
    padded = next_power_of_2(samples)
    tile = hopper.masses_tile()
    is_hopper = keys.samples.shape[2] == hopper.KEY_SAMPLES
    is_hopper = is_hopper and hopper.fits_hopper(query, query_blocks * padded, tile.block_m, scale, target)
    if not is_hopper:
        tile = masses_tile(target, query.shape[3], query.dtype)
    block_m = max(tile.block_m, padded)
    blocks_n = max(1, tile.block_n // key_samples)
    return MassesLayout(
        padded=padded,
        rows=ceil_div(query_blocks * padded, block_m) * block_m,
        block_m=block_m,
        block_n=blocks_n * key_samples,
        blocks_n=blocks_n,
        tiles=ceil_div(keys.counts.shape[1], blocks_n),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        is_hopper=is_hopper,
    )


def heads_at_a_time(query: Tensor, layout: MassesLayout, limit: int) -> int:
    """Heads whose masses fit in ``limit`` bytes; at least one."""
    batch, _, heads, _ = query.shape
    numbers = layout.tiles * (layout.blocks_n * _mass_dtype(query).itemsize + 4) + 4
    return min(heads, max(1, limit // (batch * layout.rows * numbers)))


def empty_masses(query: Tensor, layout: MassesLayout, heads: int) -> Masses:
    """Memory for the masses of so many heads at a time."""
    rows = query.shape[0] * heads * layout.rows
    return Masses(
        mass=query.new_empty(rows, layout.tiles * layout.blocks_n, dtype=_mass_dtype(query)),
        maximum=query.new_empty(rows, layout.tiles, dtype=torch.float32),
        denominator=query.new_empty(rows, dtype=torch.float32),
    )


def _mass_dtype(query: Tensor) -> torch.dtype:
    """Masses need the range of float32; the interpreter has no bfloat16."""
    return torch.float32 if INTERPRETED or query.dtype == torch.float32 else torch.bfloat16
