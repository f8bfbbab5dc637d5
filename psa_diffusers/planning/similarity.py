"""The similarity cap (paper section 3.3): how coarsely a key block may be pooled at all."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import block_rows, rows_per_chunk, unpadded_positions


def similarity_cap(
    key: Tensor, order: Tensor | None, real: Tensor | None, block_size: int, thresholds: tuple[float, ...]
) -> Tensor:
    """int8 [batch, heads, kv_blocks]: the coarsest level that a block may be read at, 1 where it may not be pooled.

    A level passes where the cosine similarity of the first and the last real token of its groups, averaged over the
    block's groups, exceeds its threshold. A group of one token is alike to itself (1); one of none does not count.

    Args:
        key: [batch, seq, heads, head_dim]; order: int64 [seq] or None.
        real: bool [batch, kv_blocks, block_size] where samples are padded, else None.
        thresholds: for levels 2, 3, ...
    """
    batch, length, heads, head_dim = key.shape
    blocks, step = -(-length // block_size), rows_per_chunk(key, block_size)
    if real is None and length % block_size:
        real = unpadded_positions(length, block_size, key.device)
    cap = torch.ones(batch, blocks, heads, dtype=torch.int8, device=key.device)
    for start in range(0, blocks, step):
        stop = min(start + step, blocks)
        rows = block_rows(key, order, real, start, stop, block_size)
        rows = torch.nn.functional.normalize(rows.view(batch, stop - start, block_size, heads, head_dim), dim=-1)
        inside = None if real is None else real[:, start:stop].expand(batch, -1, -1)
        for level, threshold in enumerate(thresholds, start=2):
            passes = _mean_similarity(rows, inside, 2 ** (level - 1)) > threshold
            cap[:, start:stop] = torch.where(passes, level, cap[:, start:stop])
    return cap.transpose(1, 2)


def _mean_similarity(rows: Tensor, inside: Tensor | None, size: int) -> Tensor:
    """[batch, blocks, heads]: rows [batch, blocks, block_size, heads, head_dim] of unit length, groups of ``size``."""
    if inside is None:
        return (rows[:, :, ::size] * rows[:, :, size - 1 :: size]).sum(-1).mean(2)
    groups = inside.unflatten(2, (-1, size)).to(torch.int8)
    first = groups.argmax(-1)
    last = size - 1 - groups.flip(-1).argmax(-1)
    starts = torch.arange(groups.shape[2], device=rows.device) * size
    picked = [
        rows.gather(2, (starts + place)[..., None, None].expand(-1, -1, -1, *rows.shape[3:])) for place in (first, last)
    ]
    filled = (groups.sum(-1) > 0)[..., None]
    similarity = (picked[0] * picked[1]).sum(-1) * filled
    return similarity.sum(2) / filled.sum(2).clamp(min=1)
