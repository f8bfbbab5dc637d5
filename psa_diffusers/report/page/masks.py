"""Level masks as small pictures inside the page, with the share of each level."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..level_losses import level_name
from ..plots import level_colours

LARGEST = 256  # blocks on a side of a picture: of a larger mask every second, third, ... row and column is drawn


def read_masks(file: Path, labels: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """What the page shows of each mask in the file of a sparse video; labels are (step, layer, head, num_levels)."""
    with np.load(file) as masks:
        return [describe_mask(masks[str(i)], *label) for i, label in enumerate(labels)]


def describe_mask(mask: np.ndarray, step: int, layer: int, head: int, num_levels: int) -> dict[str, Any]:
    """Picture, shares and words for one mask, int8 [query_blocks, kv_blocks]."""
    counts = np.bincount(mask.ravel(), minlength=num_levels + 2)
    order = [*range(1, num_levels + 2), 0]
    shares = {level_name(level, num_levels): counts[level] / mask.size for level in order}
    told = ", ".join(f"{name} {_percent(share)}" for name, share in shares.items() if share > 0)
    return {
        "step": step,
        "layer": layer,
        "head": head,
        "shares": shares,
        "text": told,
        "picture": picture(mask, num_levels),
        "blocks": f"{mask.shape[0]} x {mask.shape[1]}",
    }


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "<1%"


def picture(mask: np.ndarray, num_levels: int) -> str:
    """A PNG as a data URI: one pixel a block pair, query blocks from top to bottom."""
    every = -(-max(mask.shape) // LARGEST)
    chosen = np.ascontiguousarray(mask[::every, ::every].astype(np.uint8))
    image = Image.frombytes("P", (chosen.shape[1], chosen.shape[0]), chosen.tobytes())
    image.putpalette([channel for colour in _colours(num_levels) for channel in colour])
    memory = io.BytesIO()
    image.save(memory, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(memory.getvalue()).decode()


def _colours(num_levels: int) -> list[tuple[int, int, int]]:
    """By level: skip, full, ..., centroid."""
    colours = css_colours(num_levels)
    names = [level_name(level, num_levels) for level in range(num_levels + 2)]
    return [tuple(int(colours[name][i : i + 2], 16) for i in (1, 3, 5)) for name in names]


def css_colours(num_levels: int) -> Mapping[str, str]:
    """The colour of each level's name, as ``#rrggbb``."""
    from matplotlib.colors import to_hex

    return {name: to_hex(colour) for name, colour in level_colours(num_levels).items()}
