"""The authors' implementation, a rival: called from a checkout of their repository, and nothing of it is in here.

Their repository is github.com/ziplab/Pyramid-Sparse-Attention (package ``psa_triton``). Two calls are timed: the full
path as their pipelines run it (tokens into Gilbert order and back, estimator, block lists, pooling, kernel), and what
it comes to with the block lists given (pooling and kernel).
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from .cases import BenchCase
from .rivals import Rival

PACKAGE = "psa_triton"
# Shares of their plug-and-play default, whose mean cost is 0.15: level 1, pooled by 2, by 4, by 8; the rest is skipped.
DEFAULT_SHARES = {1: 0.10, 2: 0.05, 4: 0.0, 8: 0.20}
QUERY_BLOCK, KV_BLOCK, TILE = 128, 64, 32  # their default blocks, and the tile that the paper and they use


def find_package(checkout: Path) -> Path:
    """The folder that holds their package.

    Raises:
        ValueError: there is none in this checkout.
    """
    for folder in (checkout / "src", checkout):
        if (folder / PACKAGE / "__init__.py").is_file():
            return folder
    raise ValueError(f"{checkout} holds no src/{PACKAGE}: it must be a checkout of the authors' repository.")


def load(checkout: Path) -> ModuleType:
    """Their package. What it prints goes to stderr."""
    folder = str(find_package(checkout).resolve())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    with contextlib.redirect_stdout(sys.stderr):
        return importlib.import_module(PACKAGE)


def level_shares(compute_budget: float) -> dict[int, float]:
    """Shares of a row's blocks by pooling factor, of this mean cost: their default's, scaled.

    Where those would be more than all blocks, all are read: as many as it takes at level 1, the rest pooled by 8.
    """
    scale = compute_budget / sum(share / factor for factor, share in DEFAULT_SHARES.items())
    if scale * sum(DEFAULT_SHARES.values()) <= 1:
        return {factor: scale * share for factor, share in DEFAULT_SHARES.items()}
    full = (compute_budget - 1 / 8) / (1 - 1 / 8)
    return {1: full, 2: 0.0, 4: 0.0, 8: 1 - full}


def mask_ratios(shares: dict[int, float]) -> dict[int, tuple[float, float]]:
    """Their way to say it: from which share of the sorted row to which; 0 is skipped."""
    ratios, start = {}, 0.0
    for factor, share in shares.items():
        ratios[factor] = (start, min(1.0, start + share))
        start = ratios[factor][1]
    return {**ratios, 0: (start, 1.0)}


def official_rivals(
    checkout: Path, case: BenchCase, query: Tensor, key: Tensor, value: Tensor, compute_budget: float
) -> dict[str, Rival]:
    """Their full path, and their pooling and kernel alone, at this budget.

    Raises:
        ValueError: the case has text tokens, which their order takes from the front and their lists do not know.
        Exception: whatever their code raises.
    """
    if case.text_tokens:
        raise ValueError("it is timed without text tokens only")
    package = load(checkout)
    frames, height, width = case.grid
    config = package.AttentionConfig(
        width=width,
        height=height,
        depth=frames,
        text_length=0,
        use_rearrange=True,
        rearrange_method="Gilbert",
        block_m=QUERY_BLOCK,
        block_n=KV_BLOCK,
        tile_n=TILE,
        use_sim_mask=False,
        mask_ratios=mask_ratios(level_shares(compute_budget)),
        mask_mode="topk",
        warmup_steps=0,
        attn_impl="new_mask_type",
        verbose=False,
        enable_logging=False,
    )
    with contextlib.redirect_stdout(sys.stderr):
        model = package.PyramidSparseAttention(config, layer_num=1)

    def whole() -> Tensor:
        heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return model(*heads_first, 0).transpose(1, 2)

    attention, given = model.sparse_attention_fn, _arguments(model, whole)
    density, _ = importlib.import_module(f"{PACKAGE}.utils").calc_density_newtype(given[3])
    return {
        "official, whole": Rival(whole, budget=density),
        "official, plan given": Rival(lambda: attention(*given), plan_given=True, budget=density, in_order=False),
    }


def _arguments(model: Any, run: Any) -> tuple:
    """What their full path hands to their attention function, caught in one run: query, key, value, lists, scale."""
    attention, caught = model.sparse_attention_fn, []

    def catch(*arguments: Any) -> Tensor:
        caught[:] = [arguments]
        return attention(*arguments)

    model.sparse_attention_fn = catch
    try:
        run()
    finally:
        model.sparse_attention_fn = attention
    return caught[0]
