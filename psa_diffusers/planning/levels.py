"""From importance to levels by the rules of the paper, ``threshold`` and ``topk``, and the similarity cap."""

from __future__ import annotations

import torch
from torch import Tensor


def threshold_levels(score: Tensor, thresholds: tuple[float, ...], counted: Tensor | None) -> Tensor:
    """The paper's threshold rule (section 3.3).

    A row's scores are normalised and sorted, highest first, ties by block index. A block's level is the smallest h
    with (sum of the scores before it) < thresholds[h - 1], else skip; a row left with nothing keeps its top block.

    Args:
        score: [batch, heads, query_blocks, kv_blocks].
        counted: bool [batch, kv_blocks], False for blocks without a real key; None = all True.

    Returns:
        int8 like ``score``.
    """
    ranked, index = _rank(score, counted)
    ranked = ranked.clamp(min=0).double()
    ranked = ranked / ranked.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    before = torch.nn.functional.pad(ranked.cumsum(-1)[..., :-1], (1, 0))
    levels = torch.zeros_like(before, dtype=torch.int8)
    for level in range(len(thresholds), 0, -1):
        levels = torch.where(before < thresholds[level - 1], level, levels)
    return _unrank(levels.to(torch.int8), index, counted)


def topk_levels(score: Tensor, fractions: tuple[float, ...], counted: Tensor | None) -> Tensor:
    """The paper's quantile rule: the top ``fractions[0]`` of a row's blocks at level 1, the next at level 2, ...

    Where the shares end is rounded to the nearest block (of those with real keys); the rest is skipped, and a row left
    with nothing keeps its top block. Arguments and result as in :func:`threshold_levels`.
    """
    _, index = _rank(score, counted)
    blocks = score.shape[-1]
    if counted is None:
        total = torch.full((1, 1, 1, 1), blocks, device=score.device)
    else:
        total = counted.sum(-1)[:, None, None, None]
    place = torch.arange(blocks, device=score.device)
    levels = torch.zeros((), dtype=torch.int64, device=score.device)
    for level in range(len(fractions), 0, -1):
        # Shares such as 0.15 + 0.1 may fall short of the half that they stand for.
        end = torch.floor(total.double() * sum(fractions[:level]) + (0.5 + 1e-9))
        levels = torch.where(place < end, level, levels)
    return _unrank(levels.to(torch.int8).expand(index.shape), index, counted)


def _rank(score: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores in descending order and their block indices; blocks without real keys come last."""
    score = torch.nan_to_num(score.float(), nan=0.0)
    if counted is not None:
        score = score.masked_fill(~counted[:, None, None, :], -1.0)
    return torch.sort(score, dim=-1, descending=True, stable=True)


def _unrank(levels: Tensor, index: Tensor, counted: Tensor | None) -> Tensor:
    """Levels by rank to levels by block; a row with nothing gets its top block, blocks without real keys level 0."""
    empty = (levels > 0).sum(-1) == 0
    levels = torch.cat([torch.where(empty, 1, levels[..., 0])[..., None].to(torch.int8), levels[..., 1:]], dim=-1)
    by_block = torch.empty_like(levels).scatter_(-1, index, levels)
    return by_block if counted is None else by_block * counted[:, None, None, :]


def cap_levels(levels: Tensor, cap: Tensor) -> Tensor:
    """No level coarser than ``cap`` int8 [batch, heads, kv_blocks]; skip stays skip (paper: the similarity cap)."""
    return torch.minimum(levels, cap[:, :, None, :])
