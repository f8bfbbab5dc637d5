"""Tile sizes: one place that knows what fits which GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton

LIST_CHUNK = 1024  # level mask entries that the list kernel compacts at a time


@dataclass(frozen=True)
class AttentionTile:
    """Queries and rows of a tile, and how the kernel that works on it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class PyramidTile:
    """Channels that one program of the pyramid kernel pools, and its warps."""

    block_d: int
    num_warps: int


def attention_tile(target: str, head_dim: int, dtype: torch.dtype, query_block_size: int) -> AttentionTile:
    """The tile for a target ("sm_90", "gfx942", "cpu"), never taller than a query block (padded to 16 rows)."""
    tile = _widest_tile(target, padded_head_dim(head_dim), dtype.itemsize)
    return replace(tile, block_m=min(tile.block_m, max(16, query_block_size)))


def _widest_tile(target: str, width: int, itemsize: int) -> AttentionTile:
    return AttentionTile(128, 64, 8, 3)


def pyramid_tile(kv_block_size: int, head_dim: int) -> PyramidTile:
    """At most 8192 numbers a program (64 registers a thread), so that no target spills; channels are independent."""
    width = min(padded_head_dim(head_dim), max(16, 8192 // kv_block_size))
    return PyramidTile(width, num_warps=4)


def padded_head_dim(head_dim: int) -> int:
    """Channels of a tile: the next power of two, at least the 16 that a matrix unit takes."""
    return max(16, triton.next_power_of_2(head_dim))


def target_of(device: torch.device) -> str:
    """The target of a device as the tile table names it; "cpu" under the interpreter."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
