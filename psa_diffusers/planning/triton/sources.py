"""Where a plan's masses come from: one kind of source for each kind of importance.

Every kind puts queries that stand for their blocks before keys that stand for theirs, and writes how much attention the
blocks get (:class:`~.mass_buffers.Masses`). What is made of it, levels or errors, is alike for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...config import PSAConfig
from ...gpu.kernel_launch import KernelLaunch
from ...gpu.sizes import ceil_div
from ..importance import STRIDE
from .key_samples import KeySamples, empty_key_samples, key_samples_launch
from .mass_buffers import Masses, MassesLayout, empty_masses, heads_at_a_time, masses_layout
from .masses import masses_launch
from .means import empty_means, means_launch
from .samples import sampled_draws, sampled_positions
from .strided_masses import Groups, StridedMasses, strided_layout

MASSES_BYTES = 2**25  # of masses are made at a time, or a quarter of the keys' memory if that is more


class MassSource(Protocol):
    """What makes masses.

    Attributes:
        query: tensor [batch, any, heads, any] of the masses' batch, heads, device and precision.
        positions: int32 [query_blocks, samples], where the queries stand that stand for a block; -1 for none.
        counts: int32 [batch, kv_blocks], real keys; may be None where no block lacks all.
        is_max: a mass is that of a block's largest sample, and the largest of a query block's counts.
    """

    query: Tensor
    positions: Tensor
    counts: Tensor | None
    layout: MassesLayout
    is_max: bool

    def launch(self, masses: Masses, heads: range) -> KernelLaunch:
        """The launch that fills ``masses`` for some heads."""


@dataclass(frozen=True)
class SampledMasses:
    """Of samples that lie as :class:`~.key_samples.KeySamples` do. See :func:`~.masses.masses_launch`."""

    query: Tensor
    positions: Tensor
    order: Tensor | None
    keys: KeySamples
    layout: MassesLayout
    scale: float
    full_blocks: int
    is_max: bool
    target: str

    @property
    def counts(self) -> Tensor:
        return self.keys.counts

    def launch(self, masses: Masses, heads: range) -> KernelLaunch:
        inputs = (self.query, self.positions, self.order, self.keys, masses, self.layout, heads)
        known = {"full_blocks": self.full_blocks, "is_max": self.is_max, "target": self.target}
        return masses_launch(*inputs, scale=self.scale, **known)


def sampled_source(
    query: Tensor,
    positions: Tensor,
    order: Tensor | None,
    keys: KeySamples,
    *,
    scale: float,
    full_blocks: int,
    is_max: bool,
    target: str,
) -> SampledMasses:
    """Sampled queries before sampled keys (``importance="sampled"``).

    Args:
        query: [batch, seq, heads, head_dim], any strides; positions: in its block order.
        full_blocks: so many kv blocks, from the first, have no key missing in any sample of the batch.
    """
    layout = masses_layout(query, *positions.shape, keys, scale=scale, target=target)
    return SampledMasses(query, positions, order, keys, layout, scale, full_blocks, is_max, target)


class Prepared(NamedTuple):
    """A source, the launches that it needs first, and the tables of theirs that are kept."""

    source: MassSource
    launches: list[KernelLaunch]
    constants: list[Tensor]


def prepare_source(
    query: Tensor,
    key: Tensor,
    config: PSAConfig,
    order: Tensor | None,
    key_lengths: Tensor | None,
    *,
    scale: float,
    full_blocks: int,
    target: str,
    keys: KeySamples | None = None,
) -> Prepared:
    """The source of the config's importance.

    Args:
        query, key: [batch, seq, heads, head_dim], any strides.
        full_blocks: so many kv blocks, from the first, have no key missing in any sample of the batch.
        keys: the sampled keys, where other launches take them anyway.
    """
    known = {"scale": scale, "full_blocks": full_blocks, "target": target}
    if config.importance == "pooled":
        return _pooled(query, key, config, order, key_lengths, **known)
    if config.importance == "antidiagonal":
        return _antidiagonal(query, key, config, order, key_lengths, keys, scale, target)
    (positions, _), launches, constants = sampled_positions(query, config), [], []
    if keys is None:
        keys, draws = empty_key_samples(key, config.kv_block_size, config.sampled_keys), sampled_draws(key, config)
        where = {"order": order, "key_lengths": key_lengths, "kv_block_size": config.kv_block_size}
        launches.append(key_samples_launch(key, keys, draws, **where))
        constants.append(draws)
    source = sampled_source(query, positions, order, keys, is_max=config.importance_reduction == "max", **known)
    return Prepared(source, launches, [positions, *constants])


def _pooled(
    query: Tensor,
    key: Tensor,
    config: PSAConfig,
    order: Tensor | None,
    key_lengths: Tensor | None,
    *,
    scale: float,
    full_blocks: int,
    target: str,
) -> Prepared:
    """Mean queries before mean keys, as if each were the one sample of its block. In float32: it is little work."""
    sizes = config.query_block_size, config.kv_block_size
    queries = empty_means(query, sizes[0], dtype=torch.float32, heads_first=False)
    keys = empty_means(key, sizes[1], dtype=torch.float32, heads_first=True)
    launches = [
        means_launch(query, queries, sizes[0], order=order, lengths=None),
        means_launch(key, keys, sizes[1], order=order, lengths=key_lengths),
    ]
    samples = KeySamples(keys.counts, keys.rows.transpose(1, 2)[:, :, None], keys.bias[:, None])
    positions = _each(queries.rows.shape[1], query.device)
    known = {"scale": scale, "full_blocks": full_blocks, "is_max": False, "target": target}
    return Prepared(sampled_source(queries.rows, positions, None, samples, **known), launches, [positions])


@lru_cache(maxsize=64)
def _each(count: int, device: torch.device) -> Tensor:
    """int32 [count, 1]: a sample a block."""
    return torch.arange(count, dtype=torch.int32)[:, None].to(device)


def _antidiagonal(
    query: Tensor,
    key: Tensor,
    config: PSAConfig,
    order: Tensor | None,
    key_lengths: Tensor | None,
    keys: KeySamples | None,
    scale: float,
    target: str,
) -> Prepared:
    """Groups of queries before groups of keys. Means of those that lack tokens are made first, where there are any."""
    sizes = config.query_block_size, config.kv_block_size
    stride = min(STRIDE, *sizes)
    per_block = sizes[0] // stride, sizes[1] // stride
    launches, constants, groups = [], [], []
    for tokens, lengths in ((query, None), (key, key_lengths)):
        means = None
        if lengths is not None or tokens.shape[1] % stride:
            means = empty_means(tokens, stride, dtype=tokens.dtype, heads_first=True)
            launches.append(means_launch(tokens, means, stride, order=order, lengths=lengths))
        groups.append(Groups(tokens, means))
    if keys is None and key_lengths is not None:  # for the blocks' counts of real keys
        keys, draws = empty_key_samples(key, sizes[1], 1), sampled_draws(key, config)
        where = {"order": order, "key_lengths": key_lengths, "kv_block_size": sizes[1]}
        launches.append(key_samples_launch(key, keys, draws, **where))
        constants.append(draws)
    blocks = ceil_div(query.shape[1], sizes[0]), ceil_div(key.shape[1], sizes[1])
    positions = _groups_of_blocks(ceil_div(query.shape[1], stride), blocks[0], per_block[0], query.device)
    source = StridedMasses(
        query=query,
        queries=groups[0],
        keys=groups[1],
        positions=positions,
        counts=None if keys is None else keys.counts,
        order=order,
        key_lengths=key_lengths,
        layout=strided_layout(query, *blocks, per_block, target),
        stride=stride,
        kv_block_size=sizes[1],
        scale=scale,
        is_max=config.importance_reduction == "max",
        target=target,
    )
    return Prepared(source, launches, [positions, *constants])


@lru_cache(maxsize=64)
def _groups_of_blocks(groups: int, blocks: int, per_block: int, device: torch.device) -> Tensor:
    """int32 [blocks, per_block]: the groups of each block, -1 for none."""
    numbers = torch.arange(blocks * per_block, dtype=torch.int32)
    return torch.where(numbers < groups, numbers, -1).view(blocks, per_block).to(device)


def massed_heads(source: MassSource, key: Tensor, config: PSAConfig) -> Iterator[tuple[Masses, range, KernelLaunch]]:
    """Some heads after others: masses, which heads', and what fills them; the next ones take the same memory.

    So many at a time that the masses take MASSES_BYTES, or a quarter of the memory of ``key`` if that is more.
    """
    batch, length, heads, head_dim = key.shape
    whole_blocks = ceil_div(length, config.kv_block_size) * config.kv_block_size
    limit = max(MASSES_BYTES, batch * whole_blocks * heads * head_dim * key.itemsize // 4)
    step = heads_at_a_time(source.query, source.layout, limit)
    masses = empty_masses(source.query, source.layout, step)
    for first in range(0, heads, step):
        some = range(first, min(heads, first + step))
        yield masses, some, source.launch(masses, some)
