"""The torch backend: blocked sparse attention from stock torch operators, made for CPUs, and right on any device.

A head's pyramid is packed in one table of keys and one of values. A block of queries then collects the rows that it
reads (index_select) into tensors that fit in the cache, and two matrix products with a softmax between do the rest.
On CPUs each thread works on a block of its own, by few operators: they are too short to be split among threads, and
between them Python lets only one thread run.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..planning.plan import Plan
from ..products import linear
from .covariance import counted_blocks
from .logit_variance import query_lengths, query_power
from .pyramids import HeadPyramid, Layout, build_head_pyramid, take
from .reads import Reads, list_reads
from .workers import run_groups, thread_count

# Logits in memory at once: of all threads together, but for what a thread always may, since parts gather all anew.
MOST_LOGITS = 2**21
MOST_LOGITS_OF_ONE = 2**19


def attend_torch(
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
    """Attention over the levels that the plan names; what :func:`attend_reference` defines, fast on CPUs. No gradients.

    Computes in float32 (float64 for float64 inputs) and rounds once, at the end. Beyond inputs and output it takes 1.89
    times the memory of K and V and once that of Q (4 levels, kv blocks of 64), for half of the heads at a time.

    Args:
        query: [batch, query_length, heads, head_dim], any floating dtype and strides.
        key, value: [batch, key_length, heads, head_dim].
        plan: What each block of queries reads.
        scale: Factor of the logits, usually ``head_dim ** -0.5``.
        logit_correction: ``"none"`` (the paper) or ``"variance"``.
        value_correction: ``"none"`` (the paper) or ``"covariance"``.
        return_lse: Also return the logarithm of the softmax denominators.

    Returns:
        Output like ``query`` (contiguous), and lse [batch, heads, query_length] (natural logarithm; float64 for float64
        inputs, else float32) or None. A query with nothing to read gets output 0 and lse -inf.
    """
    corrections = (logit_correction == "variance", value_correction == "covariance")
    call = _Call(query, key, value, plan, scale, *corrections, return_lse)
    heads = [(sample, head) for sample in range(query.shape[0]) for head in range(query.shape[2])]
    workers = thread_count(query.device)
    # One head is worked on while the next is prepared, where that does not take too much memory beside K and V.
    slots = min(len(heads), workers, max(1, len(heads) // 2))
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        memory = [call.empty_memory() for _ in range(slots)]
        attend = partial(_attend_blocks, most_logits=max(MOST_LOGITS_OF_ONE, MOST_LOGITS // workers))
        run_groups(heads, memory, call.prepare, attend, call.finish, workers)
    return call.out, call.lse


class _Memory:
    """What a head is worked on in; used for one head after the other."""

    def __init__(self, tables: tuple[Tensor, Tensor], rows: Tensor, lse: Tensor | None) -> None:
        self.tables = tables  # of the pyramid
        self.rows = rows  # [query_length, head_dim]: queries, and then their output
        self.lse = lse  # [query_length]
        self.places: Tensor | None = None  # int64 [query_length]: where in the rows each token is


class _Blocks(NamedTuple):
    """Some blocks of queries of one head: what they read, and where their output goes."""

    rows: Tensor  # [queries, head_dim] of the head's memory
    lse: Tensor | None  # [queries]
    reads: Reads
    pyramid: HeadPyramid


class _Call:
    """The arguments of one call, and the first and the last step from them to its output."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: Plan,
        scale: float,
        with_variance: bool,
        with_covariance: bool,
        return_lse: bool,
    ) -> None:
        batch, length, heads, _ = query.shape
        self.query, self.key, self.value, self.plan = query, key, value, plan
        self.scale, self.layout = scale, Layout.of(plan)
        self.precise = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.order = None if plan.order is None else plan.order.to(query.device)
        self.real = plan.real_keys()
        self.counted = counted_blocks(plan) if with_covariance else None
        lengths = query_lengths(query, key, plan.key_lengths)
        self.power = query_power(query, self.precise, lengths) if with_variance else None
        self.out = torch.empty_like(query, memory_format=torch.contiguous_format)
        self.lse = query.new_empty(batch, heads, length, dtype=self.precise) if return_lse else None

    def empty_memory(self) -> _Memory:
        """Memory for a head."""
        length, head_dim = self.query.shape[1], self.query.shape[3]
        shapes = [(self.layout.empty_row + 1, head_dim)] * 2 + [(length, head_dim)]
        *tables, rows = (self.query.new_empty(shape, dtype=self.precise) for shape in shapes)
        return _Memory(tuple(tables), rows, None if self.lse is None else self.lse.new_empty(length))

    def prepare(self, place: tuple[int, int], memory: _Memory) -> list[_Blocks]:
        """Pack a head and list what its blocks of queries read, the longest first."""
        sample, head = place
        real = None if self.real is None else self.real[sample]
        key, value = self.key[sample, :, head], self.value[sample, :, head]
        counted, power = (None if part is None else part[sample, head] for part in (self.counted, self.power))
        options = {"order": self.order, "real": real, "counted": counted, "power": power}
        pyramid = build_head_pyramid(key, value, self.layout, memory.tables, self.scale, **options)
        if pyramid.row_shares is not None and self.plan.value_gain is not None:
            gain = self.plan.value_gain[sample, head].to(pyramid.row_shares)
            pyramid = replace(pyramid, row_shares=pyramid.row_shares * gain)
        size, length = self.plan.query_block_size, self.query.shape[1]
        order, reads = list_reads(self.plan.level_mask[sample, head], pyramid, self.layout, size, length)
        tokens = self._tokens_of(order)
        memory.places = _inverse(tokens)
        take(self.query[sample, :, head], tokens, out=memory.rows)
        queries = [part.queries for part in reads]
        rows = memory.rows.split(queries)
        lse = [None] * len(reads) if memory.lse is None else memory.lse.split(queries)
        return [_Blocks(*parts, pyramid) for parts in zip(rows, lse, reads, strict=True)]

    def _tokens_of(self, blocks: Tensor) -> Tensor:
        """int64 [query_length]: the tokens of these blocks of queries, one block after the other."""
        size, length = self.plan.query_block_size, self.query.shape[1]
        positions = (blocks[:, None] * size + torch.arange(size, device=blocks.device)).flatten()
        positions = positions if length % size == 0 else positions[positions < length]
        return positions if self.order is None else self.order[positions]

    def finish(self, place: tuple[int, int], memory: _Memory) -> None:
        """Put a head's output where it belongs."""
        sample, head = place
        take(memory.rows, memory.places, out=self.out[sample, :, head])
        if memory.lse is not None:
            take(memory.lse, memory.places, out=self.lse[sample, head])


