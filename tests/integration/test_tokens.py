"""Layouts of token sequences, and what is read from masks and coordinates."""

import gc

import pytest
import torch

from psa_diffusers.integration import tokens
from psa_diffusers.integration.tokens import TokenLayout, padded_at_the_end, raster_at_the_end, real_counts

GRID = (2, 3, 4)


def places(grid, time=0):
    place = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) for size in grid))
    place[:, 0] += time
    return place


@pytest.mark.parametrize(
    ("layout", "fitting", "full"),
    [
        (TokenLayout(GRID), {24}, []),
        (TokenLayout(GRID, before=3), {27}, [0, 1, 2]),
        (TokenLayout(GRID, after=2), {26}, [24, 25]),
        (TokenLayout(GRID, before=1, after=2), {27}, [0, 25, 26]),
        (TokenLayout(GRID, before=1, after=2, after_varies=True), {25, 26, 27}, None),
    ],
)
def test_layouts(layout, fitting, full):
    assert {length for length in range(60) if layout.of_length(length) is layout} == fitting
    for length in fitting:
        found = layout.full_tokens(length)
        chosen = [] if found is None else torch.arange(length)[found].tolist()
        assert chosen == (full if full is not None else [0, *range(25, length)])


def test_a_layout_elsewhere():
    other = TokenLayout((4, 3, 4))
    layout = TokenLayout(GRID, after=5, elsewhere=other)
    assert layout.of_length(29) is layout and layout.of_length(48) is other and layout.of_length(24) is None


def test_layouts_that_are_the_same():
    mask, grid = torch.ones(1, 3), TokenLayout(GRID)
    assert grid.same_as(TokenLayout(GRID)) and not grid.same_as(TokenLayout(GRID, before=1))
    masked = TokenLayout(GRID, after=3, padding_of=(mask,))
    assert masked.same_as(TokenLayout(GRID, after=3, padding_of=(mask,)))
    assert not masked.same_as(TokenLayout(GRID, after=3, padding_of=(mask.clone(),)))
    assert not masked.same_as(TokenLayout(GRID, after=3))


def test_masks_that_a_layout_explains():
    layout = TokenLayout(GRID, after=4, key_lengths=torch.tensor([26, 28]))
    real = torch.arange(28) < torch.tensor([26, 28])[:, None]
    columns, both = real[:, None, None, :], real[:, None, None, :] & real[:, None, :, None]
    assert layout.explains(columns, 2, 28) and layout.explains(both, 2, 28)
    assert not layout.explains(columns.float(), 2, 28)
    assert not layout.explains(columns[:1], 1, 28)
    assert not layout.explains(columns[:1].expand(2, -1, -1, -1), 2, 28)  # the first sample's for both
    assert not layout.explains(both.tril(), 2, 28)
    assert not layout.explains(both.expand(-1, 2, -1, -1), 2, 28)
    assert not layout.explains("a block mask", 2, 28)
    assert not TokenLayout(GRID, after=4).explains(columns, 2, 28)
    assert layout.explains(columns.to("meta"), 2, 28)  # elsewhere than on a CPU by its shape


def test_counts_and_ends_of_masks():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert real_counts(mask).tolist() == real_counts(mask.bool()).tolist() == [2, 1]
    assert padded_at_the_end(mask) and padded_at_the_end(torch.ones(2, 3)) and padded_at_the_end(torch.zeros(1, 3))
    assert not padded_at_the_end(torch.tensor([[1, 1, 0], [0, 1, 1]]))


@pytest.mark.parametrize(
    ("before", "grid"),
    [
        ([], GRID),
        ([places((1, 3, 4))], GRID),  # a condition at the time of the first frame
        ([places((1, 3, 4), time=9)], GRID),
        ([places((1, 3, 4), time=-1)], (3, 3, 4)),  # is a frame like the others
        ([places((1, 2, 2), time=-1)], GRID),
        ([torch.zeros(5, 3)], GRID),
        ([torch.zeros(25, 3)], ()),  # more than half is not video
    ],
)
def test_a_raster_at_the_end(before, grid):
    assert raster_at_the_end(torch.cat([*before, places(GRID)])) == grid


@pytest.mark.parametrize("grid", [(1, 1, 1), (5, 1, 1), (1, 1, 7), (1, 6, 1), (3, 1, 4), (4, 5, 1)])
def test_rasters_with_sides_of_one(grid):
    found = raster_at_the_end(places(grid))
    assert found == grid
    assert raster_at_the_end(places(grid).flip(0)) in ((), (1, 1, 1))


def test_what_is_no_raster():
    place = places(GRID)
    assert raster_at_the_end(place[torch.randperm(24, generator=torch.Generator().manual_seed(0))]) == ()
    assert raster_at_the_end(place[:-1]) == ()
    assert raster_at_the_end(place[:0]) == ()


def test_a_tensor_is_read_once_while_it_lives_unchanged():
    reads = []
    read = tokens.once_a_tensor(lambda tensor: reads.append(1) or float(tensor.sum()))
    one, other = torch.ones(3), torch.ones(3)
    assert [read(one), read(one), read(other), len(reads)] == [3, 3, 3, 2]
    one.add_(1)
    assert read(one) == 6 and len(reads) == 3
    with torch.inference_mode():
        frozen = torch.ones(2)
        assert read(frozen) == read(frozen) == 2 and len(reads) == 4
    del one, other, frozen
    gc.collect()
    assert read(torch.ones(3)) == 3 and len(reads) == 5
