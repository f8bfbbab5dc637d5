"""Rows of scores, and what the definition makes of them: for the rules' tests on the CPU and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from psa_diffusers import PSAConfig
from psa_diffusers.planning.levels import cap_levels, threshold_levels, topk_levels

# Of blocks at each level: the paper's presets, rows of one level, shares that round to nothing, all blocks.
FRACTIONS = [
    (0.15, 0.1, 0.2, 0.0),
    (0.25, 0, 0, 0),
    (0, 0, 1.0, 0),
    (0.001, 0, 0, 0),
    (0.3, 0.3, 0.2, 0.2),
    (0, 0, 0, 0.01),
]
# Of mass: the paper's, none, all of it, levels that no block can get.
THRESHOLDS = [(0.7, 0.8, 0.9, 0.9), (0, 0, 0, 0), (0.25, 0.5, 0.75, 1.0), (0, 0.5, 0.375, 0.75), (0, 0, 0, 1.0)]


def topk(fractions: tuple[float, ...]) -> PSAConfig:
    return PSAConfig(rule="topk", level_fractions=fractions)


def threshold(thresholds: tuple[float, ...]) -> PSAConfig:
    return PSAConfig(rule="threshold", level_thresholds=thresholds)


def random_scores(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Rows of positive numbers over some octaves, as softmax gives them."""
    return torch.softmax(2.0 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def tied_scores(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Rows of 0, 1/8 .. 3/8, the first row of zeros alone."""
    score = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(seed)).float() / 8
    score[:, :, 0] = 0.0
    return score


def exact_scores(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Rows of multiples of 2^-12 whose sum is 1: partial sums are exact, and hit thresholds such as 1/2 exactly."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, shape[-1], (*shape[:-1], 4096), generator=generator)
    drawn[..., :2048] = drawn[..., :1]  # half of the mass in one block
    return torch.zeros(shape).scatter_add_(-1, drawn, torch.full(drawn.shape, 2.0**-12))


def expected_levels(
    score: Tensor,
    config: PSAConfig,
    counted: Tensor | None = None,
    cap: Tensor | None = None,
    full: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """int8 levels by the definition."""
    if config.rule == "topk":
        levels = topk_levels(score, config.level_fractions, counted)
    else:
        levels = threshold_levels(score, config.level_thresholds, counted)
    levels = levels if cap is None else cap_levels(levels, cap)
    if full[1] is not None:
        pairs = full[1][None, :] if full[0] is None else full[0][:, None] | full[1][None, :]
        levels = torch.where(pairs, 1, levels)
        levels = levels if counted is None else levels * counted[:, None, None, :]
    return levels.to(torch.int8)


def limits_of(shape: tuple[int, ...]) -> dict[str, object]:
    """Padding that leaves the last sample nothing, a cap, and full rows and columns, for scores of this shape."""
    batch, heads, query_blocks, kv_blocks = shape
    generator = torch.Generator().manual_seed(5)
    counted = torch.rand(batch, kv_blocks, generator=generator) < 0.7
    counted[-1] = False
    rows = torch.rand(query_blocks, generator=generator) < 0.2
    columns = torch.rand(kv_blocks, generator=generator) < 0.1
    cap = torch.randint(1, 5, (batch, heads, kv_blocks), generator=generator, dtype=torch.int8)
    return {"counted": counted, "cap": cap, "full": (rows, columns)}
