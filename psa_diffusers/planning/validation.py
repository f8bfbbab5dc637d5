"""Checks of the tensors and sizes that the attention call and the planner are given."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    """query [batch, Sq, heads, head_dim], key and value [batch, Sk, heads, head_dim]; one dtype and one device.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that attention is not defined for.
        ValueError: shapes, dtypes or devices do not fit together.
    """
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, but is {type(tensor).__name__}.")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, but is {_short(tensor.dtype)}.")
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} must have 4 dimensions, [batch, seq, heads, head_dim], but has shape {tuple(tensor.shape)}."
            )
        if 0 in tensor.shape:
            raise ValueError(f"{name} must not be empty, but has shape {tuple(tensor.shape)}.")
    if key.shape != value.shape:
        raise ValueError(f"key and value must have one shape, but have {tuple(key.shape)} and {tuple(value.shape)}.")
    for axis, name in ((0, "batch"), (2, "heads"), (3, "head_dim")):
        if query.shape[axis] != key.shape[axis]:
            raise ValueError(
                f"query and key must agree in {name} (dimension {axis} of [batch, seq, heads, head_dim]), "
                f"but have shapes {tuple(query.shape)} and {tuple(key.shape)}."
            )
    if not query.dtype == key.dtype == value.dtype:
        kinds = ", ".join(_short(tensor.dtype) for tensor in tensors.values())
        raise ValueError(f"query, key and value must have one dtype, but have {kinds}; convert them first.")
    if not query.device == key.device == value.device:
        places = ", ".join(str(tensor.device) for tensor in tensors.values())
        raise ValueError(f"query, key and value must be on one device, but are on {places}.")


def check_grid(grid: object) -> tuple[int, int, int] | None:
    """``(frames, height, width)``, each at least 1, as plain ints; None stays None."""
    if grid is None:
        return None
    try:
        sizes = tuple(grid)
    except TypeError:
        raise TypeError(f"grid must be (frames, height, width), but is {grid!r}.") from None
    whole = all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)
    if len(sizes) != 3 or not whole or min(sizes) < 1:
        raise ValueError(f"grid must be (frames, height, width), three whole numbers from 1, but is {grid!r}.")
    return sizes


def check_full_tokens(full_tokens: object, length: int) -> tuple[int, int] | Tensor | None:
    """The tokens outside the grid, of a sequence of ``length``: (start, stop) of a slice, or a bool mask on the CPU.

    A slice is read as Python reads it (negative bounds count from the end), must have step 1 and must not reach
    beyond the sequence. A mask on a GPU is copied to the CPU, which waits for the GPU: prefer a slice there.
    None, and whatever selects no token, gives None.
    """
    if full_tokens is None:
        return None
    if isinstance(full_tokens, slice):
        return _check_slice(full_tokens, length)
    if isinstance(full_tokens, Tensor):
        if full_tokens.dtype != torch.bool or tuple(full_tokens.shape) != (length,):
            raise ValueError(
                f"full_tokens as a mask must be bool [{length}], one entry a token, "
                f"but is {_short(full_tokens.dtype)} {list(full_tokens.shape)}."
            )
        mask = full_tokens.detach().cpu()
        return mask if bool(mask.any()) else None
    raise TypeError(f"full_tokens must be a slice or a bool mask, but is {type(full_tokens).__name__}.")


def _check_slice(tokens: slice, length: int) -> tuple[int, int] | None:
    if tokens.step not in (None, 1):
        raise ValueError(f"full_tokens must be a slice with step 1, but is {tokens!r}; use a bool mask instead.")
    for bound in (tokens.start, tokens.stop):
        if bound is not None and (not isinstance(bound, int) or isinstance(bound, bool)):
            raise TypeError(f"full_tokens must be a slice of whole numbers, but is {tokens!r}.")
        if bound is not None and not -length <= bound <= length:
            raise ValueError(f"full_tokens must lie within the sequence of {length} tokens, but is {tokens!r}.")
    start, stop, _ = tokens.indices(length)
    return (start, stop) if stop > start else None


def count_full_tokens(full_tokens: tuple[int, int] | Tensor | None) -> int:
    """How many tokens :func:`check_full_tokens` found."""
    if full_tokens is None:
        return 0
    return int(full_tokens.sum()) if isinstance(full_tokens, Tensor) else full_tokens[1] - full_tokens[0]


def check_grid_fits(grid: tuple[int, int, int] | None, full_tokens: object, length: int) -> None:
    """The grid's cells and the full tokens together must be the sequence."""
    if grid is None:
        return
    cells, full = math.prod(grid), count_full_tokens(full_tokens)
    if cells + full != length:
        frames, height, width = grid
        raise ValueError(
            f"grid {frames} x {height} x {width} = {cells} tokens and {full} full tokens make {cells + full}, "
            f"but the sequence has {length}; full_tokens must name every token outside the grid."
        )


def check_key_lengths(key_lengths: object, batch: int, length: int, device: torch.device) -> Tensor | None:
    """int64 [batch] on ``device``: the number of real keys of each sample; None when all keys are real.

    Values are checked where they can be read without waiting for a GPU, that is on the CPU; on a GPU a value below 0
    counts as 0 and one above ``length`` as ``length``.
    """
    if key_lengths is None:
        return None
    if isinstance(key_lengths, list | tuple):
        whole = all(isinstance(item, int) and not isinstance(item, bool) for item in key_lengths)
        if not whole:
            raise TypeError(f"key_lengths must hold whole numbers, but is {key_lengths!r}.")
        key_lengths = torch.tensor(key_lengths, dtype=torch.int64)
    if not isinstance(key_lengths, Tensor):
        raise TypeError(f"key_lengths must be an int tensor [batch], but is {type(key_lengths).__name__}.")
    if key_lengths.dtype.is_floating_point or key_lengths.dtype.is_complex or key_lengths.dtype == torch.bool:
        raise TypeError(f"key_lengths must hold whole numbers, but is {_short(key_lengths.dtype)}.")
    if tuple(key_lengths.shape) != (batch,):
        raise ValueError(
            f"key_lengths must have one entry a sample, shape [{batch}], but has {list(key_lengths.shape)}."
        )
    if key_lengths.device.type == "cpu":
        bad = [int(item) for item in key_lengths if not 0 <= int(item) <= length]
        if bad:
            raise ValueError(f"key_lengths must lie within 0 to {length}, the number of keys, but holds {bad[0]}.")
    return key_lengths.to(device=device, dtype=torch.int64, non_blocking=True).clamp(0, length)


def check_scale(scale: object, head_dim: int) -> float:
    """The factor on the logits: a finite number; None gives 1 / sqrt(head_dim)."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"scale must be a number or None, but is {type(scale).__name__}.")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, but is {scale!r}.")
    return float(scale)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
