"""The logit correction: the attention that pooling takes from keys that differ, given back.

The exponential is convex: n keys whose logits have mean m and variance s attract ``n exp(m + s / 2)`` together (exact
for normally distributed logits), their mean key only ``n exp(m)``. So half the variance is added to a pooled key's
logit, at most ``ln(n)``: beyond, the largest logit alone decides, and the formula would overrate the group.

With independent channels ``s = scale**2 * sum_d(q_d**2 * var_d(k))``. The squares ``q_d**2`` are taken as their means
over the head's queries: the lengths of a head's queries differ by a tenth to a quarter, and it makes the correction one
number a pooled key, which goes into its bias. A product of queries and variances would cost as much as another of
queries and keys, which the compute budget does not know.

Not part of the published method (arXiv 2512.04025).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of so many queries one is looked at. A prime, since rows and columns of videos have even lengths.
QUERY_STRIDE = 13


def query_power(query: Tensor, dtype: torch.dtype, lengths: Tensor | None = None) -> Tensor:
    """[batch, heads, head_dim] of ``dtype``: the mean square of each channel of query [batch, seq, heads, head_dim].

    ``lengths`` [batch]: from there on queries are padding, which is not looked at; None = all are real.
    """
    rows = query[:, ::QUERY_STRIDE].to(dtype)
    if lengths is None:
        return rows.square().mean(1)
    real = torch.arange(0, query.shape[1], QUERY_STRIDE, device=query.device) < lengths.to(query.device)[:, None]
    squares = torch.where(real[:, :, None, None], rows, 0.0).square().sum(1)
    return squares / real.sum(1).clamp(min=1)[:, None, None]


def query_lengths(query: Tensor, key: Tensor, key_lengths: Tensor | None) -> Tensor | None:
    """Where the padding of queries begins, [batch]: as that of keys of the same sequence; None = nowhere."""
    return key_lengths if query.shape[1] == key.shape[1] else None


def logit_correction(variance: Tensor, log_count: Tensor, scale: float) -> Tensor:
    """What is added to the logits of pooled keys, [rows].

    Args:
        variance: [rows]: sum over channels of the query power times the population variance of a group's keys.
        log_count: [rows]: ln of a group's tokens, -inf for none.
    """
    return (variance * (0.5 * scale**2)).minimum(log_count.clamp(min=0.0))
