"""Levels by the rules of the paper, ``topk`` and ``threshold``: what :mod:`..levels` defines, without a sort.

A program holds a row of scores. A rule cuts the row in rank order, at most once a level: at a number of blocks (topk)
or at a share of their mass (threshold). Where the cuts lie is found by halving an interval of scores for each, which,
being no negative numbers, are ordered as their bits are; what is left in it, in the end equal scores, is taken in index
order.
Masses are added up as whole numbers, so that no order of adding changes them: in units of 2^-30 of a row's, or more, so
that a cut is off by 4e-6 of it at most where the definition adds in float64.
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

MAX_KV_BLOCKS = 8192  # of a row, that registers hold
SAMPLES_AT_A_TIME = 8  # whose masses are under way together


class Cuts(NamedTuple):
    """Where a row is cut: what is before cut c in rank order, and before none that follows it, gets ``levels[c]``."""

    is_threshold: bool
    places: Tensor  # float64: shares of the row's mass or of its blocks, falling; the last up to a power of two of them
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
    more = next_power_of_2(len(cuts)) - len(cuts)
    places = torch.tensor([end for end, _ in cuts + cuts[-1:] * more], dtype=torch.float64)
    levels = torch.tensor([level for _, level in cuts], dtype=torch.int32)
    return Cuts(is_threshold, places.to(device), levels.to(device))


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
def _mass_unit(score):
    """float32: a power of two that makes the sum of all scores a number of 30 bits; any for a sum of 0."""
    exponent = tl.sum(score, axis=0).to(tl.int32, bitcast=True) >> 23
    return (tl.minimum(2 * 127 + 29 - exponent, 254) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _narrowed(bits, amount, goal, low, high, low_sum, high_sum, width):
    """Halves each cut's interval [low, high) down to ``width``, or until nothing beyond its goal is left in it.

    The amounts of the entries from ``low`` on add up to ``low_sum``, not below the goal, those from ``high`` on to
    ``high_sum``, below it. All are [CUTS].
    """
    while tl.max(((high - low > width) & (low_sum > goal)).to(tl.int32), axis=0) > 0:
        middle = low + (high - low) // 2
        total = tl.sum(tl.where(bits[None, :] >= middle[:, None], amount[None, :], 0), axis=1)
        is_enough = total >= goal
        low = tl.where(is_enough, middle, low)
        low_sum = tl.where(is_enough, total, low_sum)
        high = tl.where(is_enough, high, middle)
        high_sum = tl.where(is_enough, high_sum, total)
    return low, high, low_sum, high_sum


@triton.jit
def _intervals(bits, amount, total, goal, unit):
    """Of each cut the interval of scores in which its goal is reached, what is needed of it, and an entry's amount.

    Entries from ``high`` on are before the goal, and of those from ``low`` on as many, in index order, as are needed:
    the next one as long as those before it add up to less. All [CUTS].

    Args:
        bits: int32 [BLOCK_N], of the scores; -1 for entries that do not count.
        amount: of the entries, 0 for those. ``total`` is their sum.
        goal: [CUTS], at most the total or 1.
        unit: what an entry's amount is its score times of; None = all amounts are 1.
    """
    low = tl.zeros_like(goal)
    high = low + tl.max(bits, axis=0) + 1
    low_sum = tl.zeros_like(goal) + total
    low, high, low_sum, high_sum = _narrowed(bits, amount, goal, low, high, low_sum, tl.zeros_like(goal), 1024)
    is_inside = (bits[None, :] >= low[:, None]) & (bits[None, :] < high[:, None])
    count = tl.sum(is_inside.to(tl.int32), axis=1)
    if tl.max(count, axis=0) > 1:
        low, high, low_sum, high_sum = _narrowed(bits, amount, goal, low, high, low_sum, high_sum, 1)
        is_inside = (bits[None, :] >= low[:, None]) & (bits[None, :] < high[:, None])
        count = tl.sum(is_inside.to(tl.int32), axis=1)
    # By now there is one entry, or all are exactly ``low``, or the last of them reaches the goal.
    each = tl.zeros_like(goal) + 1
    if unit is not None:
        each = tl.maximum((low.to(tl.float32, bitcast=True) * unit).to(tl.int32), 1)
    return low, high, tl.where(low_sum > goal, goal - high_sum, each * count), each


@triton.jit
def _of_cut(values, cut):
    """One of [CUTS] numbers."""
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == cut, values, 0), axis=0)


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
    CUTS: tl.constexpr,
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

    unit = _mass_unit(score) if IS_THRESHOLD else None
    amount = (score * unit).to(tl.int32) if IS_THRESHOLD else is_counted.to(tl.int32)
    total = tl.sum(amount, axis=0)
    place = tl.load(places + tl.arange(0, CUTS))
    if IS_THRESHOLD:
        goal = tl.maximum(tl.minimum(tl.ceil(place * total.to(tl.float64)).to(tl.int32), total), 1)
    else:  # shares such as 0.15 + 0.1 may fall short of the half that they stand for
        goal = tl.floor(place * total.to(tl.float64) + (0.5 + 1e-9)).to(tl.int32)
    low, high, needed, each = _intervals(bits, amount, total, goal, unit)
    if IS_THRESHOLD:  # before the last entry that has any mass the whole of it is never reached, behind that one it is
        is_whole = (goal >= total) & (total > 0)
        low = tl.where(is_whole, 1, low)
        high = tl.where(is_whole, 1, high)
    level = tl.zeros([BLOCK_N], tl.int32)
    for cut in range(cuts):
        is_left = (bits >= _of_cut(low, cut)) & (bits < _of_cut(high, cut))
        need = _of_cut(needed, cut)
        one = _of_cut(each, cut)
        if (tl.sum(is_left.to(tl.int32), axis=0) - 1) * one >= need:
            is_left = is_left & ((tl.cumsum(is_left.to(tl.int32), axis=0) - 1) * one < need)
        is_before = (bits >= _of_cut(high, cut)) | is_left
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
        "cuts": len(cuts.levels),
        "PADDED": layout.padded,
        "STEP": min(layout.padded, SAMPLES_AT_A_TIME),
        "BLOCK_N": block_n,
        "BLOCKS_N": layout.blocks_n,
        "RUN": min(RUN, layout.blocks_n),
        "CUTS": len(cuts.places),
        "IS_MAX": is_max,
        "IS_THRESHOLD": cuts.is_threshold,
    }
    # 16 scores a thread: more would spill, fewer make more of the sums' steps. Sums of short rows cross no warp.
    num_warps = min(16, max(1, block_n // 512))
    return KernelLaunch(ranks_kernel, (query_blocks, len(heads), batch), arguments, num_warps)
