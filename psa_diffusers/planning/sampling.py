"""Which tokens stand for a block: positions drawn from the seed and the block's index alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .blocks import take_tokens, unpadded_positions

_MIX = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Samples:
    """Sampled rows of a tensor [batch, seq, heads, head_dim].

    Attributes:
        rows: float32 [batch, heads, samples, blocks, head_dim]; 0 where ``valid`` is False.
        valid: bool [batch or 1, samples, blocks], or None when every sample is a real token.
        weights: float32 [batch or 1, blocks]: real tokens a valid sample stands for; None when equal for all blocks.
    """

    rows: Tensor
    valid: Tensor | None
    weights: Tensor | None

    def of_heads(self, heads: slice) -> Samples:
        return Samples(self.rows[:, heads], self.valid, self.weights)


@lru_cache(maxsize=64)
def _priorities(seed: int, kind: str, blocks: int, block_size: int, samples: int, device: str) -> Tensor:
    """int64 [blocks, block_size]: each row the positions of a block in the order in which they are drawn.

    The first ``samples`` lie one in each of as many equal runs of the block, so that they cover it, the next ones
    likewise; which one of a run is random. A block's row depends on the seed, the kind and its index, not on how many
    blocks there are.
    """
    rows = []
    for block in range(blocks):
        mixed = (seed * 2 + (kind == "key")) * _MIX ^ (block + 1) * 0xD1B54A32D192ED03
        generator = torch.Generator().manual_seed((mixed ^ mixed >> 29) % 2**63)
        shuffled = torch.randperm(block_size, generator=generator)
        run = shuffled * samples // block_size
        # Turn of each position within its run: the first of every run come first, in random order.
        turn = (run[:, None] == run[None, :]).tril(-1).sum(1)
        rows.append(shuffled[torch.argsort(turn, stable=True)])
    return torch.stack(rows).to(device)


@lru_cache(maxsize=64)
def _positions(
    seed: int, kind: str, length: int, block_size: int, samples: int, turn: int, device: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Positions int64 [1, blocks, samples], valid and weights for a sequence without padding."""
    blocks = -(-length // block_size)
    order = _priorities(seed, kind, blocks, block_size, samples, "cpu")
    real = unpadded_positions(length, block_size, torch.device("cpu"))
    positions, valid, weights = _choose(order, real, samples, turn)
    if length % block_size == 0:
        return positions.to(device), None, None
    return positions.to(device), valid.to(device), weights.to(device)


def _choose(order: Tensor, real: Tensor, samples: int, turn: int) -> tuple[Tensor, Tensor, Tensor]:
    """Real positions of each block [batch, blocks, samples], which are valid, and weights.

    Those drawn first; for turn 1 the next ones, or the last ones where a block has too few for two turns.
    """
    batch, blocks, block_size = real.shape
    drawn = order.expand(batch, -1, -1)
    missing = ~real.gather(2, drawn)
    in_turn = torch.argsort(missing.to(torch.int8), dim=2, stable=True)
    counts = real.sum(2)
    start = (counts - samples).clamp(min=0, max=turn * samples)
    here = in_turn.gather(2, start[:, :, None] + torch.arange(samples, device=real.device))
    inside = drawn.gather(2, here)
    valid = ~missing.gather(2, here)
    weights = counts / valid.sum(2).clamp(min=1)
    starts = torch.arange(blocks, device=real.device)[None, :, None] * block_size
    return inside + starts, valid.transpose(1, 2), weights.to(torch.float32)


def draw_samples(
    tokens: Tensor,
    order: Tensor | None,
    real: Tensor | None,
    block_size: int,
    samples: int,
    *,
    seed: int,
    kind: str,
    turn: int = 0,
) -> Samples:
    """``samples`` tokens of every block of ``tokens`` [batch, seq, heads, head_dim].

    ``kind`` is "query" or "key", so that the two are drawn apart. ``turn`` 1 draws others than 0, as far as a block has
    others.

    ``real`` is bool [batch, blocks, block_size] where the batch is padded, else None. The positions are the same for
    all heads, and for the whole batch but for padding.
    """
    batch, length, heads, head_dim = tokens.shape
    samples = min(samples, block_size)
    blocks = -(-length // block_size)
    if real is None:
        positions, valid, weights = _positions(seed, kind, length, block_size, samples, turn, str(tokens.device))
    else:
        drawn = _priorities(seed, kind, blocks, block_size, samples, str(tokens.device))
        positions, valid, weights = _choose(drawn, real, samples, turn)
    positions = positions.transpose(1, 2).reshape(positions.shape[0], -1).clamp(max=length - 1)
    if order is not None:
        positions = order[positions]
    if positions.shape[0] == 1:
        rows = take_tokens(tokens, positions[0])
    else:
        index = positions[:, :, None, None].expand(-1, -1, heads, head_dim)
        rows = tokens.gather(1, index)
    rows = rows.to(torch.float32).view(batch, samples, blocks, heads, head_dim).permute(0, 3, 1, 2, 4)
    if valid is not None:
        rows = rows.masked_fill(~valid[:, None, :, :, None], 0.0)
    return Samples(rows.contiguous(), valid, weights)
