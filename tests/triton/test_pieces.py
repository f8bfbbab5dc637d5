"""The pyramid and the lists by themselves, and the arithmetic that arranges them."""

import math

import pytest
import torch

from psa_diffusers.backends.reference import pyramid_rows
from psa_diffusers.backends.triton.layout import PyramidLayout
from psa_diffusers.backends.triton.read_lists import ReadLists
from psa_diffusers.backends.triton.tiles import attention_tile, pyramid_tile
from tests.backends.conformance import Case, make_inputs


@pytest.mark.parametrize("kv_block_size, num_levels, share", [(64, 4, 121 / 64), (32, 4, 61 / 32), (16, 1, 17 / 16)])
def test_layout_packs_levels_without_gaps(kv_block_size, num_levels, share):
    layout = PyramidLayout(10, kv_block_size, num_levels)
    row = 0
    for level in range(1, num_levels + 2):
        assert layout.first_row(level) == row
        row += 10 * layout.rows_per_block(level)
    assert layout.empty_row == row == share * 10 * kv_block_size
    assert layout.rows == row + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pyramid_is_the_reference_s(interpreter, dtype):
    """Every row of every level, the bias and the variance; with an order, padding, and a short last block."""
    case = Case(dtype, 40, 75, 75, kv_block_size=16, num_levels=3, heads=2, batch=2)
    _, key, value = make_inputs(case)
    order = torch.randperm(75, generator=torch.Generator().manual_seed(1))
    key_lengths = torch.tensor([75, 41])
    layout = PyramidLayout(5, 16, 3)
    arguments = {"order": order, "key_lengths": key_lengths, "with_variance": True}
    module = "psa_diffusers.backends.triton.pyramid"
    pyramid = interpreter.call(module, "build_pyramid", key, value, layout, **arguments)
    rounding = 4 * torch.finfo(dtype).eps
    for sample in range(2):
        for head in range(2):
            ordered = key[sample, order, head], value[sample, order, head]
            expected = pyramid_rows(*ordered, order < key_lengths[sample], 16, 3, torch.float32)
            kept = packed_rows_of(layout, expected)
            torch.testing.assert_close(pyramid.key[sample, head, kept], expected.key, rtol=rounding, atol=rounding)
            torch.testing.assert_close(pyramid.value[sample, head, kept], expected.value, rtol=rounding, atol=rounding)
            found_variance = pyramid.variance[sample, head, kept].float()
            torch.testing.assert_close(found_variance, expected.variance, rtol=rounding, atol=rounding)
            torch.testing.assert_close(pyramid.bias[sample, kept], expected.count.log2(), rtol=1e-6, atol=1e-6)
            assert (pyramid.key[sample, head, layout.empty_row] == 0).all()
            assert (pyramid.value[sample, head, layout.empty_row] == 0).all()
        assert pyramid.bias[sample, layout.empty_row] == -math.inf


def packed_rows_of(layout, rows):
    """Where the reference's rows lie in the packed buffer: it leaves out groups beyond the last token."""
    places = []
    for level in range(1, layout.num_levels + 2):
        count = int((rows.level == level).sum())
        places.append(layout.first_row(level) + torch.arange(count))
    return torch.cat(places)


@pytest.mark.parametrize("kv_blocks", [1, 37])
def test_read_lists_sort_blocks_by_level(interpreter, kv_blocks):
    mask = torch.randint(0, 6, (2, 3, 5, kv_blocks), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    made = interpreter.call("psa_diffusers.backends.triton.read_lists", "make_read_lists", mask, 4, 64)
    lists = ReadLists(*made)
    assert lists.blocks.dtype == torch.int16
    lengths = []
    for row, levels in enumerate(mask.view(-1, kv_blocks)):
        of_level = [(levels == level).nonzero().flatten() for level in range(1, 6)]
        assert lists.counts[row].tolist() == [len(blocks) for blocks in of_level]
        expected = torch.cat(of_level)
        assert torch.equal(lists.blocks[row, : len(expected)].long(), expected)
        lengths.append(sum(len(blocks) * rows for blocks, rows in zip(of_level, (64, 32, 16, 8, 1), strict=True)))
    lengths = torch.tensor(lengths).view(6, 5)
    order = lists.launch_order.view(6, 5).long()
    assert torch.equal(order // 5, torch.arange(6)[:, None].expand(6, 5)), "a head's rows are launched together"
    launched = lengths.flatten()[order]
    assert (launched.diff(dim=1) <= 0).all(), "longest first"
    assert torch.equal(order.sort(dim=1).values.flatten(), torch.arange(30))


@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100", "cpu"])
@pytest.mark.parametrize("query_block_size", [1, 16, 64, 128, 512])
def test_tiles_suit_the_query_block(target, query_block_size):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for head_dim in (32, 96, 256):
            tile = attention_tile(target, head_dim, dtype, query_block_size)
            assert tile.block_m >= 16
            assert tile.block_m <= max(16, query_block_size)
            assert tile.block_n >= 16
            assert pyramid_tile(64, head_dim).block_d >= 16
