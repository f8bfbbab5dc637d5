"""The pyramid and the lists by themselves, and the arithmetic that arranges them."""

import itertools
import math

import pytest
import torch

from psa_diffusers.backends.logit_variance import logit_correction, query_power
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
    """Every row of every level, and the bias; with an order, padding, and a short last block."""
    case = Case(dtype, 40, 75, 75, kv_block_size=16, num_levels=3, heads=2, batch=2)
    _, key, value = make_inputs(case)
    order = torch.randperm(75, generator=torch.Generator().manual_seed(1))
    key_lengths = torch.tensor([75, 41])
    layout = PyramidLayout(5, 16, 3)
    arguments = {"order": order, "key_lengths": key_lengths}
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
            torch.testing.assert_close(pyramid.bias[sample, kept], expected.count.log2(), rtol=1e-6, atol=1e-6)
            assert (pyramid.key[sample, head, layout.empty_row] == 0).all()
            assert (pyramid.value[sample, head, layout.empty_row] == 0).all()
        assert pyramid.bias[sample, layout.empty_row] == -math.inf


@pytest.mark.parametrize("in_pyramid", [True, False])
@pytest.mark.parametrize("gain", [0.3, 3.0])
@pytest.mark.parametrize("kv_block_size, num_levels, head_dim", [(16, 3, 40), (64, 5, 24), (128, 1, 16)])
def test_bias_with_the_logit_correction_is_the_reference_s(
    interpreter, kv_block_size, num_levels, head_dim, gain, in_pyramid
):
    """Every row, level 1, centroids and rows without tokens among them; large queries reach the clamp."""
    length = 2 * kv_block_size + 11
    query, key, value = make_inputs(Case(torch.float32, head_dim, 75, length, heads=2, batch=2))
    key_lengths = torch.tensor([length, kv_block_size + 5])
    layout = PyramidLayout(3, kv_block_size, num_levels)
    inputs = gain * query, key, value, key_lengths, kv_block_size, num_levels, in_pyramid
    found, of_centroids, plain = interpreter.call("tests.triton.interpreted_checks", "logit_correction", *inputs)
    power = query_power(gain * query, torch.float32)
    clamped = []
    for sample, head in itertools.product(range(2), range(2)):
        real = torch.arange(length) < key_lengths[sample]
        rows = pyramid_rows(
            key[sample, :, head], value[sample, :, head], real, kv_block_size, num_levels, torch.float32
        )
        log_count = rows.count.log()
        expected = logit_correction(rows.variance @ power[sample, head], log_count, 0.3)
        clamped.append((expected == log_count)[rows.count > 1])
        here = found[sample, head, packed_rows_of(layout, rows)]
        torch.testing.assert_close(here * math.log(2), log_count + expected, rtol=1e-5, atol=1e-5)
    assert torch.cat(clamped).any() == (gain > 1.0)
    assert (found[..., layout.empty_row] == -math.inf).all()
    torch.testing.assert_close(of_centroids, found[..., layout.first_row(num_levels + 1) : layout.empty_row])
    unpooled = plain[:, None, : layout.first_row(2)].expand(2, 2, -1)
    torch.testing.assert_close(found[..., : layout.first_row(2)], unpooled, rtol=0, atol=0)


def packed_rows_of(layout, rows):
    """Where the reference's rows lie in the packed buffer: it leaves out groups beyond the last token."""
    places = []
    for level in range(1, layout.num_levels + 2):
        count = int((rows.level == level).sum())
        places.append(layout.first_row(level) + torch.arange(count))
    return torch.cat(places)


@pytest.mark.parametrize("kv_blocks, num_levels", [(1, 4), (37, 4), (1100, 4), (70, 7), (70, 1)])
def test_read_lists_sort_blocks_by_level(interpreter, kv_blocks, num_levels):
    """Also more blocks than are compacted at a time, and more levels than are counted at a time."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(0, num_levels + 3, (2, 3, 5, kv_blocks), generator=generator, dtype=torch.int8)
    made = interpreter.call("psa_diffusers.backends.triton.read_lists", "make_read_lists", mask, num_levels, 128)
    lists = ReadLists(*made)
    assert lists.blocks.dtype == torch.int16
    rows_of_level = [128 >> level for level in range(num_levels)] + [1]
    lengths = []
    for row, levels in enumerate(mask.view(-1, kv_blocks)):
        of_level = [(levels == level).nonzero().flatten() for level in range(1, num_levels + 2)]
        assert lists.counts[row].tolist() == [len(blocks) for blocks in of_level]
        expected = torch.cat(of_level)
        assert torch.equal(lists.blocks[row, : len(expected)].long(), expected)
        lengths.append(sum(len(blocks) * rows for blocks, rows in zip(of_level, rows_of_level, strict=True)))
    lengths = torch.tensor(lengths).view(6, 5)
    order = lists.launch_order.view(6, 5).long()
    assert torch.equal(order // 5, torch.arange(6)[:, None].expand(6, 5)), "a head's rows are launched together"
    launched = lengths.flatten()[order]
    assert (launched.diff(dim=1) <= 0).all(), "longest first"
    assert torch.equal(order.sort(dim=1).values.flatten(), torch.arange(30))


@pytest.mark.parametrize("query_blocks, kv_blocks", [(1, 1), (5, 37), (40, 150)])
def test_read_lists_say_what_all_rows_read_and_how_much(interpreter, query_blocks, kv_blocks):
    """More rows, and more kv blocks, than one program handles at a time; levels that no one knows are skipped."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(1, 7, (2, 2, query_blocks, kv_blocks), generator=generator, dtype=torch.int8)
    mask[torch.rand(mask.shape, generator=generator) < 0.3 / query_blocks] = 0
    made = interpreter.call("psa_diffusers.backends.triton.read_lists", "make_read_lists", mask, 4, 64)
    lists = ReadLists(*made)
    assert torch.equal(lists.read_by_all.bool(), (mask > 0).all(2))
    known = torch.where(mask > 5, 0, mask)
    assert torch.equal(lists.totals, torch.stack([(known == level).sum((2, 3)) for level in range(6)], -1))


@pytest.mark.parametrize("num_levels", [1, 2, 4])
def test_covariance_is_the_mean_over_counted_blocks(interpreter, num_levels):
    """By its definition; over more blocks than one program adds up, some not counted, the last one short."""
    kv_block_size, length = 16, 16 * 20 + 7
    _, key, value = make_inputs(Case(torch.float32, 16, length, length, heads=2))
    counted = (torch.arange(21) % 5 != 3).expand(1, 2, 21)
    matrix, factors = interpreter.call(
        "tests.triton.interpreted_checks", "covariance", key, value, kv_block_size, num_levels, counted.to(torch.uint8)
    )
    kept = counted[0, 0].repeat_interleave(kv_block_size)[:length]
    for head in range(2):
        tokens = [tensor[0, :, head].double() for tensor in (key, value)]
        sizes = [2**level for level in range(1, num_levels)] + [kv_block_size]
        lost = []
        for size in sizes:
            key_gap, value_gap = (
                torch.cat([group - group.mean(0) for group in tensor.split(size)])[kept] for tensor in tokens
            )
            lost.append(value_gap.T @ key_gap / kept.sum())
        shares = torch.stack([(level * lost[-1]).sum() / lost[-1].square().sum() for level in lost]).clamp(0, 1)
        scale = lost[-1].abs().max()
        torch.testing.assert_close(matrix[0, head].double() * scale, lost[-1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(factors[0, head, 1:].double(), shares * scale, rtol=1e-4, atol=1e-5)
        assert factors[0, head, 0] == 0


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
