"""Policies whose masks follow from positions alone: SVG's two heads, Radial's decay, sliding tiles. Re-implemented.

Their kernels take pairs of tokens or tiles; here a mask is what the budget keeps of the block pairs of least distance,
so that all meet any budget. Where a head may choose between masks, it takes the one with the least error on a sample
of queries against dense attention, as SVG does; sliding tiles get the same chance, in place of a search beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from block_policies import PAPER, Policy, Result, _read_only, attend
from cases import Case
from equal_compute import lowest_pairs, make_plan
from torch import Tensor

SAMPLED_ROWS = 64
BASE = _read_only(PAPER)
Mask = tuple[Tensor, Tensor | None]  # priority [query_blocks, kv_blocks], the lower the sooner read; order of tokens


def choose_a_head(masks: Callable[[Case], Sequence[Mask]]) -> Policy:
    """For each head the best of several masks, judged on a sample of queries."""
    made: dict[tuple, Sequence[Mask]] = {}

    def policy(case: Case, budget: float) -> Result:
        where = (case.grid, case.query.device)
        if where not in made:  # they follow from positions alone
            made[where] = masks(case)
        results = []
        for priority, order in made[where]:
            kept = lowest_pairs(priority.float(), budget)
            levels = kept.expand(len(case.query), case.heads, *kept.shape).contiguous()
            results.append(attend(case, make_plan(case, BASE, levels, order), BASE, 0.0))
        return results[0] if len(results) == 1 else _best_a_head(case, results, budget)

    return policy


def _best_a_head(case: Case, results: Sequence[Result], budget: float) -> Result:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(case.tokens, generator=generator)[:SAMPLED_ROWS].to(case.query.device)
    dense = case.dense[:, rows].float()
    lost = torch.stack([(result.output[:, rows].float() - dense).square().sum((1, 3)) for result in results])
    best = lost.argmin(0)  # [batch, heads]
    output, costs = torch.zeros_like(results[0].output), torch.zeros_like(best, dtype=torch.float64)
    for number, result in enumerate(results):
        mine = best == number
        output = torch.where(mine[:, None, :, None], result.output, output)
        costs = torch.where(mine, result.costs[:, None], costs)  # a mask is the same for all heads
    return Result(output, costs.mean(1), SAMPLED_ROWS / case.tokens * (1 + len(results) * budget))


def cells(case: Case) -> Tensor:
    """float32 [tokens, 3]: frame, row, column of every token in raster order."""
    sizes = (torch.arange(size, device=case.query.device) for size in case.grid)
    return torch.cartesian_prod(*sizes).float()


def blocks_min(distance: Tensor, order: Tensor | None = None) -> Tensor:
    """The least distance [tokens, tokens] of any two tokens of a block pair. The tokens must fill whole blocks."""
    if order is not None:
        distance = distance[order][:, order]
    rows, columns = (-(-len(distance) // size) for size in (BASE.query_block_size, BASE.kv_block_size))
    return distance.view(rows, BASE.query_block_size, columns, BASE.kv_block_size).amin((1, 3))


def blocks_mean(distance: Tensor, order: Tensor | None = None) -> Tensor:
    """The mean instead."""
    if order is not None:
        distance = distance[order][:, order]
    rows, columns = (-(-len(distance) // size) for size in (BASE.query_block_size, BASE.kv_block_size))
    return distance.view(rows, BASE.query_block_size, columns, BASE.kv_block_size).mean((1, 3))


def svg(sink: bool) -> Policy:
    """Sparse VideoGen (arXiv 2502.01776): a head is spatial or temporal.

    Spatial: a band around the diagonal in raster order (the frame and its neighbours). Temporal: a band in the order in
    which the frames of one place are neighbours (the place through time). ``sink`` always keeps the first frame in the
    spatial heads.
    """

    def masks(case: Case) -> list[Mask]:
        places = torch.arange(case.tokens, device=case.query.device)
        by_place = places.view(case.grid[0], -1).T.reshape(-1)
        band = (places[:, None] - places[None, :]).abs().float()
        spatial, temporal = blocks_mean(band), blocks_mean(band)
        if sink:
            frame = case.grid[1] * case.grid[2]
            spatial[:, : -(-frame // BASE.kv_block_size)] *= 0.01
        return [(spatial, None), (temporal, by_place)]

    return choose_a_head(masks)


def radial(sink: bool) -> Policy:
    """Radial Attention (arXiv 2506.19852): the window within a frame halves whenever the distance in time doubles.

    Raster order; a pair of tokens at distance t in frames and s in the frame's raster is kept where
    s * 2^floor(log2(max(t, 1))) is below a width, which is what meets the budget. ``sink`` keeps the first frame.
    """

    def masks(case: Case) -> list[Mask]:
        frame_size = case.grid[1] * case.grid[2]
        places = torch.arange(case.tokens, device=case.query.device)
        frames, inside = places // frame_size, places % frame_size
        apart = (frames[:, None] - frames[None, :]).abs().clamp(min=1).float()
        distance = (inside[:, None] - inside[None, :]).abs().float() * 2 ** apart.log2().floor()
        # Blocks of equal width are kept the nearer in time the sooner.
        priority = blocks_min(distance) + 1e-3 * blocks_min(apart) + 1e-6 * blocks_mean(distance)
        if sink:
            priority[:, : -(-frame_size // BASE.kv_block_size)] *= 0.01
        return [(priority, None)]

    return choose_a_head(masks)


def sliding_tiles(tile: tuple[int, int, int], shapes: Sequence[tuple[float, float, float]]) -> Policy:
    """Sliding Tile Attention (arXiv 2502.04507): blocks are tiles of the video, a window of tiles around each.

    Args:
        tile: Frames, rows, columns of a tile, 64 tokens.
        shapes: For each candidate window its extents along frames, rows and columns, up to a factor that meets the
            budget. Every head takes the best of them.
    """

    def masks(case: Case) -> list[Mask]:
        order = tile_order(case.grid, tile).to(case.query.device)
        cell = cells(case)[order]
        centres = [cell.view(-1, size, 3).mean(1) for size in (BASE.query_block_size, BASE.kv_block_size)]
        gaps = (centres[0][:, None] - centres[1][None, :]).abs()
        extents = torch.tensor(shapes, device=gaps.device) * torch.tensor(case.grid, device=gaps.device)
        # The order among equals: by distance.
        return [((gaps / extent).amax(-1) + 1e-4 * gaps.square().sum(-1).sqrt(), order) for extent in extents]

    return choose_a_head(masks)


def tile_order(grid: tuple[int, int, int], tile: tuple[int, int, int]) -> Tensor:
    """Tokens tile by tile; what the frames leave over goes last, in flat tiles of as many tokens."""
    frames, height, width = grid
    whole = frames - frames % tile[0]
    index = torch.arange(frames * height * width).view(grid)
    parts = [_tiles(index[:whole], tile)] if whole else []
    if whole < frames:
        flat = (1, 8, tile[0] * tile[1] * tile[2] // 8)
        parts.append(_tiles(index[whole:], flat))
    return torch.cat(parts)


def _tiles(index: Tensor, tile: tuple[int, int, int]) -> Tensor:
    cut = index
    for axis, size in enumerate(tile):
        if cut.shape[2 * axis] % size:
            raise ValueError(f"tile_order: {index.shape[axis]} tokens along axis {axis} are not whole tiles of {size}.")
        cut = cut.unflatten(2 * axis, (-1, size))
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1)
