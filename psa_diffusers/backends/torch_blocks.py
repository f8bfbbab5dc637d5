"""The torch backend: blocked sparse attention from stock torch operators, made for CPUs, and right on any device.

A head's pyramid is packed in one table of keys and one of values. A block of queries then collects the rows that it
reads (index_select) into tensors that fit in the cache, and two matrix products with a softmax between do the rest.
On CPUs each thread works on a block of its own, by few operators: they are too short to be split among threads, and
between them Python lets only one thread run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..planning.plan import Plan
from .covariance import counted_blocks
from .products import linear
from .pyramids import HeadPyramid, Layout, build_head_pyramid
from .workers import run_groups, thread_count

MOST_LOGITS = 2**19


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
    times the memory of K and V (4 levels, kv blocks of 64), for a third of the heads at a time.

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
    call = _Call(query, key, value, plan, scale, value_correction == "covariance", return_lse)
    heads = [(sample, head) for sample in range(query.shape[0]) for head in range(query.shape[2])]
    workers = thread_count(query.device)
    # One head is worked on while the next is prepared, where that does not take too much memory beside K and V.
    slots = min(len(heads), workers, max(1, len(heads) // 3))
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        memory = [call.empty_tables(3 if logit_correction == "variance" else 2) for _ in range(slots)]
        run_groups(heads, memory, call.prepare, _attend_block, workers)
    return call.out, call.lse


@dataclass(frozen=True)
class _Block:
    """One block of queries of one head: what it reads, and where its output goes."""

    query: Tensor  # [query_length, head_dim], of the head
    rows: Tensor  # int32 [rows read] of the pyramid's table
    pyramid: HeadPyramid
    positions: Tensor  # int64 [queries]: the tokens of these queries
    out: Tensor  # [query_length, head_dim], of the head
    lse: Tensor | None  # [query_length], of the head


class _Call:
    """The arguments of one call, and the first step from them to its output."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: Plan,
        scale: float,
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
        tokens = torch.arange(length, device=query.device) if self.order is None else self.order
        self.positions = tokens.split(plan.query_block_size)
        self.out = torch.empty_like(query, memory_format=torch.contiguous_format)
        self.lse = query.new_empty(batch, heads, length, dtype=self.precise) if return_lse else None

    def empty_tables(self, count: int) -> tuple[Tensor, ...]:
        """Memory for the pyramid of a head; used for one head after the other."""
        shape = self.layout.empty_row + 1, self.query.shape[3]
        return tuple(self.query.new_empty(shape, dtype=self.precise) for _ in range(count))

    def prepare(self, place: tuple[int, int], tables: tuple[Tensor, ...]) -> list[_Block]:
        """Pack a head and list what its blocks of queries read, the longest first."""
        sample, head = place
        real = None if self.real is None else self.real[sample]
        key, value = self.key[sample, :, head], self.value[sample, :, head]
        counted = None if self.counted is None else self.counted[sample, head]
        pyramid = build_head_pyramid(
            key, value, self.layout, tables, self.scale, order=self.order, real=real, counted=counted
        )
        if pyramid.row_shares is not None and self.plan.value_gain is not None:
            gain = self.plan.value_gain[sample, head].to(pyramid.row_shares)
            pyramid = replace(pyramid, row_shares=pyramid.row_shares * gain)
        reads = _list_reads(self.plan.level_mask[sample, head], pyramid, self.layout)
        query, out = self.query[sample, :, head], self.out[sample, :, head]
        lse = None if self.lse is None else self.lse[sample, head]
        blocks = [
            _Block(query, rows, pyramid, positions, out, lse)
            for rows, positions in zip(reads, self.positions, strict=True)
        ]
        return sorted(blocks, key=lambda block: -len(block.rows))


def _attend_block(block: _Block) -> None:
    """Compute one block of queries and write it where it belongs."""
    # Long reads take fewer queries at a time: they gather more than once, but logits stay in the cache.
    step = max(16, MOST_LOGITS // max(1, len(block.rows)))
    for positions in block.positions.split(step):
        queries = block.query.index_select(0, positions)
        out, lse = _attend(queries, block.rows, block.pyramid, block.lse is not None)
        block.out.index_copy_(0, positions, out.to(block.out.dtype))
        if lse is not None:
            block.lse.index_copy_(0, positions, lse)


def _attend(queries: Tensor, rows: Tensor, pyramid: HeadPyramid, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Output [queries, head_dim] and lse [queries], in the pyramid's dtype, over rows of the pyramid."""
    key, value, *variance = pyramid.tables
    queries = queries.to(key.dtype)
    if len(rows) == 0:
        return torch.zeros_like(queries), queries.new_full((len(queries),), -torch.inf) if with_lse else None
    bias = pyramid.log_count.index_select(0, rows)
    logits = linear(queries, key.index_select(0, rows), bias)
    if variance:
        half_variance = linear(queries**2, variance[0].index_select(0, rows)) * 0.5
        logits += torch.minimum(half_variance, bias)
    lse = logits.logsumexp(-1) if with_lse else None
    weights = torch.softmax(logits, -1, out=logits)
    out = linear(weights, value.index_select(0, rows).t())
    if pyramid.covariance is not None:
        mass = weights @ pyramid.row_shares.index_select(0, rows)
        out += linear(queries, pyramid.covariance).mul_(mass[:, None])
    return out, lse


def _list_reads(levels: Tensor, pyramid: HeadPyramid, layout: Layout) -> tuple[Tensor, ...]:
    """The rows that each block of queries reads, from levels, int8 [query_blocks, kv_blocks]."""
    device = levels.device
    if pyramid.block_has_real is not None:
        levels = levels * pyramid.block_has_real
    sizes, starts = (torch.tensor([0, *items], device=device) for items in (layout.sizes, layout.starts[:-1]))
    levels = levels.long()
    lengths = sizes[levels]
    totals = lengths.sum(1)
    # A last, empty block fills each list up with the empty row.
    filled = _filled_up(totals)
    lengths = torch.cat([lengths, (filled - totals)[:, None]], 1).flatten()
    first = starts[levels] + sizes[levels] * torch.arange(layout.blocks, device=device)
    first = torch.nn.functional.pad(first, (0, 1), value=layout.empty_row).flatten()
    before = lengths.cumsum(0) - lengths
    count = int(filled.sum())
    rows = torch.repeat_interleave((first - before).int(), lengths, output_size=count)
    rows += torch.arange(count, device=device, dtype=torch.int32)
    return rows.clamp_(max=layout.empty_row).split(filled.tolist())


def _filled_up(rows: Tensor) -> Tensor:
    """Numbers of rows, rounded up by less than 1/32 (or to 16), so that there are few of them.

    oneDNN makes a kernel for every shape, which takes longer than to run it, and keeps the last thousand.
    """
    step = 2 ** (rows.clamp(min=1).double().log2().floor() - 5).clamp(min=4).to(rows.dtype)
    return (rows + step - 1) // step * step
