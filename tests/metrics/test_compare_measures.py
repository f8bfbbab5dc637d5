"""Measures of frames, flicker, intervals, the lossless file."""

from __future__ import annotations

import math

import numpy as np
import pytest

from psa_diffusers.metrics import (
    flicker_of_changes,
    mean_with_interval,
    psnr,
    psnr_of_frames,
    read_video,
    ssim,
    ssim_of_frames,
    temporal_flicker,
    write_lossless,
)
from psa_diffusers.report.measures import FULL_SCALE, difference_video, heat_colours, measure_clip


@pytest.fixture
def pair():
    """Two videos [5, 24, 32, 3] that differ a little, but for the second frame."""
    generator = np.random.default_rng(0)
    first = generator.integers(0, 256, (5, 24, 32, 3), dtype=np.uint8)
    second = (first.astype(int) + generator.integers(-9, 10, first.shape)).clip(0, 255).astype(np.uint8)
    second[1] = first[1]
    return first, second


def test_frames_by_themselves(pair):
    values = psnr_of_frames(*pair)
    assert values[1] == math.inf
    for i in (0, 2, 3, 4):
        assert values[i] == psnr(pair[0][i : i + 1], pair[1][i : i + 1])
    errors = [0 if math.isinf(value) else 10 ** (-value / 10) for value in values]
    assert psnr(*pair) == pytest.approx(-10 * math.log10(np.mean(errors)))
    structure = ssim_of_frames(*pair)
    assert structure[1] == pytest.approx(1) and np.mean(structure) == pytest.approx(ssim(*pair))


def test_flicker_counts_errors_that_come_and_go(pair):
    first, second = pair
    assert temporal_flicker(first, first) == 0
    darker = (first // 2).astype(np.uint8)
    assert temporal_flicker(darker, darker + 7) == 0  # a still error
    blinking = darker.copy()
    blinking[::2] += 10
    assert temporal_flicker(darker, blinking) == 10  # every change is off by ten
    changes = np.diff(second.astype(int), axis=0) - np.diff(first.astype(int), axis=0)
    assert flicker_of_changes(first, second) == pytest.approx(np.abs(changes).mean((1, 2, 3)))
    assert temporal_flicker(first[:1], second[:1]) is None
    with pytest.raises(ValueError, match="one shape"):
        temporal_flicker(first, second[:2])


def test_a_clip_as_json_values(pair):
    values = measure_clip(*pair)
    assert values["frames"]["psnr"][1] is None and values["frames"]["flicker"][0] is None
    assert [len(values["frames"][name]) for name in ("psnr", "ssim", "flicker")] == [5, 5, 5]
    same = measure_clip(pair[0], pair[0])
    assert same["psnr"] is None and same["identical"] and same["ssim"] == 1 and same["flicker"] == 0
    assert measure_clip(pair[0][:1], pair[1][:1])["flicker"] is None


def test_intervals_hold_the_mean_and_shrink_with_more_prompts():
    generator = np.random.default_rng(0)
    few, many = generator.normal(30, 2, 8), generator.normal(30, 2, 200)
    for numbers in (few, many):
        mean = mean_with_interval(numbers)
        assert mean.low < mean.value < mean.high and mean.value == pytest.approx(numbers.mean())
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * 2 / 200**0.5, rel=0.15)  # of the mean of 200 normals
    wide = mean_with_interval(many, confidence=0.99)
    assert wide.low < mean.low and wide.high > mean.high
    assert mean_with_interval(many) == mean  # drawn from a seed


def test_seeds_of_a_prompt_are_one_group():
    groups = ["a"] * 50 + ["b", "c", "d"]
    values = [1.0] * 50 + [2.0, 3.0, 6.0]
    mean = mean_with_interval(values, groups)
    assert mean.value == 3 and (mean.count, mean.groups) == (53, 4)
    assert mean.high - mean.low > 1  # fifty seeds of one prompt do not narrow it


def test_too_few_numbers_give_no_interval():
    assert mean_with_interval([]).value is None and "nothing" in mean_with_interval([None]).reason
    two = mean_with_interval([1.0, None, 3.0])
    assert (two.value, two.low, two.count) == (2, None, 2) and "at least 3 prompts" in two.reason
    same = mean_with_interval([2.0] * 4)
    assert (same.low, same.high) == (2, 2)
    with pytest.raises(ValueError, match="must be finite"):
        mean_with_interval([1.0, math.inf])
    with pytest.raises(ValueError, match="confidence must be in"):
        mean_with_interval([1.0], confidence=1.0)


def test_lossless_files_give_back_every_bit(pair, tmp_path):
    for video in (pair[0], pair[0][:, :23, :31]):
        write_lossless(tmp_path / "video.mkv", video, 8)
        assert np.array_equal(read_video(tmp_path / "video.mkv"), video)
    with pytest.raises(ValueError, match="fps must be above 0"):
        write_lossless(tmp_path / "video.mkv", pair[0], 0)
    assert [file.name for file in tmp_path.iterdir()] == ["video.mkv"]


def test_the_heat_map_is_black_where_nothing_differs_and_brightest_at_full_scale():
    first = np.zeros((1, 2, 3, 3), np.uint8)
    second = first.copy()
    second[0, 0, 0], second[0, 0, 1] = FULL_SCALE, 255
    heat, table = difference_video(first, second), heat_colours()
    assert np.array_equal(heat[0, 0, 0], table[255]) and np.array_equal(heat[0, 0, 1], table[255])
    assert not heat[0, 1].any()
    luminance = table @ [0.299, 0.587, 0.114]
    assert (np.diff(luminance) >= 0).all()
