"""The order in which tokens are cut into blocks: a generalised Hilbert curve through a (frames, height, width) box."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import permutations

import torch
from torch import Tensor

# A part of a box: the corner where its own curve starts, and its three sides as (axis, signed length).
_Side = tuple[int, int]
_Part = tuple[tuple[int, int, int], tuple[_Side, _Side, _Side]]


@lru_cache(maxsize=64)
def gilbert_order(grid: tuple[int, int, int]) -> Tensor:
    """Raster index (frames, then height, then width) of each cell of the box along a Hilbert-like curve.

    The construction is that of the generalised Hilbert curve: a box is walked from one corner to the far end of its
    first side and is cut into two, three or five boxes that are walked in the same way, so that any box works and a
    run of consecutive cells stays compact. Of the six ways to lay the sides, the one with the fewest steps between
    cells that do not touch is taken, then the one whose runs of 64 cells are the most compact.

    Returns:
        int64 [frames * height * width] on the CPU, a permutation. Cached: do not write into it.
    """
    best, best_score = None, None
    for axes in permutations(range(3)):
        walked = _curve(*(grid[axis] for axis in axes))
        cells = torch.empty_like(walked)
        for column, axis in enumerate(axes):
            cells[:, axis] = walked[:, column]
        score = (_jumps(cells), _mean_extent(cells, 64))
        if best_score is None or score < best_score:
            best, best_score = cells, score
    _curve.cache_clear()  # the walks through the parts are many times the order itself
    return (best[:, 0] * grid[1] + best[:, 1]) * grid[2] + best[:, 2]


def _jumps(cells: Tensor) -> int:
    return int(((cells[1:] - cells[:-1]).abs().sum(1) != 1).sum())


def _mean_extent(cells: Tensor, block_size: int) -> float:
    """Mean over blocks of the summed side lengths of a block's bounding box: how far a block reaches."""
    extents = [block.amax(0) - block.amin(0) + 1 for block in cells.split(block_size)]
    return float(torch.stack(extents).sum(1).double().mean())


@lru_cache(maxsize=1024)
def _curve(first: int, second: int, third: int) -> Tensor:
    """int64 [cells, 3]: the walk through a box, from its origin to the far end of its first side."""
    sizes = (first, second, third)
    if sorted(sizes)[1] == 1:
        walk = torch.zeros(max(sizes), 3, dtype=torch.int64)
        walk[:, sizes.index(max(sizes))] = torch.arange(max(sizes))
        return walk
    placed = [_place(corner, sides) for corner, sides in _parts(*sizes) if all(length for _, length in sides)]
    return torch.cat(placed)


def _place(corner: tuple[int, int, int], sides: tuple[_Side, _Side, _Side]) -> Tensor:
    """The walk through a part, in the coordinates of the box that holds it."""
    walk = _curve(*(abs(length) for _, length in sides))
    cells = torch.empty_like(walk)
    for column, (axis, length) in enumerate(sides):
        cells[:, axis] = corner[axis] + (walk[:, column] if length > 0 else -walk[:, column])
    return cells


def _even_half(size: int) -> int:
    """About half of a side, even where possible: an even side can be walked without a diagonal step."""
    half = size // 2
    return half + 1 if half % 2 and size > 2 else half


def _parts(a: int, b: int, c: int) -> Iterator[_Part]:
    """The parts of an a x b x c box in the order of the walk; each begins beside the end of the one before."""
    half_a, half_b, half_c = _even_half(a), _even_half(b), _even_half(c)
    rest_a, rest_b, rest_c = a - half_a, b - half_b, c - half_c
    if 2 * a > 3 * b and 2 * a > 3 * c:  # long: two boxes, one after the other
        yield (0, 0, 0), ((0, half_a), (1, b), (2, c))
        yield (half_a, 0, 0), ((0, rest_a), (1, b), (2, c))
    elif 3 * b > 4 * c:  # flat in the third side: out along the second, across, and back
        yield (0, 0, 0), ((1, half_b), (2, c), (0, half_a))
        yield (0, half_b, 0), ((0, a), (1, rest_b), (2, c))
        yield (a - 1, half_b - 1, 0), ((1, -half_b), (2, c), (0, -rest_a))
    elif 3 * c > 4 * b:  # flat in the second side: out along the third, across, and back
        yield (0, 0, 0), ((2, half_c), (0, half_a), (1, b))
        yield (0, 0, half_c), ((0, a), (1, b), (2, rest_c))
        yield (a - 1, 0, half_c - 1), ((2, -half_c), (0, -rest_a), (1, b))
    else:  # about a cube: five boxes, the corners of a Hilbert cube merged in pairs where they follow each other
        yield (0, 0, 0), ((1, half_b), (2, half_c), (0, half_a))
        yield (0, half_b, 0), ((2, c), (0, half_a), (1, rest_b))
        yield (0, half_b - 1, c - 1), ((0, a), (1, -half_b), (2, -rest_c))
        yield (a - 1, half_b, c - 1), ((2, -c), (0, -rest_a), (1, rest_b))
        yield (a - 1, half_b - 1, 0), ((1, -half_b), (2, half_c), (0, -rest_a))
