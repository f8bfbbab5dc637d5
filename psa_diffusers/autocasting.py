"""torch.autocast around PSA: planning and sparse attention choose their dtypes themselves."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Inside, torch.autocast changes no dtype: estimates stay float32."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What torch.autocast casts to on this device now; None where it is off, or unknown to torch."""
    known = device.type != "meta" and torch.amp.is_autocast_available(device.type)
    return torch.get_autocast_dtype(device.type) if known and torch.is_autocast_enabled(device.type) else None


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As torch's own attention function sees them under torch.autocast: of one dtype, float64 excepted."""
    dtype = autocast_dtype(tensors[0].device)
    if dtype is None or any(tensor.dtype == torch.float64 for tensor in tensors):
        return tensors
    return tuple(tensor.to(dtype) for tensor in tensors)
