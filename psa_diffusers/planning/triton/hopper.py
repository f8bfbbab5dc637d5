"""When the planner uses its kernels for Hopper, and with what tiles."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .tiles import Tile

ENABLED = os.environ.get("PSA_HOPPER_PLANNER", "1") != "0"
HEAD_DIMS = (64, 128)
KEY_SAMPLES = 8  # of a kv block, that the masses' kernel takes
QUERY_SAMPLES = 16  # of a query block, with empty rows, that the centroids' kernel takes
# Some 8 a processor. Smaller grids are left to the kernels for all GPUs, whose smaller programs share out better.
MIN_PROGRAMS = 1024

try:
    from .hopper_centroids import hopper_centroids_kernel
    from .hopper_masses import hopper_masses_kernel
except Exception:  # Gluon is experimental: a release may lack it, or name things otherwise
    hopper_centroids_kernel = hopper_masses_kernel = None


@contextmanager
def switched_on() -> Iterator[None]:
    """These kernels are used in here where they fit, whatever the environment says."""
    global ENABLED
    before, ENABLED = ENABLED, True
    try:
        yield
    finally:
        ENABLED = before


def fits_hopper(query: Tensor, sampled: int, block_m: int, scale: float, target: str) -> bool:
    """Whether these kernels can read queries [batch, seq, heads, head_dim], 16 bytes at a time, and are worth it.

    ``sampled``: rows of a head, of which a program takes ``block_m``.
    """
    if target != "sm_90" or not ENABLED or hopper_masses_kernel is None:
        return False
    if query.shape[0] * query.shape[2] * sampled < MIN_PROGRAMS * block_m:
        return False
    is_half = query.dtype in (torch.float16, torch.bfloat16) and query.shape[3] in HEAD_DIMS
    *others, last = query.stride()
    is_aligned = last == 1 and all(stride % 16 == 0 for stride in others) and query.data_ptr() % 16 == 0
    return is_half and is_aligned and scale > 0


def masses_tile() -> Tile:
    """Sampled queries x sampled keys, so that two programs fit a processor; stages are of half as many keys."""
    return Tile(128, 128, 8, 4)


def centroid_tile() -> Tile:
    """Sampled queries x kv blocks, as many as registers and shared memory take; 16 queries, one block, a warp."""
    return Tile(128, 128, 8, 2)
