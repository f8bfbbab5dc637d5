"""Tile sizes: one place that knows what fits which GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ...gpu.target import padded_head_dim

LIST_CHUNK = 512  # level mask entries that the list kernel compacts at a time, below 4096
ORDER_TILE = (32, 128)  # rows that the launch order kernel places, x rows that it compares them with, at a time
POWER_TILE = (256, 16, 4)  # sampled queries x channels that the query power kernel adds up at a time, and its warps


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


@dataclass(frozen=True)
class CovarianceTile:
    """Channels of values and of keys, and merges, that one program of the covariance kernel multiplies at a time."""

    channels: int
    rows: int
    num_warps: int


def attention_tile(
    target: str,
    head_dim: int,
    dtype: torch.dtype,
    query_block_size: int,
    with_covariance: bool = False,
) -> AttentionTile:
    """The tile for a target ("sm_90", "gfx942", "cpu"), never taller than a query block (padded to 16 rows).

    The sizes are the largest that compile without spilled registers, by ``scripts/compile_report.py``.
    """
    width = padded_head_dim(head_dim)
    if target == "cpu":
        tile = AttentionTile(64, 64, 4, 1)
    elif dtype == torch.float32:  # exact products: no matrix units on NVIDIA, and operands in registers
        tile = AttentionTile(32, 16, 8, 1) if width <= 128 else AttentionTile(16, 16, 8, 1)
    elif target.startswith("gfx"):
        tile = _amd_tile(width, with_covariance and head_dim != width)
    else:
        tile = _nvidia_tile(target, width)
    return tile if query_block_size >= tile.block_m else _shorter(tile, max(16, query_block_size), target)


def _shorter(tile: AttentionTile, block_m: int, target: str) -> AttentionTile:
    """The tile for query blocks below its height: half the warps; half the rows where registers hold the operands."""
    block_n = tile.block_n if _has_large_shared_memory(target) else max(16, tile.block_n // 2)
    return replace(tile, block_m=block_m, block_n=block_n, num_warps=4)


def _has_large_shared_memory(target: str) -> bool:
    """Hopper and data-centre Blackwell: 227 KiB, and matrix units that read operands from there."""
    return target.startswith(("sm_90", "sm_10"))


def _amd_tile(width: int, needs_registers: bool) -> AttentionTile:
    if width > 128:
        return AttentionTile(64, 16, 8, 2)
    return AttentionTile(128, 16 if needs_registers and width > 64 else 32, 8, 2)


def _nvidia_tile(target: str, width: int) -> AttentionTile:
    if width > 128:
        return AttentionTile(128 if _has_large_shared_memory(target) else 64, 32, 8, 2)
    return AttentionTile(128, 64, 8, 3)


def pyramid_tile(kv_block_size: int, head_dim: int) -> PyramidTile:
    """Few enough numbers (64 a thread) that no target spills. Channels are independent: any split is right."""
    return PyramidTile(min(padded_head_dim(head_dim), max(16, 8192 // kv_block_size)), num_warps=4)


def variance_warps(kv_block_size: int, head_dim: int) -> int:
    """Of the logit variance kernel, one of whose programs holds a whole block: for 64 numbers a thread, or 32 warps."""
    return max(4, min(32, kv_block_size * padded_head_dim(head_dim) // 2048))


def covariance_tile(head_dim: int, dtype: torch.dtype) -> CovarianceTile:
    """At most 64 accumulators a thread; exact float32 products hold their operands in registers as well."""
    if dtype == torch.float32:
        return CovarianceTile(min(padded_head_dim(head_dim), 64), 16, 8)
    return CovarianceTile(min(padded_head_dim(head_dim), 128), 32, 8)
