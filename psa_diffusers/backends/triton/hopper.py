"""Launches the Gluon kernel, and knows what it takes."""

from __future__ import annotations

import os
from functools import cache

import torch
import triton
from torch import Tensor

from ...gpu.kernel_launch import KernelLaunch
from .covariance import Covariance
from .layout import PyramidLayout
from .pyramid import Pyramid, pools_whole_blocks
from .read_lists import ReadLists

ENABLED = os.environ.get("PSA_HOPPER_KERNEL", "1") != "0"  # "0" leaves Hopper to the kernel for all GPUs
BLOCK_N = 128  # rows of a tile
STAGES = 3  # tiles of keys, and of values, in shared memory
MAX_LEVELS = 4  # descriptors that the kernel takes
HEAD_DIMS = (64, 128)
SMALLEST_COPY = 8  # rows: what the layout of shared memory repeats after

try:
    from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16, float16
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .hopper_kernel import hopper_attention_kernel

    IMPORT_ERROR = None
except Exception as error:  # Gluon is experimental: a release may lack it, or name things otherwise
    IMPORT_ERROR = f"Gluon of triton {triton.__version__} does not fit ({type(error).__name__}: {error})"


def hopper_obstacle(
    target: str,
    head_dim: int,
    dtype: torch.dtype,
    query_block_size: int,
    kv_block_size: int,
    num_levels: int,
) -> str | None:
    """Why the Hopper kernel cannot compute this, as a clause for a report; None if it can."""
    if target != "sm_90":
        return f"it needs sm_90, but the target is {target}"
    if not ENABLED:
        return "PSA_HOPPER_KERNEL is 0"
    if IMPORT_ERROR:
        return IMPORT_ERROR
    if dtype not in (torch.float16, torch.bfloat16):
        return f"dtype must be float16 or bfloat16, but is {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"head_dim must be one of {HEAD_DIMS}, but is {head_dim}"
    if query_block_size % 128:
        return f"query_block_size must be a multiple of 128, but is {query_block_size}"
    if kv_block_size > BLOCK_N or not pools_whole_blocks(kv_block_size, head_dim):
        return f"kv_block_size must be at most {min(BLOCK_N, 8192 // head_dim)}, but is {kv_block_size}"
    if num_levels > MAX_LEVELS or kv_block_size >> (num_levels - 1) < SMALLEST_COPY:
        return f"the coarsest of at most {MAX_LEVELS} levels must keep {SMALLEST_COPY} rows a block"
    return None


def hopper_layout(layout: PyramidLayout) -> PyramidLayout:
    """The layout with a tile of empty rows: what comes after the last centroids, and in place of missing blocks."""
    return PyramidLayout(layout.kv_blocks, layout.kv_block_size, layout.num_levels, BLOCK_N)


def hopper_attention_launch(
    query: Tensor,
    out: Tensor,
    lse: Tensor | None,
    pyramid: Pyramid,
    lists: ReadLists,
    level_mask: Tensor,
    layout: PyramidLayout,
    covariance: Covariance | None = None,
    head_bias: Tensor | None = None,
    *,
    query_block_size: int,
    order: Tensor | None,
    scale: float,
    first_head: int = 0,
    counter: Tensor | None = None,
    is_padded: bool = True,
) -> KernelLaunch:
    """As :func:`~.attention.attention_launch`; ``pyramid`` with a centroid bias, ``level_mask`` of all heads.

    ``is_padded=False`` promises that all keys are real: then only the last block's groups can be short.
    ``counter`` (int32 [1]) is 0 when the kernel starts; None = it is made here.
    """
    batch, query_length, heads, head_dim = query.shape
    query_blocks = triton.cdiv(query_length, query_block_size)
    rows = [max(layout.rows_per_block(level), SMALLEST_COPY) for level in range(1, layout.num_levels + 1)]
    rows += rows[-1:] * (MAX_LEVELS - len(rows))  # levels that are not there: never read
    tiles = batch * heads * query_blocks * (query_block_size // 128)
    arguments = {
        "query": query,
        **{f"rows_{level}": _boxes(pyramid.packed, size) for level, size in enumerate(rows, start=1)},
        "covariance": covariance and _boxes(covariance.matrix, head_dim),
        "covariance_factors": covariance and covariance.factors,
        "bias": pyramid.bias if head_bias is None else head_bias,
        "centroid_bias": pyramid.centroid_bias,
        "level_mask": level_mask,
        "blocks": lists.blocks,
        "counts": lists.counts,
        "launch_order": lists.launch_order,
        "order": order,
        "out": out,
        "lse": lse,
        "taken": torch.zeros(1, dtype=torch.int32, device=query.device) if counter is None else counter,
        "query_strides": query.stride(),
        "out_strides": out.stride(),
        "scale": scale,
        "tiles": tiles,
        "first_head": first_head,
        "heads": heads,
        "query_length": query_length,
        "query_blocks": query_blocks,
        "kv_blocks": layout.kv_blocks,
        "packed_rows": layout.rows,
        "first_value": batch * heads * layout.rows,
        "empty_row": layout.empty_row,
        "D": head_dim,
        "QUERY_BLOCK": query_block_size,
        "KV_BLOCK": layout.kv_block_size,
        "LEVELS": layout.num_levels,
        "BLOCK_N": BLOCK_N,
        "STAGES": STAGES,
        "ALIKE": 0 if is_padded or scale <= 0 else (layout.num_levels if head_bias is None else 1),
        "BIAS_OF_HEADS": head_bias is not None,
    }
    grid = (min(tiles, _processors(query.device)),)
    return KernelLaunch(hopper_attention_kernel, grid, arguments, num_warps=4)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _boxes(packed: Tensor, rows: int) -> object:
    """A descriptor of the rows of all heads, [..., head_dim], to be copied ``rows`` at a time."""
    head_dim = packed.shape[-1]
    layout = _shared_layout(head_dim, packed.dtype)
    return TensorDescriptor(packed, [packed.numel() // head_dim, head_dim], [head_dim, 1], [rows, head_dim], layout)


@cache
def _shared_layout(head_dim: int, dtype: torch.dtype) -> object:
    return NVMMASharedLayout.get_default_for([BLOCK_N, head_dim], bfloat16 if dtype == torch.bfloat16 else float16)
