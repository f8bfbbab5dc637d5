import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_diffusers.planning.blocks import make_layout
from psa_diffusers.planning.ordering import gilbert_order

GRIDS = [
    (1, 1, 1),
    (1, 1, 9),
    (1, 7, 1),
    (5, 1, 1),
    (1, 7, 5),
    (2, 2, 2),
    (3, 5, 7),
    (8, 8, 8),
    (9, 24, 24),
    (21, 30, 52),
]


def cells_of(order, grid):
    _, height, width = grid
    return torch.stack([order // (height * width), order // width % height, order % width], dim=1)


def mean_extent(order, grid, block_size):
    blocks = [block for block in cells_of(order, grid).split(block_size) if len(block) == block_size]
    sides = torch.stack([block.amax(0) - block.amin(0) + 1 for block in blocks])
    return float(sides.sum(1).double().mean())


@pytest.mark.parametrize("grid", GRIDS)
def test_order_visits_every_cell_once_and_steps_to_a_touching_cell(grid):
    order = gilbert_order(grid)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(math.prod(grid)))
    steps = (cells_of(order, grid).diff(dim=0)).abs()
    if len(steps):
        assert int(steps.amax()) == 1
        # Two diagonal moves at most, and only a few of them.
        assert int(steps.sum(1).amax()) <= 2
        assert float((steps.sum(1) > 1).double().mean()) < 0.06


@pytest.mark.parametrize("grid", [(2, 4, 4), (4, 4, 4), (8, 32, 32), (2, 6, 10), (1, 8, 8), (16, 16, 16), (4, 30, 52)])
def test_even_boxes_have_no_diagonal_step(grid):
    steps = cells_of(gilbert_order(grid), grid).diff(dim=0).abs().sum(1)
    assert bool((steps == 1).all())


@given(st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12)))
@settings(max_examples=60, deadline=None)
def test_any_box_is_a_permutation(grid):
    assert torch.equal(gilbert_order(grid).sort().values, torch.arange(math.prod(grid)))


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("grid", [(8, 32, 32), (9, 24, 24), (21, 30, 52)])
def test_blocks_are_compact(grid, block_size):
    raster = mean_extent(torch.arange(math.prod(grid)), grid, block_size)
    curve = mean_extent(gilbert_order(grid), grid, block_size)
    assert curve < 0.6 * raster
    cube = 3 * block_size ** (1 / 3)
    assert curve < 1.3 * cube


def test_hilbert_cube_gives_perfect_cubes():
    assert mean_extent(gilbert_order((8, 8, 8)), (8, 8, 8), 64) == 12.0


def layout(length, *, key_length=None, curve="gilbert", grid=None, full=None):
    return make_layout(
        length,
        length if key_length is None else key_length,
        8,
        4,
        curve=curve,
        grid=grid,
        full_tokens=full,
        device=torch.device("cpu"),
    )


def test_full_tokens_come_last_in_both_orders():
    mask = torch.zeros(2 * 4 * 4 + 5, dtype=torch.bool)
    mask[[0, 3, 10, 11, 36]] = True
    for curve in ("gilbert", "raster"):
        order = layout(37, curve=curve, grid=(2, 4, 4), full=mask).order
        assert torch.equal(order.sort().values, torch.arange(37))
        assert order[-5:].tolist() == [0, 3, 10, 11, 36]
    video = torch.nonzero(~mask)[:, 0]
    assert torch.equal(layout(37, curve="raster", grid=(2, 4, 4), full=mask).order[:-5], video)
    assert torch.equal(layout(37, grid=(2, 4, 4), full=mask).order[:-5], video[gilbert_order((2, 4, 4))])


def test_order_is_none_where_it_would_be_raster():
    assert layout(32, curve="raster", grid=(2, 4, 4)).order is None
    assert layout(37, curve="raster", grid=(2, 4, 4), full=(32, 37)).order is None
    assert layout(37, full=(0, 5)).order is None
    assert layout(32, key_length=64, grid=(4, 4, 4)).order is None
    assert layout(32, grid=(2, 4, 4)).order is not None


def test_full_blocks_by_hand():
    # 32 video tokens, then 5 full ones: kv blocks of 4 from the ninth on, the fifth block of 8 queries.
    made = layout(37, grid=(2, 4, 4), full=(0, 5))
    assert made.full_kv_blocks.tolist() == [False] * 8 + [True, True]
    assert made.full_query_blocks.tolist() == [False] * 4 + [True]
    assert made.full_pairs == 1 * 10 + 4 * 2
    # In place without a grid; with another number of queries only the keys' blocks.
    made = layout(37, full=(3, 6))
    assert made.full_kv_blocks.tolist() == [True, True] + [False] * 8
    assert made.full_query_blocks.tolist() == [True] + [False] * 4
    made = layout(16, key_length=37, full=(3, 6))
    assert made.full_query_blocks is None
    assert made.full_pairs == 2 * 2