def _inverse(tokens: Tensor) -> Tensor:
    """int64 [query_length]: where each token is among the tokens. To gather by it is faster than to scatter."""
    return torch.empty_like(tokens).scatter_(0, tokens, torch.arange(len(tokens), device=tokens.device))


def _attend_blocks(blocks: _Blocks, most_logits: int) -> None:
    """Compute some blocks of queries, and write their output over them."""
    if len(blocks.reads.rows) == 0:
        blocks.rows.zero_()
        if blocks.lse is not None:
            blocks.lse.fill_(-torch.inf)
        return
    if blocks.reads.blocks > 1:
        _attend_together(blocks)
        return
    # Long reads take fewer queries at a time: they gather more than once, but logits stay in the cache.
    parts = max(1, -(-len(blocks.rows) * len(blocks.reads.rows) // most_logits))
    size = max(16, -(-len(blocks.rows) // parts))
    lse = itertools.repeat(None) if blocks.lse is None else blocks.lse.split(size)
    for rows, part_lse in zip(blocks.rows.split(size), lse, strict=False):
        _attend(rows, part_lse, blocks.reads.rows, blocks.pyramid)


def _attend(queries: Tensor, lse: Tensor | None, reads: Tensor, pyramid: HeadPyramid) -> None:
    """Write over queries [n, head_dim] their output, and over lse [n] theirs, from these rows of the pyramid."""
    key, value = pyramid.tables
    logits = linear(queries, key.index_select(0, reads), pyramid.bias.index_select(0, reads))
    if lse is not None:
        torch.logsumexp(logits, -1, out=lse)
    weights = torch.softmax(logits, -1, out=logits)
    out = linear(weights, value.index_select(0, reads).t())
    if pyramid.covariance is None:
        queries.copy_(out)
    else:
        mass = weights @ pyramid.row_shares.index_select(0, reads)
        torch.addcmul(out, queries @ pyramid.covariance.t(), mass[:, None], out=queries)


def _attend_together(blocks: _Blocks) -> None:
    """:func:`_attend` for blocks of as many queries that read as many rows: n blocks of q queries, r rows each."""
    (count, _, reads), pyramid = blocks.reads, blocks.pyramid
    key, value = (table.index_select(0, reads).view(count, -1, table.shape[1]) for table in pyramid.tables)
    queries = blocks.rows.view(count, -1, blocks.rows.shape[1])
    bias = pyramid.bias.index_select(0, reads).view(count, 1, -1)
    logits = torch.bmm(queries, key.mT).add_(bias)
    if blocks.lse is not None:
        torch.logsumexp(logits, -1, out=blocks.lse.view(count, -1))
    weights = torch.softmax(logits, -1, out=logits)
    out = torch.bmm(weights, value)
    if pyramid.covariance is None:
        queries.copy_(out)
    else:
        mass = torch.bmm(weights, pyramid.row_shares.index_select(0, reads).view(count, -1, 1))
        torch.addcmul(out, queries @ pyramid.covariance.t(), mass, out=queries)
