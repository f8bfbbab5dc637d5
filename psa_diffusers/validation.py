"""Checks of what callers pass to attention and planner. Each error names the argument, the rule and the value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Query, key and value are [batch, seq, heads, head_dim] of one dtype and device, and fit together.

    Raises:
        TypeError: not a tensor, or a dtype that is not fp16, bf16, fp32 or fp64.
        ValueError: shapes or devices do not fit.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, but is a {type(tensor).__name__}.")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must be [batch, seq, heads, head_dim], but has shape {tuple(tensor.shape)}.")
        if 0 in tensor.shape:
            raise ValueError(f"{name} must not be empty, but has shape {tuple(tensor.shape)}.")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, but is {tensor.dtype}.")
        if tensor.dtype != query.dtype:
            raise TypeError(
                f"query, key, value must have one dtype, but {name} is {tensor.dtype}, query {query.dtype}."
            )
        if tensor.device != query.device:
            raise ValueError(
                f"query, key, value must be on one device, but {name} is on {tensor.device}, query on {query.device}."
            )
    if key.shape != value.shape:
        raise ValueError(
            f"key and value must have the same shape, but are {tuple(key.shape)} and {tuple(value.shape)}."
        )
    if (query.shape[0], *query.shape[2:]) != (key.shape[0], *key.shape[2:]):
        raise ValueError(
            "query and key must have the same batch, heads and head_dim (repeat the heads of grouped keys first), "
            f"but are {tuple(query.shape)} and {tuple(key.shape)}."
        )


def check_scale(scale: float | None, head_dim: int) -> float:
    """The factor of the logits: the one given, or ``head_dim ** -0.5``.

    Raises:
        TypeError: scale is not a number.
        ValueError: scale is not finite and above 0.
    """
    if scale is None:
        return head_dim**-0.5
    if not isinstance(scale, Real) or isinstance(scale, bool):
        raise TypeError(f"scale must be a number or None, but is a {type(scale).__name__}.")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be finite and above 0, but is {scale!r}.")
    return float(scale)


def check_key_lengths(key_lengths: Tensor | Sequence[int] | None, batch: int, key_length: int) -> None:
    """Integers, one a sample, in [0, key_length]. Values are only read where that costs no synchronisation.

    Raises:
        TypeError: not integers.
        ValueError: wrong shape, or values outside the range.
    """
    if key_lengths is None:
        return
    if not isinstance(key_lengths, Tensor):
        if not all(isinstance(length, int) and not isinstance(length, bool) for length in key_lengths):
            raise TypeError(f"key_lengths must be whole numbers, but is {key_lengths!r}.")
        key_lengths = torch.tensor(key_lengths, dtype=torch.int64)
    if key_lengths.dtype not in (torch.int16, torch.int32, torch.int64):
        raise TypeError(f"key_lengths must be an integer tensor, but is {key_lengths.dtype}.")
    if key_lengths.shape != (batch,):
        raise ValueError(f"key_lengths must be [batch] = [{batch}], but has shape {tuple(key_lengths.shape)}.")
    if key_lengths.device.type == "cpu" and not bool(((key_lengths >= 0) & (key_lengths <= key_length)).all()):
        raise ValueError(f"key_lengths must lie in [0, {key_length}] (the keys), but is {key_lengths.tolist()}.")


def check_grid(
    grid: Sequence[int] | None, full_tokens: slice | Tensor | None, query_length: int, key_length: int
) -> None:
    """The grid's tokens and the full tokens make up the sequence.

    Raises:
        TypeError: grid is not three whole numbers, or full_tokens neither a slice nor a bool tensor.
        ValueError: a size below 1, a mask of the wrong length, or a token count that does not fit.
    """
    full = count_full_tokens(full_tokens, key_length)
    if grid is None:
        return
    good = isinstance(grid, Sequence) and all(isinstance(size, int) and not isinstance(size, bool) for size in grid)
    if not good or len(grid) != 3:
        raise TypeError(f"grid must be three whole numbers (frames, height, width), but is {grid!r}.")
    if min(grid) < 1:
        raise ValueError(f"grid must have sizes of at least 1, but is {tuple(grid)}.")
    if query_length != key_length:
        raise ValueError(
            f"grid belongs to self-attention, but there are {query_length} queries and {key_length} keys; leave it out."
        )
    video = math.prod(grid)
    if video + full != key_length:
        raise ValueError(
            f"grid {tuple(grid)} has {video} tokens, and full_tokens names {full}, but the sequence has {key_length}; "
            "they must add up (name text and conditioning tokens in full_tokens)."
        )


def count_full_tokens(full_tokens: slice | Tensor | None, key_length: int) -> int:
    """How many of the keys are full tokens. Raises as :func:`check_grid` does."""
    if full_tokens is None:
        return 0
    if isinstance(full_tokens, slice):
        return len(range(*full_tokens.indices(key_length)))
    if not isinstance(full_tokens, Tensor) or full_tokens.dtype != torch.bool:
        kind = full_tokens.dtype if isinstance(full_tokens, Tensor) else type(full_tokens).__name__
        raise TypeError(f"full_tokens must be a slice, a bool tensor or None, but is {kind}.")
    if full_tokens.shape != (key_length,):
        raise ValueError(
            f"full_tokens must be [seq] = [{key_length}], the same for the whole batch, "
            f"but has shape {tuple(full_tokens.shape)}."
        )
    return int(full_tokens.sum())
