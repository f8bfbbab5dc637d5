"""The Triton backend's entry point: builds the pyramid and the lists, and launches attention over them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...gpu.target import target_of, tensor_obstacle
from ...planning.plan import Plan
from .attention import attention_launch
from .covariance import blocks_read_by_all, build_covariance
from .layout import PyramidLayout
from .pyramid import build_pyramid
from .read_lists import ReadLists, read_lists

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
    2.84 times that of K and V with the variance), until it returns. Nothing here waits for the device.

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
    query_block_size, kv_block_size, num_levels = block_sizes
    layout = PyramidLayout(blocks.shape[1], kv_block_size, num_levels)
    pyramid = build_pyramid(key, value, layout, order=order, key_lengths=key_lengths, with_variance=with_variance)
    covariance = None if counted is None else build_covariance(pyramid, layout, counted)
    out, lse = _empty_result(query, return_lse)
    attention_launch(
        query,
        out,
        lse if return_lse else None,
        pyramid,
        ReadLists(blocks, counts, launch_order),
        layout,
        covariance,
        query_block_size=query_block_size,
        order=order,
        scale=scale,
        target=target_of(query.device),
    ).run()
    return out, lse


@launch_attention.register_fake
def _(query: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    return _empty_result(query, return_lse=bool(arguments[-1]))


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
