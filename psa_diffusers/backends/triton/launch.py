"""The Triton backend's entry point: builds the pyramid and the lists, and launches attention over them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...gpu.eager import is_plain
from ...gpu.recipe import Recipes, Recording
from ...gpu.sizes import ceil_div
from ...gpu.target import target_of, tensor_obstacle
from ...planning.plan import Plan
from . import hopper
from .attention import attention_launch
from .covariance import covariance_launches
from .layout import PyramidLayout
from .logit_variance import pyramid_launches
from .pyramid import empty_pyramid, pyramid_launch
from .read_lists import ReadLists, read_lists

GROUP_BLOCKS = 1024  # query blocks of a group of heads, at least: 8 a processor of a large GPU
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

    Besides inputs and output this takes, until it returns, the memory of the pyramid, 1.89 times that of K and V (4
    levels, kv blocks of 64), or a third or a quarter of it for long videos, whose heads are computed in groups; and of
    the value correction's sums, about 35 MB at head dim 128. A shape's first call prepares the next ones, and takes
    some more. Nothing here waits for the device.

    Raises:
        ValueError: the device, dtype, head_dim or block sizes are not supported; the message says which.
    """
    if obstacle := why_unsupported(query, plan):
        raise ValueError(f"attend_triton: {obstacle}; use backend='torch' or backend='reference'.")
    lists = read_lists(plan, query.device)
    compute = compute_attention if is_plain(query) else launch_attention
    out, lse = compute(
        query,
        key,
        value,
        plan.level_mask.to(query.device),
        lists.blocks,
        lists.counts,
        lists.launch_order,
        None if plan.order is None else plan.order.to(query.device),
        None if plan.key_lengths is None else plan.key_lengths.to(query.device),
        lists.read_by_all if value_correction == "covariance" else None,
        plan.value_gain if value_correction == "covariance" else None,
        [plan.query_block_size, plan.kv_block_size, plan.num_levels],
        scale,
        logit_correction == "variance",
        return_lse,
    )
    return out, lse if return_lse else None


def compute_attention(
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
    value_gain: Tensor | None,
    block_sizes: list[int],
    scale: float,
    with_variance: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`attend_triton` with tensors and numbers alone.

    ``counted`` are the blocks that the value correction's covariance is taken over, None for no such correction,
    ``value_gain`` how much of it each head gets, None for all of it;
    ``block_sizes`` are query_block_size, kv_block_size and num_levels; an lse that is not asked for is empty.
    """
    out, lse = _empty_result(query, return_lse)
    some_lse = lse if return_lse else None
    level_mask = level_mask.contiguous()
    options = _Options(*block_sizes, scale, with_variance, hopper.ENABLED)
    batch, length, heads, _ = query.shape
    for samples, some_heads in head_groups(batch, heads, ceil_div(length, options.query_block_size)):
        parts, lengths, some_counted, gain = (query, key, value, out), key_lengths, counted, value_gain
        if (samples.stop, some_heads.stop) != (batch, heads) or (samples.start, some_heads.start) != (0, 0):
            parts = [tensor[samples, :, some_heads] for tensor in parts]
            lengths = None if lengths is None else lengths[samples]
            some_counted = None if counted is None else counted[samples, some_heads].contiguous()
            gain = None if gain is None else gain[samples, some_heads].contiguous()
        first_head = samples.start * heads + some_heads.start
        inputs = (*parts, some_lse, level_mask, blocks, counts, launch_order, order, lengths, some_counted, gain)
        _RECIPES.run((first_head, options), inputs, partial(_record, first_head=first_head, options=options))
    return out, lse


# The same as one operation of a compiled graph.
launch_attention = torch.library.custom_op("psa_diffusers::attend_triton", compute_attention, mutates_args=())


@launch_attention.register_fake
def _(query: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    return _empty_result(query, return_lse=bool(arguments[-1]))


_RECIPES = Recipes()  # of a group of heads


class _Options(NamedTuple):
    query_block_size: int
    kv_block_size: int
    num_levels: int
    scale: float
    with_variance: bool
    hopper_enabled: bool


def _record(inputs: Sequence[Tensor | None], first_head: int, options: _Options) -> Recording:
    """Fills the output, and the part of the lse (of all heads, as the lists are), for a group of heads."""
    query, key, value, out, lse, level_mask, blocks, counts, launch_order, order, key_lengths, counted, gain = inputs
    lists = ReadLists(blocks, counts, launch_order, None, None)
    target = target_of(query.device)
    layout = PyramidLayout(blocks.shape[1], options.kv_block_size, options.num_levels)
    is_hopper = not hopper.hopper_obstacle(target, query.shape[-1], query.dtype, *options[:3])
    if is_hopper:
        layout = hopper.hopper_layout(layout)
    pyramid = empty_pyramid(key, layout, with_centroid_bias=is_hopper)
    counter = query.new_empty(1, dtype=torch.int32) if is_hopper else None
    covariance = head_bias = None
    keys = (key, value, pyramid, layout, order, key_lengths)
    if options.with_variance:
        head_bias, launches = pyramid_launches(query, *keys, scale=options.scale, counter=counter)
    else:
        launches = [pyramid_launch(*keys, counter)]
    if counted is not None:
        covariance, more = covariance_launches(pyramid, layout, counted, gain)
        launches += more
    named = {"query_block_size": options.query_block_size, "order": order, "scale": options.scale}
    tensors = (query, out, lse, pyramid, lists)
    if is_hopper:
        named |= {"first_head": first_head, "counter": counter, "is_padded": key_lengths is not None}
        launches.append(hopper.hopper_attention_launch(*tensors, level_mask, layout, covariance, head_bias, **named))
    else:
        named |= {"first_head": first_head, "target": target}
        launches.append(attention_launch(*tensors, layout, covariance, head_bias, **named))
    return Recording([(launch, launch.run()) for launch in launches], results=())


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
    return None


def kernel_note(query: Tensor, plan: Plan) -> str:
    """For reports: whether the Hopper kernel computes this, and why not; empty on other GPUs."""
    target = target_of(query.device)
    if target != "sm_90":
        return ""
    sizes = (plan.query_block_size, plan.kv_block_size, plan.num_levels)
    obstacle = hopper.hopper_obstacle(target, query.shape[-1], query.dtype, *sizes)
    return f"The Hopper kernel is not used: {obstacle}." if obstacle else "The Hopper kernel is used."
