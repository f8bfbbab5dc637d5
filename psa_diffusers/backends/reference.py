"""The definition of Pyramid Sparse Attention in plain torch, for any dtype: slow and obvious. It judges the others."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..planning.plan import Plan
from .covariance import Covariance, counted_blocks, covariance_of_levels
from .logit_variance import logit_correction as correction_of_rows
from .logit_variance import query_lengths, query_power


class PyramidRows(NamedTuple):
    """All levels of one head's keys and values, one pooled group a row: level 1 first, the centroids last."""

    key: Tensor  # [rows, head_dim] mean of the group's real tokens
    value: Tensor  # [rows, head_dim]
    variance: Tensor  # [rows, head_dim] of the keys in the group, a channel at a time
    count: Tensor  # [rows] real tokens in the group
    block: Tensor  # [rows] kv block that the group is part of
    level: Tensor  # [rows] 1 .. num_levels, num_levels + 1 for centroids


def attend_reference(
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
    """Attention over the levels that the plan names (arXiv 2512.04025, equations 2 to 5). Differentiable.

    A pooled key is the mean of its group's real tokens (neither padding nor beyond the end), and counts for that many:
    its logit is ``scale * q . mean(k) + ln(count)``. With ``logit_correction="variance"`` a group of several tokens
    also gets ``min(scale**2 / 2 * sum_d(power_d * var_d(k)), ln(count))``
    (:mod:`~psa_diffusers.backends.logit_variance`): ``var_d`` is the population variance of channel d over the group's
    real tokens, ``power_d`` the mean of ``q_d**2`` over the head's queries number 0, 13, 26, ... of the sequence. With
    as many queries as keys the padding is that of both, and left out here too.

    With ``value_correction="covariance"`` the covariance of values with keys, one matrix C a head, is given back to
    pooled groups, as :mod:`~psa_diffusers.backends.covariance` says. C is that of whole kv blocks, level
    ``num_levels + 1``: the mean of ``(v - mean of its block) (k - mean of its block)^T`` over the real tokens of the
    blocks that all queries of the head read. C_h, the same of the groups of level h, loses the share
    ``<C_h, C> / <C, C>``, clamped to [0, 1]; level 1 loses nothing. Where the plan has a ``value_gain``, what a head is
    given back is that many times as much.

    Args:
        query: [batch, query_length, heads, head_dim], any floating dtype and strides.
        key, value: [batch, key_length, heads, head_dim].
        plan: What each block of queries reads. Read with its order and its key_lengths.
        scale: Factor of the logits, usually ``head_dim ** -0.5``.
        logit_correction: ``"none"`` (the paper) or ``"variance"``.
        value_correction: ``"none"`` (the paper) or ``"covariance"``.
        return_lse: Also return the logarithm of the softmax denominators.

    Returns:
        Output like ``query``, and lse [batch, heads, query_length] (natural logarithm; float64 for float64 inputs, else
        float32) or None. A query with nothing to read gets output 0 and lse -inf. What the plan does not read is never
        touched: NaN or Inf there does not reach the output.
    """
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    real = plan.real_keys()
    tokens = slice(None) if plan.order is None else plan.order.to(query.device)
    counted = counted_blocks(plan) if value_correction == "covariance" else None
    power = query_power(query, precise, query_lengths(query, key, plan.key_lengths))
    outputs, sums = [], []
    for sample in range(query.shape[0]):
        for head in range(query.shape[2]):
            head_key, head_value = key[sample, tokens, head], value[sample, tokens, head]
            is_real = head_key.new_ones(len(head_key), dtype=torch.bool) if real is None else real[sample]
            rows = pyramid_rows(head_key, head_value, is_real, plan.kv_block_size, plan.num_levels, precise)
            bias = rows.count.log()
            if logit_correction == "variance":
                bias = bias + correction_of_rows(rows.variance @ power[sample, head], bias, scale)
            covariance = None
            if counted is not None:
                inside = counted[sample, head].repeat_interleave(plan.kv_block_size)[: len(head_key)] & is_real
                covariance = head_covariance(
                    head_key.to(precise), head_value.to(precise), inside, plan.kv_block_size, plan.num_levels
                )
                if plan.value_gain is not None:
                    covariance = covariance._replace(shares=covariance.shares * plan.value_gain[sample, head])
            blocks = query[sample, tokens, head].split(plan.query_block_size)
            for block, levels in zip(blocks, plan.level_mask[sample, head], strict=True):
                read = (levels[rows.block] == rows.level) & (rows.count > 0)
                read_rows = PyramidRows(*(item[read] for item in rows))
                output, lse = _attend_block(block, read_rows, bias[read], scale, covariance)
                outputs.append(output)
                sums.append(lse)
    batch, length, heads, head_dim = query.shape
    out = torch.cat(outputs).view(batch, heads, length, head_dim).transpose(1, 2)
    lse = torch.cat(sums).view(batch, heads, length)
    if plan.order is not None:
        position = torch.argsort(tokens)
        out, lse = out[:, position], lse[:, :, position]
    return out.contiguous(), lse if return_lse else None


def pyramid_rows(
    key: Tensor, value: Tensor, real: Tensor, kv_block_size: int, num_levels: int, precise: torch.dtype
) -> PyramidRows:
    """Every level of one head, from key and value [key_length, head_dim] in block order and real, bool [key_length]."""
    levels = []
    for level in range(1, num_levels + 2):
        size = kv_block_size if level > num_levels else 2 ** (level - 1)
        count = _groups(real.to(precise), size).sum(1)
        mean_key, variance = _mean_and_variance(key.to(precise), real, count, size)
        mean_value, _ = _mean_and_variance(value.to(precise), real, count, size)
        block = torch.arange(len(count), device=key.device) * size // kv_block_size
        level_of_row = torch.full_like(block, level)
        levels.append((mean_key.to(key.dtype), mean_value.to(value.dtype), variance, count, block, level_of_row))
    return PyramidRows(*(torch.cat(items) for items in zip(*levels, strict=True)))


def _groups(tokens: Tensor, size: int) -> Tensor:
    """[groups, size, ...]: consecutive runs of tokens, the last one filled up with zeros."""
    missing = -len(tokens) % size
    if missing:
        tokens = torch.cat([tokens, tokens.new_zeros(missing, *tokens.shape[1:])])
    return tokens.unflatten(0, (-1, size))


def _mean_and_variance(tokens: Tensor, real: Tensor, count: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean and population variance over the real tokens of each group, [groups, head_dim] both; 0 without any."""
    mean, deviation = _deviations(tokens, real, count, size)
    return mean, _groups(deviation**2, size).sum(1) / count.clamp(min=1)[:, None]


def _deviations(tokens: Tensor, real: Tensor, count: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean over the real tokens of each group [groups, head_dim], and how far each token is from it, 0 if not real."""
    real = real[:, None]
    mean = _groups(torch.where(real, tokens, 0), size).sum(1) / count.clamp(min=1)[:, None]
    return mean, torch.where(real, tokens - mean.repeat_interleave(size, 0)[: len(tokens)], 0)


def head_covariance(key: Tensor, value: Tensor, counted: Tensor, kv_block_size: int, num_levels: int) -> Covariance:
    """C and shares of key and value [key_length, head_dim] in block order; counted is bool [key_length]."""
    levels = []
    for size in [2**level for level in range(1, num_levels)] + [kv_block_size]:
        count = _groups(counted.to(key.dtype), size).sum(1)
        key_gap, value_gap = (_deviations(tokens, counted, count, size)[1] for tokens in (key, value))
        levels.append(value_gap.mT @ key_gap / counted.sum().clamp(min=1))
    return covariance_of_levels(torch.stack(levels))


def _attend_block(
    query: Tensor, rows: PyramidRows, bias: Tensor, scale: float, covariance: Covariance | None
) -> tuple[Tensor, Tensor]:
    """Output [queries, head_dim] and lse [queries] of one block of queries over the rows that it reads."""
    precise = bias.dtype
    if len(rows.key) == 0:
        return torch.zeros_like(query), query.new_full((len(query),), -math.inf, dtype=precise)
    logits = (query @ rows.key.mT).to(precise) * scale + bias
    lse = logits.logsumexp(-1)
    weights = (logits - lse[:, None]).exp()
    output = weights.to(rows.value.dtype) @ rows.value
    if covariance is not None:
        mass = weights @ covariance.shares[rows.level]
        correction = (query.to(precise) @ covariance.matrix.mT) * (scale * mass[:, None])
        output = (output.to(precise) + correction).to(output.dtype)
    return output, lse
