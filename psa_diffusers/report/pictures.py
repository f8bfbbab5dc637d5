"""Pictures of what goes in and comes out: frames, the order of tokens, the pyramid of a block. They need matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..backends.reference import pyramid_rows
from ..config import PSAConfig
from ..integration import AttentionCall
from .figure import bare, new_figure
from .level_losses import level_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_frames(videos: Mapping[str, np.ndarray], count: int = 5) -> Figure:
    """Frames of some videos, a row each, evenly spread from the first to the last.

    Args:
        videos: By label, uint8 [frames, height, width, 3] each.
        count: Frames to show.
    """
    height, width = next(iter(videos.values())).shape[1:3]
    figure = new_figure(1.8 * count, 1.8 * len(videos) * height / width + 0.3)
    rows = figure.subplots(len(videos), count, squeeze=False)
    for axes, (label, video) in zip(rows, videos.items(), strict=True):
        axes[0].set_ylabel(label)
        for panel, frame in zip(axes, np.linspace(0, len(video) - 1, count).round().astype(int), strict=True):
            bare(panel).imshow(video[frame])
            if label == next(iter(videos)):
                panel.set_title(f"frame {frame}", fontsize=8)
    return figure


def plot_order(
    grid: tuple[int, int, int],
    orders: Mapping[str, Tensor | None],
    *,
    block_size: int = 64,
    blocks: Sequence[int] | None = None,
    frames: Sequence[int] | None = None,
) -> Figure:
    """Where the tokens of some blocks lie in the video: a row an order, a column a frame of tokens.

    Args:
        grid: (frames, height, width) in tokens.
        orders: By label, int64 [tokens], the token at each position; None = raster.
        block_size: Tokens in a block.
        blocks: Which blocks to colour; default every fourth of the first sixteen.
        frames: Which frames of tokens to show; default the first eight.
    """
    blocks = range(0, 16, 4) if blocks is None else blocks
    frames = range(min(8, grid[0])) if frames is None else frames
    figure = new_figure(1.15 * len(frames) + 0.5, 1.3 * len(orders))
    from matplotlib.colors import ListedColormap

    colours = ListedColormap(["#eeeeee", *(f"C{i}" for i in range(len(blocks)))])
    rows = figure.subplots(len(orders), len(frames), squeeze=False)
    for axes, (label, order) in zip(rows, orders.items(), strict=True):
        painted = _paint_blocks(grid, order, block_size, blocks)
        axes[0].set_ylabel(label)
        for panel, frame in zip(axes, frames, strict=True):
            bare(panel).imshow(painted[frame], cmap=colours, vmin=0, vmax=len(blocks), interpolation="nearest")
            if label == next(iter(orders)):
                panel.set_title(f"frame {frame}", fontsize=8)
    return figure


def _paint_blocks(
    grid: tuple[int, int, int], order: Tensor | None, block_size: int, blocks: Sequence[int]
) -> np.ndarray:
    """int64 [frames, height, width]: 1, 2, ... at the tokens of the chosen blocks, 0 elsewhere."""
    tokens = torch.arange(grid[0] * grid[1] * grid[2]) if order is None else order.cpu()
    painted = torch.zeros(len(tokens), dtype=torch.int64)
    for colour, block in enumerate(blocks, start=1):
        painted[tokens[block * block_size : (block + 1) * block_size]] = colour
    return painted.view(grid).numpy()


def plot_pyramid(call: AttentionCall, config: PSAConfig | None = None, *, head: int = 0, block: int = 0) -> Figure:
    """The keys of one block at every level: a row a key, a column a feature.

    Args:
        call: A captured call.
        config: Blocks, levels and order.
        head, block: Which block of keys.
    """
    plan = call.plan(config)
    order = slice(None) if plan.order is None else plan.order
    key, value = (tensor[0, order, head].float() for tensor in (call.key, call.value))
    real = torch.ones(len(key), dtype=torch.bool, device=key.device)
    rows = pyramid_rows(key, value, real, plan.kv_block_size, plan.num_levels, torch.float32)
    figure = new_figure(1.7 * (plan.num_levels + 1), 2.4)
    reach = float(rows.key[(rows.block == block) & (rows.level == 1)].abs().quantile(0.99))
    for level, axes in enumerate(figure.subplots(1, plan.num_levels + 1), start=1):
        keys = rows.key[(rows.block == block) & (rows.level == level)].cpu().numpy()
        axes.imshow(keys, cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto", interpolation="nearest")
        plural = "" if len(keys) == 1 else "s"
        bare(axes).set_title(f"{level_name(level, plan.num_levels)}: {len(keys)} key{plural}", fontsize=9)
    return figure
