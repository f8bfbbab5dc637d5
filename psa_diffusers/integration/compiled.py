"""What torch.compile needs: one opaque operation for a sparse call, so that a compiled block stays one graph."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

_BREAKS_SAY_WHY = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)

# An operation takes tensors and numbers only: it finds its processor here.
_processors: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def register_processor(processor: Any) -> int:
    """A number by which :func:`self_attention` finds this processor, as long as it lives."""
    _processors[id(processor)] = processor
    return id(processor)


@torch.library.custom_op(
    "psa_diffusers::self_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor position, int processor, "
    "float? scale, bool padded, bool shared) -> Tensor",
)
def self_attention(query, key, value, position, processor, scale, padded, shared):
    """One sparse call: planning, attention and counting run as they do uncompiled.

    Args:
        query, key, value: [batch, seq, heads, head_dim].
        position: int64 [] on the CPU, of the attention module in its transformer. A tensor, since a number would
            compile each layer anew.
        processor: From :func:`register_processor`.
        scale: Factor of the logits; None = the default.
        padded: The native masks padding.
        shared: The tokens are a part of a sequence that is spread over processes.

    Returns:
        [batch, seq, heads, head_dim], contiguous.
    """
    return _processors[processor].attend_at(query, key, value, int(position), scale, padded, shared).contiguous()


@self_attention.register_fake
def _(query, key, value, position, processor, scale, padded, shared) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def intercepted() -> bool:
    """Whether a function mode may replace the attention function (as diffusers' perturbed attention guidance does)."""
    modes = torch.overrides._get_current_function_mode_stack()
    return any(not isinstance(mode, DeviceContext) for mode in modes)


def leave_graph() -> None:
    """Called by a hook that is being compiled: what it reads changes from step to step, and must not be frozen.

    Where graphs may not break, the compiler raises with this message.
    """
    if not _BREAKS_SAY_WHY:
        torch._dynamo.graph_break()
    else:
        torch._dynamo.graph_break(
            msg="PSA reads the denoising step before each call of the transformer, which cannot be part of a full "
            "graph. Use pipe.transformer.compile_repeated_blocks(fullgraph=True), or torch.compile without fullgraph."
        )
