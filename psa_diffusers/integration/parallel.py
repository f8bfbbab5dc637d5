"""Context parallel, by diffusers' ``enable_parallelism``: each process holds a part of the tokens.

Under Ulysses, processes exchange tokens for heads around the attention function: there each one sees the full sequence
with its share of the heads. It plans and computes these; only the price at which the budget is spent is agreed on by
all (:mod:`~psa_diffusers.planning.sharing`), so that the result is what one process would compute.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

try:
    from diffusers.models.attention_dispatch import _templated_context_parallel_attention as exchange
except ImportError:  # experimental in diffusers, and not there under this name: attention stays dense
    exchange = None


NO_CALIBRATION = (
    "calibrate=True does not run under context parallel, where no process sees all of a layer's heads. Calibrate on "
    "one GPU, save its settings (psa-tune does), and use these here."
)


class OtherTokensError(ValueError):
    """The full sequence has other tokens than the grid's. All processes find that out at the same place."""

    def __init__(self, tokens: int, expected: int) -> None:
        super().__init__(f"the sequence has {tokens} tokens, but the video's grid {expected}.")


def ulysses_of(parallel_config: Any) -> Any | None:
    """The context-parallel settings, where they are ones that attention can be sparse under; else None.

    Raises:
        ValueError: ring attention, under which a rank never holds all keys.
    """
    context = getattr(parallel_config, "context_parallel_config", None)
    if (getattr(context, "ring_degree", None) or 1) > 1:
        raise ValueError(
            f"PSA does not run under ring attention (ring_degree={context.ring_degree}): a rank never holds all keys. "
            "Use ulysses_degree instead, or disable_psa(pipe)."
        )
    return context if (getattr(context, "ulysses_degree", None) or 1) > 1 and exchange is not None else None


def heads_group(parallel_config: Any) -> Any | None:
    """The process group whose processes each hold some of a layer's heads; None = all heads are here."""
    context = ulysses_of(parallel_config)
    return None if context is None else context._ulysses_mesh.get_group()


def full_length(context: Any | None, local_length: int, expected: int) -> int:
    """Tokens of the full sequence, from those of this process. Where parts may differ only the exchange tells."""
    if context is None:
        return local_length
    return expected if _takes_any_size(context) else local_length * context.ulysses_degree


def check_sizes(context: Any | None, attention: list[nn.Module], tokens: int | None) -> None:
    """Say what diffusers would not: that heads or tokens cannot be split evenly.

    Args:
        context: From :func:`ulysses_of`.
        attention: The self-attention modules.
        tokens: Of the full sequence; None = not known.

    Raises:
        ValueError: naming both numbers.
    """
    if context is None:
        return
    degree, anything = context.ulysses_degree, _takes_any_size(context)
    heads = {module.heads for module in attention if isinstance(getattr(module, "heads", None), int)}
    for number in heads:
        # diffusers pads the heads of the last process, which must keep one at least.
        if number % degree and (not anything or -number % degree >= -(-number // degree)):
            raise ValueError(
                f"context parallel: {number} attention heads cannot be split over ulysses_degree={degree} processes. "
                f"Use {_divisors(number)} processes{'' if anything else _ANYTHING}."
            )
    if tokens is not None and tokens % degree and not anything:
        raise ValueError(
            f"context parallel: {tokens} tokens cannot be split evenly over ulysses_degree={degree} processes. Change "
            f"the number of frames or the resolution{_ANYTHING}."
        )


def attend_full_sequence(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor, parallel_config: Any
) -> Tensor:
    """Exchange tokens for heads, attend, and exchange back.

    Args:
        attend: (query, key, value) [batch, all tokens, heads of this process, head_dim] -> the same shape.
        query, key, value: [batch, tokens of this process, all heads, head_dim].

    Returns:
        [batch, tokens of this process, all heads, head_dim].
    """

    def forward_op(context: Any, query: Tensor, key: Tensor, value: Tensor, *options: Any, **named: Any) -> Tensor:
        return attend(query, key, value)

    return exchange(query, key, value, forward_op=forward_op, backward_op=None, _parallel_config=parallel_config)


_ANYTHING = ", or ContextParallelConfig(..., ulysses_anything=True) where diffusers has it"


def _takes_any_size(context: Any) -> bool:
    return bool(getattr(context, "ulysses_anything", False))


def _divisors(number: int) -> str:
    numbers = [str(i) for i in range(2, number + 1) if number % i == 0 and i <= 64]
    return ", ".join(numbers[:-1]) + " or " + numbers[-1] if len(numbers) > 1 else numbers[0]
