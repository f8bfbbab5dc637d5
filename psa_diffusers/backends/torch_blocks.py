"""The torch backend: blocked sparse attention from stock torch operators, made for CPUs, and right on any device.

A head's pyramid is packed in one table of keys and one of values. A block of queries then collects the rows that it
reads (index_select, runs of rows at a time) into buffers that fit in the cache, and two matrix products with a softmax
between them do the rest. On CPUs each thread works on a block of its own: the operators are too short to be split.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..planning.plan import Plan
from .products import linear
from .pyramids import HeadPyramid, Layout, build_head_pyramid
from .workers import run_groups

# Rows read are filled up to a multiple of this: kernels are made for each shape, so that few shapes keep them at hand.
ROW_STEP = 64


def attend_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    *,
    scale: float,
    logit_correction: str = "none",
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention over the levels that the plan names; what :func:`attend_reference` defines, fast on CPUs. No gradients.

    Computes in float32 (float64 for float64 inputs) and rounds once, at the end.

    Args:
        query: [batch, query_length, heads, head_dim], any floating dtype and strides.
        key, value: [batch, key_length, heads, head_dim].
        plan: What each block of queries reads.
        scale: Factor of the logits, usually ``head_dim ** -0.5``.
        logit_correction: ``"none"`` (the paper) or ``"variance"``.
        return_lse: Also return the logarithm of the softmax denominators.

    Returns:
        Output like ``query`` (contiguous), and lse [batch, heads, query_length] (natural logarithm; float64 for float64
        inputs, else float32) or None. A query with nothing to read gets output 0 and lse -inf.
    """
    call = _Call(query, key, value, plan, scale, logit_correction == "variance", return_lse)
    heads = [(sample, head) for sample in range(query.shape[0]) for head in range(query.shape[2])]
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        run_groups(heads, call.prepare, call.attend_block, parallel=query.device.type == "cpu")
    return call.out, call.lse


@dataclass(frozen=True)
class _Block:
    """One block of queries of one head, and what it reads."""

    sample: int
    head: int
    start: int  # position of its first query
    pyramid: HeadPyramid
    granules: Tensor  # int64 indices of granules
    centroids: Tensor  # int64 indices of centroids, filled up with the empty one
    bias: Tensor  # [rows read] ln(count)


class _Call:
    """The arguments of one call, and the steps from them to its output."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: Plan,
        scale: float,
        with_variance: bool,
        return_lse: bool,
    ) -> None:
        batch, length, heads, _ = query.shape
        self.query, self.key, self.value, self.plan = query, key, value, plan
        self.scale, self.with_variance = scale, with_variance
        self.precise = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.layout = Layout.of(plan)
        self.granules_of_level = self.layout.granules_of_level(query.device)
        self.order = None if plan.order is None else plan.order.to(query.device)
        self.real = plan.real_keys()
        self.out = torch.empty_like(query, memory_format=torch.contiguous_format)
        self.lse = query.new_empty(batch, heads, length, dtype=self.precise) if return_lse else None

    def prepare(self, place: tuple[int, int]) -> list[_Block]:
        """Pack a head and list what its blocks of queries read, the longest first."""
        sample, head = place
        key, value = self.key[sample, :, head], self.value[sample, :, head]
        if self.order is not None:
            key, value = key.index_select(0, self.order), value.index_select(0, self.order)
        real = None if self.real is None else self.real[sample]
        pyramid = build_head_pyramid(key, value, real, self.layout, self.precise, with_variance=self.with_variance)
        reads = _list_reads(self.plan.level_mask[sample, head], pyramid, self.layout, self.granules_of_level)
        blocks = [
            _Block(sample, head, number * self.plan.query_block_size, pyramid, *lists)
            for number, lists in enumerate(reads)
        ]
        return sorted(blocks, key=lambda block: -len(block.bias))

    def attend_block(self, block: _Block) -> None:
        """Compute one block of queries and write it where it belongs."""
        stop = min(block.start + self.plan.query_block_size, self.plan.query_length)
        queries, out = self.query[block.sample, :, block.head], self.out[block.sample, :, block.head]
        if self.order is None:
            tokens = None
            queries = queries[block.start : stop]
        else:
            tokens = self.order[block.start : stop]
            queries = queries.index_select(0, tokens)
        result, lse = self._attend(queries.to(self.precise) * self.scale, block)
        if tokens is None:
            out[block.start : stop] = result
        else:
            out.index_copy_(0, tokens, result.to(out.dtype))
        if self.lse is not None:
            self.lse[block.sample, block.head, slice(block.start, stop) if tokens is None else tokens] = lse

    def _attend(self, queries: Tensor, block: _Block) -> tuple[Tensor, Tensor | None]:
        if len(block.bias) == 0:
            return torch.zeros_like(queries), queries.new_full((len(queries),), -torch.inf)
        key, value, *variance = _collect(block, self.layout.granule)
        logits = linear(queries, key, block.bias)
        if variance:
            half_variance = linear(queries**2, variance[0]) * 0.5
            logits += torch.minimum(half_variance, block.bias)
        lse = None if self.lse is None else logits.logsumexp(-1)
        weights = torch.softmax(logits, -1, out=logits)
        return linear(weights, value.t()), lse


def _collect(block: _Block, granule: int) -> list[Tensor]:
    """The rows that a block reads from each table, [rows read, head_dim]: its granules, then its centroids."""
    found = []
    split = len(block.granules) * granule
    for table, centroids in zip(block.pyramid.tables, block.pyramid.centroids, strict=True):
        rows = table.new_empty(len(block.bias), table.shape[1])
        runs = table.view(-1, granule * table.shape[1])
        torch.index_select(runs, 0, block.granules, out=rows[:split].view(-1, runs.shape[1]))
        torch.index_select(centroids, 0, block.centroids, out=rows[split:])
        found.append(rows)
    return found


def _list_reads(
    levels: Tensor, pyramid: HeadPyramid, layout: Layout, granules_of_level: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(granules, centroids, bias) for each block of queries, from levels, int8 [query_blocks, kv_blocks]."""
    granule_count = pyramid.count.view(layout.blocks, -1, layout.granule)
    chosen = (granules_of_level[levels.int()] & (granule_count > 0).any(2)).flatten(1)
    granules, granules_each = chosen.nonzero()[:, 1], chosen.sum(1)
    is_centroid = (levels == layout.levels + 1) & (pyramid.centroid_count[:-1] > 0)
    row, centroid = is_centroid.nonzero().unbind(1)
    centroids_each = is_centroid.sum(1)
    fine_rows = granules_each * layout.granule
    slots_each = (fine_rows + centroids_each + ROW_STEP - 1) // ROW_STEP * ROW_STEP - fine_rows
    # Each block has its centroids in its first slots; the empty centroid fills the others.
    shift = (slots_each.cumsum(0) - slots_each) - (centroids_each.cumsum(0) - centroids_each)
    centroids = torch.full((int(slots_each.sum()),), layout.blocks, device=levels.device)
    centroids[torch.arange(len(centroid), device=levels.device) + shift[row]] = centroid
    granule_bias, centroid_bias = granule_count.log().flatten(0, 1)[granules], pyramid.centroid_count.log()[centroids]
    granules_each, slots_each = granules_each.tolist(), slots_each.tolist()
    fine, coarse = granule_bias.split(granules_each), centroid_bias.split(slots_each)
    biases = [torch.cat((first.flatten(), last)) for first, last in zip(fine, coarse, strict=True)]
    return list(zip(granules.split(granules_each), centroids.split(slots_each), biases, strict=True))
