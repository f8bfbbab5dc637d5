"""The value correction: what pooling takes from an output through the covariance of values with keys, given back.

A group of keys k and values v with means K and V answers a query q, to first order in the deviations of its logits,
with ``V + scale * C q``, where C is the covariance of the group's values with its keys, ``mean((v - V) (k - K)^T)``.
Reading the group pooled leaves the second part out. Keys and values are projections of the same tokens; where these
differ like noise, as in a model's first layers, C is alike in all groups, and what is left out adds up over all pooled
groups instead of averaging out. So one C a head, the mean over its blocks, is given back in proportion to the
attention that pooled groups get::

    out_q = sum_j w_qj v_j  +  scale * (sum_j w_qj share[level of j]) * C q

over the rows j that q reads, with softmax weights w. A level that pools less loses less, which its share says.

Not part of the published method (arXiv 2512.04025). ``scripts/step_error.py`` measures what it brings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..planning.plan import Plan

MERGED_PAIRS = 2048  # at a time: what stays in a cache


class Covariance(NamedTuple):
    """Of one head."""

    matrix: Tensor  # [head_dim (of values), head_dim (of keys)]: C, of whole kv blocks
    shares: Tensor  # [num_levels + 2]: how much of C each level loses, in [0, 1]: skip, 1 .. num_levels, centroid


def counted_blocks(plan: Plan) -> Tensor:
    """bool [batch, heads, kv_blocks]: blocks that count in C, those that every block of queries reads.

    What some queries skip must not reach them, not even through a mean.
    """
    return (plan.level_mask > 0).all(2)


def covariance_of_levels(levels: Tensor) -> Covariance:
    """C and shares from [num_levels, head_dim, head_dim], the covariances of levels 2 .. num_levels and the centroid.

    The share of C_h is its inner product with C over that of C with itself: what is left of C_h along C.
    """
    whole = levels[-1]
    power = whole.square().sum()
    shares = torch.where(power > 0, (levels * whole).sum((1, 2)) / power, 0.0).clamp(0.0, 1.0)
    return Covariance(whole, torch.cat([shares.new_zeros(2), shares]))


class CovarianceSum:
    """Collects a head's covariance while groups are merged by twos, level after level.

    Groups of n and m tokens whose means differ by dk and dv add ``n m / (n + m) dv dk^T`` to the sum over tokens of the
    products of their deviations from the merged group's means: nothing cancels.
    """

    def __init__(self, like: Tensor, counted: Tensor, tokens: int | None) -> None:
        """like [..., head_dim]; counted is bool [kv_blocks]; tokens is given where all are real and blocks whole."""
        self.tokens = tokens
        self.counted = None if bool(counted.all()) else counted
        self.total = like.new_zeros(like.shape[1], like.shape[1])
        self.levels: list[Tensor] = []

    def add(self, key: Tensor, value: Tensor, first: Tensor, second: Tensor) -> None:
        """key, value [2n, head_dim], the rows that are merged by twos; first, second [n], the tokens of each two."""
        keys, values = key.unflatten(0, (-1, 2)), value.unflatten(0, (-1, 2))
        weight = None if self.tokens is not None else first * second / (first + second).clamp(min=1)
        even_weight = 1.0 if self.tokens is None else self.tokens / len(first) / 4
        rows_per_block = 0 if self.counted is None else len(first) // len(self.counted)
        for start in range(0, len(first), MERGED_PAIRS):
            part = slice(start, start + MERGED_PAIRS)
            key_gap, value_gap = (pair[part, 0] - pair[part, 1] for pair in (keys, values))
            if weight is not None:
                value_gap *= weight[part, None]
            if self.counted is not None:
                left_out = ~self.counted.repeat_interleave(rows_per_block)[part, None]
                key_gap, value_gap = key_gap.masked_fill_(left_out, 0), value_gap.masked_fill_(left_out, 0)
            self.total.addmm_(value_gap.mT, key_gap, alpha=even_weight)

    def finish_level(self) -> None:
        self.levels.append(self.total.clone())

    def covariance(self, centroids: Tensor) -> Covariance:
        """From the tokens of each block, [blocks]."""
        tokens = (centroids if self.counted is None else centroids * self.counted).sum().clamp(min=1)
        return covariance_of_levels(torch.stack(self.levels) / tokens)
