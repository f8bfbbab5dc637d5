"""pyramid_sparse_attention: check the arguments, plan, and hand the work to a backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .autocasting import without_autocast
from .backends import find_backend, get_backend, triton_obstacle
from .config import PSAConfig
from .planning import Plan, build_plan
from .planning.validation import check_key_lengths, check_scale, check_tensors


def pyramid_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    config: PSAConfig | None = None,
    *,
    grid: Sequence[int] | None = None,
    full_tokens: slice | Tensor | None = None,
    key_lengths: Tensor | Sequence[int] | None = None,
    scale: float | None = None,
    plan: Plan | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention that reads important blocks of keys and values finely, the others pooled (arXiv 2512.04025).

    Args:
        query: [batch, query_length, heads, head_dim], float16, bfloat16, float32 or float64, any strides.
        key, value: [batch, key_length, heads, head_dim], same dtype and device.
        config: How to plan and compute; ``PSAConfig()`` when left out.
        grid: (frames, height, width) of the video tokens, in raster order. Lets blocks be compact in time and space.
        full_tokens: The tokens outside the grid (text, conditioning): a slice, or bool [seq]. Every query reads them
            at full resolution, and they read everything so.
        key_lengths: int [batch]; keys from that raster position on are padding, which no one reads.
        scale: Factor of the logits; ``head_dim ** -0.5`` when left out.
        plan: A plan for these shapes made before by :func:`build_plan`: saves planning. It holds its own order and
            key_lengths, so grid and full_tokens have no say, and key_lengths must be the plan's or left out.
        return_lse: Also return the natural logarithm of the softmax denominators.

    Returns:
        Output [batch, query_length, heads, head_dim] in the query's dtype; with return_lse also lse
        [batch, heads, query_length] (float32; float64 for float64 inputs). A query that has nothing to read (all its
        keys are padding) gets output 0 and lse -inf.

    Raises:
        TypeError, ValueError: an argument breaks its rule, does not fit the others or the plan, or the backend that the
            config names cannot compute this. The message names the argument, the rule and the value.
    """
    config = PSAConfig() if config is None else config
    if not isinstance(config, PSAConfig):
        raise TypeError(f"config must be a PSAConfig or None, but is a {type(config).__name__}.")
    check_tensors(query, key, value)
    scale = check_scale(scale, query.shape[-1])
    if torch.compiler.is_compiling() and triton_obstacle(query) is not None:
        layout = {"grid": grid, "full_tokens": full_tokens, "key_lengths": key_lengths, "plan": plan}
        return _uncompiled(query, key, value, config, **layout, scale=scale, return_lse=return_lse)
    if plan is None:
        plan = build_plan(
            query, key, value, config, grid=grid, full_tokens=full_tokens, key_lengths=key_lengths, scale=scale
        )
    else:
        check_plan(plan, query, key, key_lengths)
    probe = next((tensor for tensor in (query, key, value) if tensor.requires_grad), query)
    attend = get_backend(find_backend(config.backend, probe, plan))
    with without_autocast(query.device):
        out, lse = attend(
            query,
            key,
            value,
            plan,
            scale=scale,
            logit_correction=config.logit_correction,
            value_correction="covariance" if config.value_correction in ("covariance", "fitted") else "none",
            return_lse=return_lse,
        )
    return (out, lse) if return_lse else out


@torch.compiler.disable
def _uncompiled(*args: Any, **options: Any) -> Tensor | tuple[Tensor, Tensor]:
    """Without the kernels, what is computed differs from plan to plan: each would be compiled anew, for minutes."""
    return pyramid_sparse_attention(*args, **options)


def check_plan(plan: Plan, query: Tensor, key: Tensor, key_lengths: Tensor | Sequence[int] | None = None) -> None:
    """The plan was made for tensors of these shapes, on this device, with these key_lengths.

    Raises:
        TypeError: plan is not a Plan.
        ValueError: it belongs to other shapes, another device or other key_lengths.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan from build_plan, but is a {type(plan).__name__}.")
    batch, query_length, heads, _ = query.shape
    made_for = {
        "batch": (plan.level_mask.shape[0], batch),
        "heads": (plan.level_mask.shape[1], heads),
        "query_length": (plan.query_length, query_length),
        "key_length": (plan.key_length, key.shape[1]),
    }
    for name, (planned, given) in made_for.items():
        if planned != given:
            raise ValueError(f"plan was made for {name} {planned}, but the tensors have {given}; build a new plan.")
    blocks = (plan.query_blocks, plan.kv_blocks)
    if tuple(plan.level_mask.shape[2:]) != blocks:
        raise ValueError(
            f"plan.level_mask must be [batch, heads, query_blocks, kv_blocks] = [{batch}, {heads}, {blocks[0]}, "
            f"{blocks[1]}] for its block sizes, but has shape {tuple(plan.level_mask.shape)}."
        )
    if plan.level_mask.dtype != torch.int8:
        raise TypeError(f"plan.level_mask must be int8, but is {plan.level_mask.dtype}.")
    if plan.level_mask.device != query.device:
        raise ValueError(f"plan is on {plan.level_mask.device}, but query on {query.device}; build the plan there.")
    if plan.level_mask.device.type == "cpu":  # elsewhere, looking would synchronise
        lowest, highest = (int(level) for level in plan.level_mask.aminmax())
        if lowest < 0 or highest > plan.num_levels + 1:
            raise ValueError(
                f"plan.level_mask must hold levels 0 to num_levels + 1 = {plan.num_levels + 1}, "
                f"but holds {lowest} to {highest}."
            )
    _check_planned_lengths(plan, check_key_lengths(key_lengths, batch, key.shape[1], query.device))


def _check_planned_lengths(plan: Plan, key_lengths: Tensor | None) -> None:
    if key_lengths is None:
        return
    if plan.key_lengths is None:
        raise ValueError("plan was made without key_lengths, but key_lengths is given; build a new plan.")
    if plan.key_lengths.device.type != "cpu" or key_lengths.device.type != "cpu":
        return  # a look at their values would synchronise
    if not torch.equal(plan.key_lengths, key_lengths):
        raise ValueError(
            f"plan was made for key_lengths {plan.key_lengths.tolist()}, but {key_lengths.tolist()} is given; "
            "leave key_lengths out or build a new plan."
        )
