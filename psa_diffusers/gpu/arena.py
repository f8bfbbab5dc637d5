"""Buffers in one piece of memory: those that are never needed at the same time may share a place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

ALIGNMENT = 512  # bytes: as torch's own allocator aligns buffers


class Use(NamedTuple):
    """When a buffer is needed, and how much of it there is."""

    first: int  # step
    last: int  # step
    size: int  # bytes


def lay_out(uses: Mapping[int, Use]) -> tuple[dict[int, int], int]:
    """Where each buffer begins, and how large the whole is, in bytes. Largest first, each as low as it can be."""
    placed: list[tuple[int, Use]] = []
    starts = {}
    for name, use in sorted(uses.items(), key=lambda item: -item[1].size):
        start = 0
        for other_start, other in sorted(placed):
            is_at_once = use.first <= other.last and other.first <= use.last
            if is_at_once and start + use.size > other_start and other_start + other.size > start:
                start = -(-(other_start + other.size) // ALIGNMENT) * ALIGNMENT
        placed.append((start, use))
        starts[name] = start
    return starts, max((start + use.size for start, use in placed), default=0)
