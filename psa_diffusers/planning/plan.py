"""Plan: what each query block reads, and how finely."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

LEVEL_TOTALS = "level totals"


@dataclass(frozen=True, eq=False)
class Plan:
    """The levels at which every block of queries reads every block of keys and values.

    Blocks are consecutive runs of positions of the block order; a pooled group is a consecutive run inside a block,
    counted from the block's start. The last block, and the last group of a block, may be short.

    Attributes:
        level_mask: int8 [batch, heads, query_blocks, kv_blocks]; 0 = skip, 1 = full resolution, ``h <= num_levels`` =
            pooled by ``2 ** (h - 1)``, ``num_levels + 1`` = one centroid for the whole block.
        order: int64 [tokens], the token at each position of the block order, for queries and keys alike.
            None = raster (position is token).
        query_length, key_length: Tokens of the sequences that the plan was made for.
        query_block_size, kv_block_size, num_levels: As in :class:`~psa_diffusers.PSAConfig`.
        key_lengths: int64 [batch] or None; raster positions from that one on are padding, which no one reads.
        value_gain: float32 [batch, heads], how much of the value correction each head gets; None = all of it.
        notes: What the planner had to report, e.g. that the full tokens alone exceed the budget.
        planner, planner_reason: What made the plan, ``"torch"`` or ``"triton"``, and why that one. None for a plan that
            was made by hand.
    """

    level_mask: Tensor
    query_length: int
    key_length: int
    query_block_size: int
    kv_block_size: int
    num_levels: int
    order: Tensor | None = None
    key_lengths: Tensor | None = None
    value_gain: Tensor | None = None
    notes: tuple[str, ...] = ()
    planner: str | None = None
    planner_reason: str | None = None
    # What a backend derives from the level mask (block lists, granules), kept as long as the plan is. Keyed by backend;
    # and LEVEL_TOTALS, where a backend counts the pairs on its way: int64 [batch, heads, num_levels + 2].
    cache: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def query_blocks(self) -> int:
        return -(-self.query_length // self.query_block_size)

    @property
    def kv_blocks(self) -> int:
        return -(-self.key_length // self.kv_block_size)

    def level_costs(self) -> Tensor:
        """float64 [num_levels + 2]: cost of a block pair at each level (skip, 1 .. num_levels, centroid); dense = 1."""
        costs = [0.0] + [2.0 ** -(level - 1) for level in range(1, self.num_levels + 1)] + [1 / self.kv_block_size]
        return torch.tensor(costs, dtype=torch.float64, device=self.level_mask.device)

    def real_keys(self) -> Tensor | None:
        """bool [batch, key_length] in block order: False at padding. None when nothing is padded."""
        if self.key_lengths is None:
            return None
        device = self.level_mask.device
        tokens = torch.arange(self.key_length, device=device) if self.order is None else self.order.to(device)
        return tokens[None, :] < self.key_lengths.to(device)[:, None]

    def level_counts(self) -> Tensor:
        """int64 [num_levels + 2, batch, heads] on the plan's device (no synchronisation): block pairs with real keys at
        each level (skip, 1 .. num_levels, centroid)."""
        if self.key_lengths is None and LEVEL_TOTALS in self.cache:
            return self.cache[LEVEL_TOTALS].permute(2, 0, 1)
        counted, real = None, self.real_keys()
        if real is not None:
            padded = torch.nn.functional.pad(real, (0, self.kv_blocks * self.kv_block_size - self.key_length))
            counted = padded.view(real.shape[0], 1, 1, self.kv_blocks, self.kv_block_size).any(-1)
        # Level by level: nothing is copied to the device, and nothing larger than the mask is made.
        chosen = (self.level_mask == level for level in range(self.num_levels + 2))
        return torch.stack([(pairs if counted is None else pairs & counted).sum((2, 3)) for pairs in chosen])

    def mean_cost(self, counts: Tensor | None = None) -> Tensor:
        """float64 scalar on the plan's device (no synchronisation): the mean cost over block pairs with real keys.

        ``counts`` is what :meth:`level_counts` gives, where it is there already.
        """
        counts = self.level_counts() if counts is None else counts
        return mean_cost(counts, self.num_levels, self.kv_block_size)

    @property
    def compute_budget(self) -> float:
        """The achieved compute budget (mean cost of a block pair, dense = 1). Synchronises a GPU; not for hot paths."""
        return float(self.mean_cost())

    @property
    def density(self) -> float:
        """Share of block pairs with real keys that are read at any level. Synchronises a GPU; not for hot paths."""
        pairs = self.level_counts().sum((1, 2)).double()
        return float(pairs[1:].sum() / pairs.sum().clamp(min=1))


def mean_cost(counts: Tensor, num_levels: int, kv_block_size: int) -> Tensor:
    """float64 scalar: the mean cost of block pairs, from how many there are at each level, [num_levels + 2, ...]."""
    pairs = counts.flatten(1).sum(1).double()
    total = pairs.new_zeros(())
    for level in range(1, num_levels + 2):
        cost = 2.0 ** -(level - 1) if level <= num_levels else 1 / kv_block_size
        total = total + pairs[level] * cost
    return total / pairs.sum().clamp(min=1)
