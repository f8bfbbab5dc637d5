"""Tile sizes of the planner's kernels: one place that knows what fits which GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...gpu.target import padded_head_dim


@dataclass(frozen=True)
class StatisticsTile:
    """Channels that one program handles at a time, and its warps."""

    block_d: int
    num_warps: int


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a tile of products, and how the kernel that works on it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def statistics_tile(kv_block_size: int, head_dim: int) -> StatisticsTile:
    """Few enough numbers (64 a thread) that no target spills. Channels are independent: any split is right."""
    return StatisticsTile(min(padded_head_dim(head_dim), max(16, 8192 // kv_block_size)), num_warps=4)


def sampled_tile(target: str, head_dim: int, dtype: torch.dtype) -> Tile:
    """Sampled queries x sampled keys."""
    width = padded_head_dim(head_dim)
    if dtype == torch.float32:
        return Tile(64, 32, 8, 1)
    if target.startswith("gfx") or width > 128:
        return Tile(128, 64, 8, 2)
    return Tile(128, 128, 8, 3 if has_large_shared_memory(target) else 2)


def centroid_tile(target: str, head_dim: int, dtype: torch.dtype) -> Tile:
    """Sampled queries x kv blocks, two products each."""
    width = padded_head_dim(head_dim)
    if dtype == torch.float32:
        return Tile(64, 32, 8, 1)
    if target.startswith("gfx") or width > 128:
        return Tile(64, 64, 8, 1 if target.startswith("gfx") else 2)
    return Tile(128, 64, 8, 2)


def prices_tile(target: str, head_dim: int, dtype: torch.dtype) -> Tile:
    """Query blocks x kv blocks."""
    if dtype == torch.float32:
        return Tile(32, 32, 8, 1)
    return Tile(64, 64, 8, 1)


def has_large_shared_memory(target: str) -> bool:
    """Hopper and data-centre Blackwell: 227 KiB, and matrix units that read operands from there."""
    return target.startswith(("sm_90", "sm_10"))
