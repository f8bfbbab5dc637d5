"""Signs that a run lost quality or time for a known reason, counted.

The paper (arXiv 2512.04025) names three: sparse attention that starts too early, which shows as colour blocks and
swapped identities; blocks that are nearly all read at the coarsest level; and an overhead that eats the gain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..budget_schedule import mean_budget
from ..config import PSAConfig
from .schedule import dense_steps

if TYPE_CHECKING:
    from .statistics import PSAStatistics

EARLY_SHARE = 0.25  # of the steps; the paper keeps these dense
COARSEST_SHARE = 0.9  # of the block pairs that a call reads
EARLY_STEPS = f"steps were sparse before {EARLY_SHARE:.0%} of the run: raise dense_warmup if colours or shapes break"
COARSEST = (
    f"sparse calls read more than {COARSEST_SHARE:.0%} of their block pairs at the coarsest level that they used: "
    "raise the compute budget, or name their layers in dense_layers"
)
PLANNING = "sparse calls took longer to plan than to attend: raise refresh_every, or stay dense on so few tokens"


def run_warnings(statistics: PSAStatistics) -> dict[str, int]:
    """Each warning with how many steps or calls it is about; empty where nothing was found. Waits for a GPU."""
    found = {
        EARLY_STEPS: early_sparse_steps(statistics.steps),
        COARSEST: coarse_calls(statistics.level_counts()),
        PLANNING: slowly_planned_calls(statistics),
    }
    return {text: count for text, count in found.items() if count}


def early_warning(config: PSAConfig, total: int) -> str | None:
    """What to say as a run of ``total`` steps begins whose config makes some of its first quarter sparse."""
    asked, needed = dense_steps(config.dense_warmup, total), dense_steps(EARLY_SHARE, total)
    while asked < needed and mean_budget(config.budget_schedule or (), [asked / total]) == 1:
        asked += 1
    if asked >= needed or total * EARLY_SHARE < 1:  # of very short runs a quarter is not a step
        return None
    return (
        f"PSA: sparse attention begins in step {asked} of {total}. Before step {needed} ({EARLY_SHARE:.0%} of the run) "
        f"it can break colours and shapes, which dense_warmup={EARLY_SHARE:g} avoids."
    )


def early_sparse_steps(steps: list[tuple[int, int, str]]) -> int:
    """How many of these (index, total, kind) are sparse although they belong to the first quarter."""
    return sum(kind == "sparse" and index < dense_steps(EARLY_SHARE, total) for index, total, kind in steps)


def coarse_calls(counts: list[torch.Tensor]) -> int:
    """How many calls read nearly all of what they read at their coarsest level.

    Args:
        counts: Of each call int64 [levels, batch, heads]: block pairs at level 0 (skipped), 1 (full), 2, ..., the last
            being the coarsest. The coarsest level is the last that the call used; reading everything in full is fine.
    """
    found = 0
    for call in counts:
        read = call[1:].sum((1, 2)).tolist()
        coarsest = max((level for level, pairs in enumerate(read) if pairs), default=0)
        found += coarsest > 0 and read[coarsest] > COARSEST_SHARE * sum(read)
    return found


def slowly_planned_calls(statistics: PSAStatistics) -> int:
    """How many sparse calls took longer to plan than the mean of them took to attend."""
    if not statistics.sparse_calls:
        return 0
    attending = statistics.attention_seconds / statistics.sparse_calls
    return sum(seconds(call.planning) > attending for call in statistics.calls)


def seconds(duration: float | tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
    """Of a clocked duration, or between two events of a GPU, for which this waits."""
    if isinstance(duration, float):
        return duration
    start, end = duration
    end.synchronize()
    return start.elapsed_time(end) / 1000
