"""Levels by the rules of the paper, ``topk`` and ``threshold``: what :mod:`..levels` defines, without a sort.

A program holds a row of scores. A rule cuts the row in rank order, at most once a level: at a number of blocks (topk)
or at a share of their mass (threshold). Where a cut lies is found by halving an interval of scores, which, being no
negative numbers, are ordered as their bits are; what is left in it, in the end equal scores, is taken in index order.
Masses are added up as whole numbers, so that no order of adding changes them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...config import PSAConfig
from ...gpu.kernel_launch import KernelLaunch
from ...gpu.sizes import next_power_of_2
from .mass_buffers import Masses, MassesLayout
from .shares import RUN

MAX_KV_BLOCKS = 8192  # of a row: a mass has up to 49 bits, and the sum of a row's fits 62
SAMPLES_AT_A_TIME = 4  # whose masses are under way together
UNIT_EXPONENT = tl.constexpr(1023 + 127 + 48)  # of the largest mass, 49 bits; and the biases of float64 and float32


class Cuts(NamedTuple):
    """Where a row is cut: what is before cut c in rank order, and before none that follows it, gets ``levels[c]``."""

    is_threshold: bool
    places: Tensor  # float64 [cuts]: shares of the row's mass (threshold) or of its blocks (topk); falling
    levels: Tensor  # int32 [cuts]


def make_cuts(config: PSAConfig, device: torch.device) -> Cuts:
    """The cuts of the config's rule."""
    return _make_cuts(config.rule, config.level_thresholds or config.level_fractions, device)


@lru_cache(maxsize=64)
def _make_cuts(rule: str, values: tuple[float, ...], device: torch.device) -> Cuts:
    """Levels that no block can get have no cut."""
    ends = values if rule == "threshold" else [sum(values[: level + 1]) for level in range(len(values))]
    cuts = []
    for level, end in enumerate(ends, start=1):
        if end > (cuts[-1][0] if cuts else 0.0):
            cuts.append((end, level))
    is_threshold = rule == "threshold" and bool(cuts)
    cuts = cuts or [(0.0, 1)]  # no block before any cut: as with topk the top one alone
    cuts.reverse()
    places = torch.tensor([end for end, _ in cuts], dtype=torch.float64)
    return Cuts(
        is_threshold, places.to(device), torch.tensor([level for _, level in cuts], dtype=torch.int32).to(device)
    )


