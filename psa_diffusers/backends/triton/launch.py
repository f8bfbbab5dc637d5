"""The Triton backend's entry point: builds the pyramid and the lists, and launches attention over them."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...gpu.target import target_of, tensor_obstacle
from ...planning.plan import Plan
from . import hopper
from .attention import attention_launch
from .covariance import blocks_read_by_all, build_covariance
from .layout import PyramidLayout
from .pyramid import build_pyramid
from .read_lists import ReadLists, read_lists

GROUP_BLOCKS = 4096  # query blocks of a group of heads, at least: 30 a processor of a large GPU
MAX_GROUPS = 4  # a sample
MAX_KV_BLOCK_SIZE = 1024  # one program of the pyramid kernel holds a block


def attend_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    *,
    scale: float,
    logit_correction: str = "none",
    value_correction: str = "none",
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention over the levels that the plan names; what :func:`attend_reference` defines, on a GPU. No gradients.

    Args:
        query: [batch, query_length, heads, head_dim], any strides; fp32 (exact products, slow), fp16 or bf16.
        key, value: [batch, key_length, heads, head_dim], any strides, dtype of ``query``.
        plan: What each block of queries reads. Block lists made from it stay in its cache.
        scale: Factor of the logits, usually ``head_dim ** -0.5``.
        logit_correction: ``"none"`` (the paper) or ``"variance"``.
        value_correction: ``"none"`` (the paper) or ``"covariance"``.
        return_lse: Also return the logarithm of the softmax denominators.

    Returns:
        Output like ``query`` (contiguous), and lse float32 [batch, heads, query_length] (natural logarithm) or None. A
        query with nothing to read gets output 0 and lse -inf.

    Besides inputs and output this takes 1.89 times the memory of K and V for the pyramid (4 levels, kv blocks of 64;
    2.84 times that of K and V with the variance), until it returns; a quarter of that for long videos, whose heads are
    computed in groups. Nothing here waits for the device.

    Raises:
        ValueError: the device, dtype, head_dim or block sizes are not supported; the message says which.
    """
    if obstacle := why_unsupported(query, plan):
        raise ValueError(f"attend_triton: {obstacle}; use backend='torch' or backend='reference'.")
    lists = read_lists(plan, query.device)
    out, lse = launch_attention(
        query,
        key,
        value,
        plan.level_mask.to(query.device),
        *lists,
        None if plan.order is None else plan.order.to(query.device),
        None if plan.key_lengths is None else plan.key_lengths.to(query.device),
        blocks_read_by_all(plan, query.device) if value_correction == "covariance" else None,
        [plan.query_block_size, plan.kv_block_size, plan.num_levels],
        scale,
        logit_correction == "variance",
        return_lse,
    )
    return out, lse if return_lse else None


