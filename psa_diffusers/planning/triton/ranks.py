"""Levels by the rules of the paper, ``topk`` and ``threshold``: what :mod:`..levels` defines, a row a program."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...gpu.kernel_launch import KernelLaunch
from ...gpu.sizes import next_power_of_2
from .cuts import Cuts, intervals, mass_unit, of_cut
from .mass_buffers import Masses, MassesLayout
from .shares import RUN
from .tiles import row_warps

MAX_KV_BLOCKS = 8192  # of a row, that registers hold
SAMPLES_AT_A_TIME = 8  # whose masses are under way together


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

    unit = mass_unit(score) if IS_THRESHOLD else None
    amount = (score * unit).to(tl.int32) if IS_THRESHOLD else is_counted.to(tl.int32)
    total = tl.sum(amount, axis=0)
    place = tl.load(places + tl.arange(0, CUTS))
    if IS_THRESHOLD:
        goal = tl.maximum(tl.minimum(tl.ceil(place * total.to(tl.float64)).to(tl.int32), total), 1)
    else:  # shares such as 0.15 + 0.1 may fall short of the half that they stand for
        goal = tl.floor(place * total.to(tl.float64) + (0.5 + 1e-9)).to(tl.int32)
    low, high, needed, each = intervals(bits, amount, total, goal, unit)
    if IS_THRESHOLD:  # before the last entry that has any mass the whole of it is never reached, behind that one it is
        is_whole = (goal >= total) & (total > 0)
        low = tl.where(is_whole, 1, low)
        high = tl.where(is_whole, 1, high)
    level = tl.zeros([BLOCK_N], tl.int32)
    for cut in range(cuts):
        is_left = (bits >= of_cut(low, cut)) & (bits < of_cut(high, cut))
        need = of_cut(needed, cut)
        one = of_cut(each, cut)
        if (tl.sum(is_left.to(tl.int32), axis=0) - 1) * one >= need:
            is_left = is_left & ((tl.cumsum(is_left.to(tl.int32), axis=0) - 1) * one < need)
        is_before = (bits >= of_cut(high, cut)) | is_left
        level = tl.where(is_before, tl.load(cut_levels + cut), level)
    if not IS_THRESHOLD:  # a row left with nothing keeps its top block
        is_top = (bits == tl.max(bits, axis=0)) & (bits >= 0)
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
        level = tl.where(is_full & (bits >= 0), 1, level)
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
    target: str,
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
    return KernelLaunch(ranks_kernel, (query_blocks, len(heads), batch), arguments, row_warps(target, block_n))
