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


def statistics_tile(target: str, kv_block_size: int, head_dim: int, dtype: torch.dtype) -> StatisticsTile:
    """As many numbers a thread (64, on Hopper 128) as do not spill: measured to be faster than more threads.

    Channels are independent: any split is right.
    """
    block_d = min(padded_head_dim(head_dim), max(16, 4096 // kv_block_size))
    return StatisticsTile(block_d, num_warps=1 if target.startswith("sm_90") and dtype != torch.float32 else 2)


def masses_tile(target: str, head_dim: int, dtype: torch.dtype) -> Tile:
    """Sampled queries x sampled keys, without spilled registers by ``scripts/compile_report.py``.

    On Hopper two programs of 4 warps fit a processor, so that the exponentials of one run under the products of the
    other; 128 queries a program halve what is read from the L2 cache against 64.
    """
    wide = padded_head_dim(head_dim) > 128
    if dtype == torch.float32:
        return Tile(16, 128, 8, 1)
    if target.startswith("gfx"):
        return Tile(32 if wide else 64, 128, 4, 1)
    if target.startswith("sm_10"):
        return Tile(64 if wide else 128, 128, 8, 2)
    if target.startswith("sm_90"):
        return Tile(64 if wide else 128, 128, 4, 2)
    return Tile(64, 128, 8, 1 if wide else 2)


def strided_tile(target: str, head_dim: int, dtype: torch.dtype) -> Tile:
    """Groups of queries x groups of keys; both operands come anew for each token of a group."""
    wide = padded_head_dim(head_dim) > 128
    if dtype == torch.float32:
        return Tile(32, 64, 4, 1)
    if target.startswith("gfx"):
        return Tile(64, 64, 4, 1)
    if has_large_shared_memory(target):
        return Tile(128, 128, 8, 2 if wide else 3)
    return Tile(64, 64, 4, 1 if wide else 2)


def shares_tile(target: str, dtype: torch.dtype) -> Tile:
    """Query blocks x kv blocks whose masses are divided and averaged."""
    if dtype == torch.float32:
        return Tile(16, 32, 4, 1)
    return Tile(16, 128, 8, 1)


def centroid_tile(target: str, head_dim: int, dtype: torch.dtype) -> Tile:
    """Sampled queries x kv blocks, two products each."""
    wide = padded_head_dim(head_dim) > 128
    if dtype == torch.float32:
        return Tile(32, 16, 8, 1)
    if target.startswith("gfx"):
        return Tile(64, 64, 8, 1)
    if target.startswith("sm_90"):
        return Tile(64, 64, 8, 2) if wide else Tile(128, 64, 4, 1)
    if has_large_shared_memory(target):
        return Tile(64 if wide else 128, 64, 8, 2)
    return Tile(64, 32, 4, 1) if wide else Tile(64, 64, 8, 2)


def prices_tile(target: str, head_dim: int, dtype: torch.dtype) -> Tile:
    """Query blocks x kv blocks; 8 pairs a thread at most, since each takes about 20 registers."""
    if target.startswith("gfx"):
        return Tile(64, 16, 4, 1)
    if dtype == torch.float32:
        return Tile(16, 32, 4, 1)
    is_tall = has_large_shared_memory(target) or target == "sm_89"
    return Tile(32, 32, 4, 1) if is_tall else Tile(16, 32, 4, 1)


def row_warps(target: str, scores: int) -> int:
    """Warps of a row of so many scores, 16 a thread: fewer make more steps of the row's sums. Short rows have one warp.

    AMD's masks of a whole warp lie in registers of their own, and those are few.
    """
    return min(16, max(1, scores // (256 if target.startswith("gfx") else 512)))


def precision_of(target: str, dtype: torch.dtype) -> str:
    """How products are made: of float32 on NVIDIA by three of tf32, to about its own precision, on matrix units."""
    return "tf32x3" if dtype == torch.float32 and target.startswith("sm_") else "ieee"


def has_large_shared_memory(target: str) -> bool:
    """Hopper and data-centre Blackwell: 227 KiB, and matrix units that read operands from there."""
    return target.startswith(("sm_90", "sm_10"))