@triton.jit
def _scores(
    masses,
    maxima,
    denominators,
    first_row,
    kv_blocks,
    width,
    tiles,
    PADDED: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS_N: tl.constexpr,
    RUN: tl.constexpr,
    IS_MAX: tl.constexpr,
):
    """float32 [BLOCK_N]: the shares of a query block's samples, added up, or the largest; 0 from kv_blocks on.

    A sum ranks as the mean does, and both rules are about ranks and parts of the row's whole.
    """
    run = tl.arange(0, BLOCK_N // RUN) * RUN
    block = run[:, None] + tl.arange(0, RUN)[None, :]
    score = tl.zeros([BLOCK_N // RUN, RUN], tl.float32)
    for step in range(0, PADDED, STEP):
        for sample in tl.static_range(STEP):
            row = first_row + step + sample
            mass = tl.load(masses + row * width + block, mask=block < kv_blocks, other=0.0).to(tl.float32)
            largest = tl.load(maxima + row * tiles + run // BLOCKS_N, mask=run < kv_blocks, other=0.0)
            share = mass * tl.exp2(largest - tl.load(denominators + row))[:, None]
            score = tl.maximum(score, share) if IS_MAX else score + share
    return tl.reshape(score, [BLOCK_N])


@triton.jit
def _whole_masses(score, bits):
    """int64: the scores in units that leave the largest 49 bits. Exact but for scores below 2^-25 of the largest."""
    exponent = (tl.maximum(tl.max(bits, axis=0), 0) >> 23).to(tl.int64)
    unit = ((-exponent + UNIT_EXPONENT) << 52).to(tl.float64, bitcast=True)
    return (score.to(tl.float64) * unit).to(tl.int64)


@triton.jit
def _narrowed(bits, amount, goal, low, high, low_sum, high_sum, width):
    """Halves the interval [low, high) down to ``width``, or until nothing beyond the goal is left in it.

    The amounts of the entries from ``low`` on add up to ``low_sum``, not below the goal, those from ``high`` on to
    ``high_sum``, below it.
    """
    while (high - low > width) & (low_sum > goal):
        middle = low + (high - low) // 2
        total = tl.sum(tl.where(bits >= middle, amount, 0), axis=0)
        is_enough = total >= goal
        low = tl.where(is_enough, middle, low)
        low_sum = tl.where(is_enough, total, low_sum)
        high = tl.where(is_enough, high, middle)
        high_sum = tl.where(is_enough, high_sum, total)
    return low, high, low_sum, high_sum


@triton.jit
def _is_before(bits, amount, total, goal):
    """bool [BLOCK_N]: whether the amounts of all entries of lower rank add up to less than ``goal``.

    Args:
        bits: int32 [BLOCK_N], of the scores; -1 for entries that do not count.
        amount: of the entries, 0 for those. ``total`` is their sum; ``goal``, at most that or 1, of the same type.
    """
    low = tl.zeros([], tl.int32)
    high = tl.max(bits, axis=0) + 1
    low, high, low_sum, high_sum = _narrowed(bits, amount, goal, low, high, total, tl.zeros_like(total), 1024)
    is_left = (bits >= low) & (bits < high)
    if tl.sum(is_left.to(tl.int32), axis=0) > 1:  # else the one entry is the last before the goal
        low, high, low_sum, high_sum = _narrowed(bits, amount, goal, low, high, low_sum, high_sum, 1)
        is_left = (bits >= low) & (bits < high)
    left = tl.where(is_left, amount, 0)
    return (bits >= high) | (is_left & (tl.cumsum(left, axis=0) - left < goal - high_sum))


@triton.jit
def ranks_kernel(
    masses,
    maxima,
    denominators,
    counts,
    cap,
    full_query,
    full_kv,
    places,
    cut_levels,
    levels,
    heads,
    first_head,
    heads_here,
    query_blocks,
    kv_blocks,
    rows_of_head,
    width,
    tiles,
    cuts,
    PADDED: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS_N: tl.constexpr,
    RUN: tl.constexpr,
    IS_MAX: tl.constexpr,
    IS_THRESHOLD: tl.constexpr,
):
    """One program: the levels of one query block of one head; grid (query_blocks, heads here, batch)."""
    query_block = tl.program_id(0)
    head = (first_head + tl.program_id(1)).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    first_row = (batch * heads_here + tl.program_id(1)) * rows_of_head + query_block * PADDED
    score = _scores(
        masses,
        maxima,
        denominators,
        first_row,
        kv_blocks,
        width,
        tiles,
        PADDED,
        STEP,
        BLOCK_N,
        BLOCKS_N,
        RUN,
        IS_MAX,
    )
    block = tl.arange(0, BLOCK_N)
    is_counted = block < kv_blocks
    if counts is not None:
        is_counted = tl.load(counts + batch * kv_blocks + block, mask=is_counted, other=0) > 0
    score = tl.where(is_counted & (score > 0.0), tl.minimum(score, 3.0e38), 0.0)  # also where it is NaN
    bits = tl.where(is_counted, score.to(tl.int32, bitcast=True), -1)

    amount = _whole_masses(score, bits) if IS_THRESHOLD else is_counted.to(tl.int32)
    total = tl.sum(amount, axis=0)
    level = tl.zeros([BLOCK_N], tl.int32)
    for cut in range(cuts):
        place = tl.load(places + cut)
        if IS_THRESHOLD:
            goal = tl.ceil(place * total.to(tl.float64)).to(tl.int64)
            goal = tl.maximum(tl.minimum(goal, total), 1)
        else:  # shares such as 0.15 + 0.1 may fall short of the half that they stand for
            goal = tl.floor(place * total.to(tl.float64) + (0.5 + 1e-9)).to(tl.int32)
        is_before = _is_before(bits, amount, total, goal)
        level = tl.where(is_before, tl.load(cut_levels + cut), level)
    if not IS_THRESHOLD:  # a row left with nothing keeps its top block
        is_top = (bits == tl.max(bits, axis=0)) & is_counted
        top = tl.min(tl.where(is_top, block, BLOCK_N), axis=0)
        level = tl.where((tl.max(level, axis=0) == 0) & (block == top), 1, level)

    both = batch * heads + head
    inside = block < kv_blocks
    if cap is not None:
        level = tl.minimum(level, tl.load(cap + both * kv_blocks + block, mask=inside, other=0).to(tl.int32))
    if full_kv is not None:
        is_full = tl.load(full_kv + block, mask=inside, other=0) != 0
        if full_query is not None:
            is_full = is_full | (tl.load(full_query + query_block) != 0)
        level = tl.where(is_full & is_counted, 1, level)
    tl.store(levels + (both * query_blocks + query_block) * kv_blocks + block, level.to(tl.int8), mask=inside)


def ranks_launch(
    masses: Masses,
    layout: MassesLayout,
    cuts: Cuts,
    levels: Tensor,
    heads: range,
    *,
    counts: Tensor | None,
    cap: Tensor | None,
    full: tuple[Tensor | None, Tensor | None],
    is_max: bool,
) -> KernelLaunch:
    """The launch that fills the levels of some heads.

    Args:
        masses: of ``heads``; with ``is_max`` of the largest sample of each kv block.
        levels: int8 [batch, all heads, query_blocks, kv_blocks].
        counts: int32 [batch, kv_blocks], real keys; None = none is missing a block.
        cap: int8 [batch, all heads, kv_blocks], the coarsest levels allowed; None = any.
        full: bool [query_blocks] and [kv_blocks], blocks that hold a full token; None = none.
        is_max: a block's score is the largest share of its samples, not their sum.
    """
    batch, all_heads, query_blocks, kv_blocks = levels.shape
    block_n = max(next_power_of_2(kv_blocks), 32)
    arguments = {
        "masses": masses.mass,
        "maxima": masses.maximum,
        "denominators": masses.denominator,
        "counts": counts,
        "cap": cap,
        "full_query": full[0],
        "full_kv": full[1],
        "places": cuts.places,
        "cut_levels": cuts.levels,
        "levels": levels,
        "heads": all_heads,
        "first_head": heads.start,
        "heads_here": len(heads),
        "query_blocks": query_blocks,
        "kv_blocks": kv_blocks,
        "rows_of_head": layout.rows,
        "width": masses.mass.shape[1],
        "tiles": layout.tiles,
        "cuts": len(cuts.places),
        "PADDED": layout.padded,
        "STEP": min(layout.padded, SAMPLES_AT_A_TIME),
        "BLOCK_N": block_n,
        "BLOCKS_N": layout.blocks_n,
        "RUN": min(RUN, layout.blocks_n),
        "IS_MAX": is_max,
        "IS_THRESHOLD": cuts.is_threshold,
    }
    # 8 scores a thread, what registers hold of long rows: one warp for short ones, whose sums then cross no warp.
    num_warps = min(16, max(1, block_n // 256))
    return KernelLaunch(ranks_kernel, (query_blocks, len(heads), batch), arguments, num_warps)
