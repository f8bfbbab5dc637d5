"""Stores a pyramid's keys and values in e4m3 and launches the kernel over them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from fp8_kernel import fp8_attention_kernel
from torch import Tensor
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from psa_diffusers.backends.triton.hopper import BLOCK_N, SMALLEST_COPY
from psa_diffusers.backends.triton.layout import PyramidLayout
from psa_diffusers.backends.triton.pyramid import Pyramid
from psa_diffusers.backends.triton.read_lists import ReadLists
from psa_diffusers.gpu.kernel_launch import KernelLaunch

LARGEST = 448.0
GRANULE = 16  # rows of values


class Short(NamedTuple):
    """A pyramid in e4m3. Scales and means float32."""

    key: Tensor  # uint8 [batch, heads, rows, head_dim]
    key_scale: Tensor  # [batch, heads]
    value: Tensor | None  # uint8 [batch, heads, rows, head_dim]: granules; None = values stay as they are
    value_scale: Tensor  # [batch, heads, head_dim]
    value_mean: Tensor


def short_layout(layout: PyramidLayout) -> PyramidLayout:
    """The layout with a tile of empty rows, and whole granules."""
    rows = PyramidLayout(layout.kv_blocks, layout.kv_block_size, layout.num_levels, BLOCK_N).rows
    return PyramidLayout(layout.kv_blocks, layout.kv_block_size, layout.num_levels, BLOCK_N + -rows % GRANULE)


def shorten(pyramid: Pyramid, layout: PyramidLayout, with_values: bool) -> Short:
    """By torch operators, many passes: what is timed is attention. The mean is that of the rows of level 1."""
    tokens = layout.first_row(2)
    real = (pyramid.bias > -torch.inf)[:, None, :, None]
    key = pyramid.key.float()
    key = torch.where(real, key - key[:, :, :tokens].mean(2, keepdim=True), 0)
    key_scale = key.abs().amax((2, 3)).clamp(min=1e-30) / LARGEST
    short_key = (key / key_scale[:, :, None, None]).to(torch.float8_e4m3fn).view(torch.uint8)
    del key
    value = pyramid.value.float()
    mean = value[:, :, :tokens].mean(2, keepdim=True)
    value = torch.where(real, value - mean, 0)
    value_scale = value.abs().amax(2, keepdim=True).clamp(min=1e-30) / LARGEST
    granules = None
    if with_values:
        granules = value_granules((value / value_scale).to(torch.float8_e4m3fn).view(torch.uint8))
    return Short(short_key, key_scale, granules, value_scale[:, :, 0].contiguous(), mean[:, :, 0].contiguous())


def value_granules(value: Tensor) -> Tensor:
    """Bytes [..., rows, head_dim] in granules: 16 rows as [head_dim, 16], in the order of a thread's weights.

    A thread holds, of each 16 logits, columns 2 t, 2 t + 1, 8 + 2 t, 8 + 2 t + 1, and is to have operands 4 t .. 4 t +
    3. The copy engine swaps pieces of 16 bytes inside rows of 128, row by row; they are swapped beforehand, so that
    they come out in order.
    """
    *heads, rows, head_dim = value.shape
    columns = torch.arange(GRANULE).view(2, 4, 2).transpose(0, 1).flatten().to(value.device)
    granules = value.unflatten(-2, (rows // GRANULE, GRANULE))[..., columns, :].mT  # [..., granules, head_dim, 16]
    lines = granules.reshape(*heads, rows // 8, 8, head_dim // 16, 16)  # [..., line % 8, piece, 16]: 128 bytes a line
    line, piece = torch.arange(8).view(8, 1), torch.arange(head_dim // 16)
    swapped = (piece ^ line).to(value.device)
    lines = lines.gather(-2, swapped[..., None].expand(lines.shape))
    return lines.reshape(value.shape)


def fp8_attention_launch(
    query: Tensor,
    out: Tensor,
    pyramid: Pyramid,
    short: Short,
    lists: ReadLists,
    level_mask: Tensor,
    layout: PyramidLayout,
    *,
    query_block_size: int,
    order: Tensor | None,
    scale: float,
    stages: int,
    fresh: bool = False,
    convert_first: bool = False,
    flat: bool = False,
    registers: int = 232,
    processors: int = 132,
    counter: Tensor | None = None,
) -> KernelLaunch:
    batch, query_length, heads, head_dim = query.shape
    query_blocks = triton.cdiv(query_length, query_block_size)
    sizes = [max(layout.rows_per_block(level), SMALLEST_COPY) for level in range(1, layout.num_levels + 1)]
    sizes += sizes[-1:] * (4 - len(sizes))
    tiles = batch * heads * query_blocks * (query_block_size // 128)
    keys = short.key.view(torch.bfloat16)
    values = pyramid.value if short.value is None else short.value.view(torch.bfloat16)
    arguments = {
        "query": query,
        **{f"keys_{level}": _boxes(keys, size) for level, size in enumerate(sizes, start=1)},
        **{f"values_{level}": _boxes(values, size) for level, size in enumerate(sizes, start=1)},
        "key_scales": short.key_scale,
        "value_scales": short.value_scale,
        "value_means": short.value_mean,
        "bias": pyramid.bias,
        "centroid_bias": pyramid.centroid_bias,
        "level_mask": level_mask,
        "blocks": lists.blocks,
        "counts": lists.counts,
        "launch_order": lists.launch_order,
        "order": order,
        "out": out,
        "taken": torch.zeros(1, dtype=torch.int32, device=query.device) if counter is None else counter,
        "query_strides": query.stride(),
        "out_strides": out.stride(),
        "scale": scale,
        "tiles": tiles,
        "first_head": 0,
        "heads": heads,
        "query_length": query_length,
        "query_blocks": query_blocks,
        "kv_blocks": layout.kv_blocks,
        "packed_rows": layout.rows,
        "empty_row": layout.empty_row,
        "D": head_dim,
        "QUERY_BLOCK": query_block_size,
        "KV_BLOCK": layout.kv_block_size,
        "LEVELS": layout.num_levels,
        "BLOCK_N": BLOCK_N,
        "STAGES": stages,
        "VALUES8": short.value is not None,
        "FRESH": fresh,
        "CONVERT_FIRST": convert_first,
        "FLAT": flat,
        "REGISTERS": registers,
    }
    return KernelLaunch(fp8_attention_kernel, (min(tiles, processors),), arguments, num_warps=4)


def _boxes(packed: Tensor, rows: int) -> TensorDescriptor:
    width = packed.shape[-1]
    layout = NVMMASharedLayout(128, 16, 2)
    return TensorDescriptor(packed, [packed.numel() // width, width], [width, 1], [rows, width], layout)
