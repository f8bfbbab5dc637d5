"""Which GPU this is, and what a kernel cannot run on."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .sizes import next_power_of_2

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # as it was when the kernels were decorated


def padded_head_dim(head_dim: int) -> int:
    """Channels of a tile: the next power of two, at least the 16 that a matrix unit takes."""
    return max(16, next_power_of_2(head_dim))


def target_of(device: torch.device) -> str:
    """The target of a device as the tile tables name it ("sm_90", "gfx942"); "cpu" under the interpreter."""
    if device.type != "cuda":
        return "cpu"
    properties = _properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@cache
def _properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)  # asks more of the host than it seems


def tensor_obstacle(query: Tensor) -> str | None:
    """Why no kernel can take tensors like this one, as a clause for a message; None if they can."""
    if query.device.type != "cuda" and not (query.device.type == "cpu" and INTERPRETED):
        return f"the tensors are on {query.device}, not on a CUDA or ROCm GPU"
    if query.device.type == "cuda" and not torch.version.hip:
        capability = _properties(query.device)
        if capability.major < 8:
            return f"the GPU must have compute capability 8.0 or newer, but has {capability.major}.{capability.minor}"
    if query.dtype not in DTYPES:
        return f"dtype must be float32, float16 or bfloat16, but is {query.dtype}"
    if query.dtype == torch.bfloat16 and INTERPRETED:
        return "Triton's interpreter does not compute in bfloat16"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim must be at most {MAX_HEAD_DIM}, but is {query.shape[-1]}"
    return None