@torch.library.custom_op("psa_diffusers::attend_triton", mutates_args=())
def launch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    level_mask: Tensor,
    blocks: Tensor,
    counts: Tensor,
    launch_order: Tensor,
    order: Tensor | None,
    key_lengths: Tensor | None,
    counted: Tensor | None,
    block_sizes: list[int],
    scale: float,
    with_variance: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`attend_triton` as one operation of a compiled graph: tensors and numbers in, tensors out.

    ``counted`` are the blocks that the value correction's covariance is taken over, None for no such correction;
    ``block_sizes`` are query_block_size, kv_block_size and num_levels; an lse that is not asked for is empty.
    """
    lists = ReadLists(blocks, counts, launch_order)
    out, lse = _empty_result(query, return_lse)
    options = _Options(*block_sizes, scale, with_variance, level_mask.contiguous(), order)
    batch, length, heads, _ = query.shape
    for samples, some_heads in head_groups(batch, heads, triton.cdiv(length, options.query_block_size)):
        parts = (tensor[samples, :, some_heads] for tensor in (query, key, value, out))
        some_lengths = None if key_lengths is None else key_lengths[samples]
        some_counted = None if counted is None else counted[samples, some_heads]
        first_head = samples.start * heads + some_heads.start
        _attend_heads(*parts, lse if return_lse else None, lists, some_lengths, some_counted, first_head, options)
    return out, lse


@launch_attention.register_fake
def _(query: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    return _empty_result(query, return_lse=bool(arguments[-1]))


class _Options(NamedTuple):
    query_block_size: int
    kv_block_size: int
    num_levels: int
    scale: float
    with_variance: bool
    level_mask: Tensor
    order: Tensor | None


def _attend_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor | None,
    lists: ReadLists,
    key_lengths: Tensor | None,
    counted: Tensor | None,
    first_head: int,
    options: _Options,
) -> None:
    """Fills ``out``, and the part of ``lse`` (of all heads, as ``lists`` are), for some of the heads."""
    target = target_of(query.device)
    layout = PyramidLayout(lists.blocks.shape[1], options.kv_block_size, options.num_levels)
    is_hopper = not hopper.hopper_obstacle(target, query.shape[-1], query.dtype, *options[:3], options.with_variance)
    if is_hopper:
        layout = hopper.hopper_layout(layout)
    pyramid = build_pyramid(
        key,
        value,
        layout,
        order=options.order,
        key_lengths=key_lengths,
        with_variance=options.with_variance,
        with_centroid_bias=is_hopper,
    )
    covariance = None if counted is None else build_covariance(pyramid, layout, counted.contiguous())
    named = {
        "query_block_size": options.query_block_size,
        "order": options.order,
        "scale": options.scale,
        "first_head": first_head,
    }
    if is_hopper:
        launch = hopper.hopper_attention_launch(
            query, out, lse, pyramid, lists, options.level_mask, layout, covariance, **named
        )
    else:
        launch = attention_launch(query, out, lse, pyramid, lists, layout, covariance, target=target, **named)
    launch.run()


def head_groups(batch: int, heads: int, query_blocks: int) -> list[tuple[slice, slice]]:
    """Samples and heads that are computed at a time: all, or a part of one sample's heads.

    Each group has a pyramid of its own, and the next one takes its memory. A group keeps enough query blocks that the
    last of them, when processors run out of work, take little of its time.
    """
    parts = min(MAX_GROUPS, heads, heads * query_blocks // GROUP_BLOCKS)
    if parts <= 1:
        return [(slice(0, batch), slice(0, heads))]
    bounds = [heads * part // parts for part in range(parts + 1)]
    return [(slice(b, b + 1), slice(*pair)) for b in range(batch) for pair in itertools.pairwise(bounds)]


def _empty_result(query: Tensor, return_lse: bool) -> tuple[Tensor, Tensor]:
    batch, query_length, heads, _ = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out, query.new_empty((batch, heads, query_length) if return_lse else 0, dtype=torch.float32)


def why_unsupported(query: Tensor, plan: Plan | None = None) -> str | None:
    """Why these kernels cannot compute this, as a clause for a message; None if they can."""
    if obstacle := tensor_obstacle(query):
        return obstacle
    if plan is not None and plan.kv_block_size > MAX_KV_BLOCK_SIZE:
        return f"kv_block_size must be at most {MAX_KV_BLOCK_SIZE}, but is {plan.kv_block_size}"
    if plan is not None and plan.value_gain is not None:
        return "they have no value gain a head (value_correction='fitted')"
    return None


def kernel_note(query: Tensor, plan: Plan) -> str:
    """For reports: whether the Hopper kernel computes this, and why not; empty on other GPUs."""
    target = target_of(query.device)
    if target != "sm_90":
        return ""
    sizes = (plan.query_block_size, plan.kv_block_size, plan.num_levels)
    obstacle = hopper.hopper_obstacle(target, query.shape[-1], query.dtype, *sizes)
    return f"The Hopper kernel is not used: {obstacle}." if obstacle else "The Hopper kernel is used."
