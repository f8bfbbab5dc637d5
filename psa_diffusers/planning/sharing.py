"""A layer whose heads are spread over processes: what their planners tell each other."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_ranks(counts: Tensor, group: Any) -> tuple[Tensor, int]:
    """The same tensor from every process of a group [ranks, *counts.shape], and this one's place among them.

    A collective: every process of the group takes part, in the same order of calls. A GPU is not waited for.
    """
    every = counts.new_empty((dist.get_world_size(group), *counts.shape))
    dist.all_gather(list(every.unbind(0)), counts.contiguous(), group=group)
    return every, dist.get_rank(group)


def mean_over_heads(mean: Tensor, heads: int, group: Any) -> Tensor:
    """The mean over all heads of a group, from this process's mean over its own heads. A collective, as above."""
    sums = torch.stack([mean * heads, torch.full_like(mean, heads)])
    dist.all_reduce(sums, group=group)
    return sums[0] / sums[1]
