"""What a user has otherwise: the dense attentions of this machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


class Rival(NamedTuple):
    """Another sparse attention, to be timed beside this one."""

    run: Callable[[], Tensor]
    budget: float  # mean cost of a block pair, dense = 1
    plan_given: bool = False  # what it reads is chosen beforehand: to be compared with attention alone
    in_order: bool = True  # its output is in the tokens' own order


_SDPA = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``F.scaled_dot_product_attention`` on [batch, seq, heads, head_dim]."""
    heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def dense_rivals(query: Tensor, key: Tensor, value: Tensor) -> tuple[dict[str, Attention], dict[str, str]]:
    """Dense attentions that work on these tensors, by name, and why the others do not.

    On a CPU that is torch's own; on a GPU each of torch's kernels by itself, and FlashAttention-3 if it is installed.
    """
    if query.device.type != "cuda":
        return {"sdpa": sdpa}, {}
    candidates: dict[str, Attention] = {name: _pinned(backend) for name, backend in _SDPA.items()}
    missing = {}
    if importlib.util.find_spec("flash_attn_interface") is not None:
        candidates["flash-attention 3"] = _flash_attention_3
    else:
        missing["flash-attention 3"] = "flash_attn_interface is not installed"
    found = {}
    for name, attention in candidates.items():
        try:
            attention(query, key, value)
            found[name] = attention
        except Exception as error:  # each refuses devices, dtypes and head dims in its own way
            missing[name] = reason(error)
    if not found:
        found["sdpa"] = sdpa
    return found, missing


def reason(error: Exception) -> str:
    """An error as one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _pinned(backend: SDPBackend) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(query, key, value)

    return attention


def _flash_attention_3(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    out = flash_attn_func(query, key, value)
    return out[0] if isinstance(out, tuple) else out
