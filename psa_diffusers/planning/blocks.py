"""Cutting a sequence into blocks: the order of its tokens, which of them are real, and the rows of a run of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .ordering import gilbert_order

FullTokens = tuple[int, int] | Tensor | None


@dataclass(frozen=True)
class Layout:
    """Where the tokens of one plan stand.

    Attributes:
        order: int64 [tokens] on the inputs' device, or None for raster.
        full_query_blocks, full_kv_blocks: bool [blocks] on the inputs' device: blocks that hold a full token; None
            when there is no full token (or, for queries, when they are not the keys' sequence).
        full_pairs: Number of block pairs of one head that these blocks take up.
    """

    order: Tensor | None
    full_query_blocks: Tensor | None
    full_kv_blocks: Tensor | None
    full_pairs: int


def make_layout(
    query_length: int,
    key_length: int,
    query_block_size: int,
    kv_block_size: int,
    *,
    curve: str,
    grid: tuple[int, int, int] | None,
    full_tokens: FullTokens,
    device: torch.device,
) -> Layout:
    """The order (full tokens last) and the blocks that full tokens make full. Cached by everything but the tensors."""
    mask = full_tokens if isinstance(full_tokens, Tensor) else None
    full = mask.numpy().tobytes() if mask is not None else full_tokens
    return _layout(query_length, key_length, query_block_size, kv_block_size, curve, grid, full, str(device))


@lru_cache(maxsize=64)
def _layout(
    query_length: int,
    key_length: int,
    query_block_size: int,
    kv_block_size: int,
    curve: str,
    grid: tuple[int, int, int] | None,
    full: tuple[int, int] | bytes | None,
    device: str,
) -> Layout:
    same = query_length == key_length
    mask = _full_mask(full, key_length)
    order = _order(curve, grid, mask) if grid is not None and same else None
    if mask is None:
        return Layout(_to(order, device), None, None, 0)
    in_order = mask if order is None else mask[order]
    columns = _any_in_block(in_order, kv_block_size)
    rows = _any_in_block(in_order, query_block_size) if same else None
    query_blocks = -(-query_length // query_block_size)
    full_rows = int(rows.sum()) if rows is not None else 0
    pairs = full_rows * columns.numel() + (query_blocks - full_rows) * int(columns.sum())
    return Layout(_to(order, device), _to(rows, device), _to(columns, device), pairs)


def _full_mask(full: tuple[int, int] | bytes | None, length: int) -> Tensor | None:
    if full is None:
        return None
    if isinstance(full, bytes):
        return torch.frombuffer(bytearray(full), dtype=torch.bool)
    mask = torch.zeros(length, dtype=torch.bool)
    mask[full[0] : full[1]] = True
    return mask


def _order(curve: str, grid: tuple[int, int, int], full: Tensor | None) -> Tensor | None:
    """The grid's tokens along the curve, then the full tokens; None if that is the raster order."""
    cells = gilbert_order(grid) if curve == "gilbert" else torch.arange(grid[0] * grid[1] * grid[2])
    order = cells if full is None else torch.cat([torch.nonzero(~full)[:, 0][cells], torch.nonzero(full)[:, 0]])
    return None if torch.equal(order, torch.arange(order.numel())) else order.clone()


def _any_in_block(tokens: Tensor, block_size: int) -> Tensor:
    return torch.stack([block.any() for block in tokens.split(block_size)])


def _to(tensor: Tensor | None, device: str) -> Tensor | None:
    return None if tensor is None else tensor.to(device)


def real_positions(length: int, block_size: int, order: Tensor | None, lengths: Tensor, device: torch.device) -> Tensor:
    """bool [batch, blocks, block_size]: the positions of the block order that hold a real token, of padded samples."""
    tokens = torch.arange(length, device=device) if order is None else order
    return _in_blocks(tokens[None, :] < lengths[:, None], block_size)


def unpadded_positions(length: int, block_size: int, device: torch.device) -> Tensor:
    """bool [1, blocks, block_size]: as :func:`real_positions` without padding: only the tail block may be short."""
    return _in_blocks(torch.ones(1, length, dtype=torch.bool, device=device), block_size)


def _in_blocks(real: Tensor, block_size: int) -> Tensor:
    batch, length = real.shape
    blocks = -(-length // block_size)
    return torch.nn.functional.pad(real, (0, blocks * block_size - length)).view(batch, blocks, block_size)


def block_rows(
    tokens: Tensor, order: Tensor | None, real: Tensor | None, start: int, stop: int, block_size: int
) -> Tensor:
    """float32 [batch, stop - start, block_size, heads * head_dim]: a run of blocks, what is not real set to 0.

    Args:
        tokens: [batch, seq, heads, head_dim], any strides.
        order: int64 [seq] or None; real: bool [batch or 1, blocks, block_size], or None for no mask.
    """
    batch, length, heads, head_dim = tokens.shape
    first, last = start * block_size, min(stop * block_size, length)
    chunk = tokens[:, first:last] if order is None else take_tokens(tokens, order[first:last])
    rows = chunk.to(torch.float32).reshape(batch, last - first, heads * head_dim)
    missing = stop * block_size - last
    if missing > 0:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
    rows = rows.view(batch, stop - start, block_size, heads * head_dim)
    return rows if real is None else rows.masked_fill(~real[:, start:stop, :, None], 0.0)


def take_tokens(tokens: Tensor, places: Tensor) -> Tensor:
    """[batch, places, heads, head_dim]: these tokens of tokens [batch, seq, heads, head_dim], places int64 [places]."""
    if tokens.device.type != "cpu":
        return tokens.index_select(1, places)
    # A sample at a time: along any but the first dimension index_select takes 20 times as long on a CPU.
    samples = [sample.index_select(0, places) for sample in tokens]
    return samples[0][None] if len(samples) == 1 else torch.stack(samples)


def rows_per_chunk(tokens: Tensor, block_size: int) -> int:
    """How many blocks to handle at once: what fits a cache on a CPU, an eighth of the tensor elsewhere."""
    block_numel = tokens.shape[0] * tokens.shape[2] * tokens.shape[3] * block_size
    budget = 2**18 if tokens.device.type == "cpu" else max(2**24, tokens.numel() // 8)
    return max(1, budget // block_numel)
