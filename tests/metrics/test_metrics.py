"""PSNR and SSIM against known values and scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

from psa_diffusers.metrics import psnr, ssim, to_uint8


@pytest.fixture
def video() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)


def noisy(video: np.ndarray, amount: int) -> np.ndarray:
    noise = np.random.default_rng(1).integers(-amount, amount + 1, video.shape)
    return (video.astype(int) + noise).clip(0, 255).astype(np.uint8)


def test_psnr_of_one_grey_step_everywhere_is_48_dB():
    black = np.zeros((2, 8, 8, 3), np.uint8)
    assert psnr(black, black + 1) == pytest.approx(20 * math.log10(255))


def test_psnr_agrees_with_scikit_image(video):
    other = noisy(video, 20)
    assert psnr(video, other) == pytest.approx(peak_signal_noise_ratio(video, other, data_range=255))


def test_identical_videos_have_infinite_psnr_and_ssim_one(video):
    assert psnr(video, video.copy()) == math.inf
    assert ssim(video, video.copy()) == pytest.approx(1.0)


def test_ssim_falls_with_the_noise(video):
    assert 1 > ssim(video, noisy(video, 5)) > ssim(video, noisy(video, 60)) > 0


def test_ssim_is_the_mean_over_the_frames(video):
    other = video.copy()
    other[0] = 255 - other[0]
    each = [ssim(video[i : i + 1], other[i : i + 1]) for i in range(3)]
    assert ssim(video, other) == pytest.approx(np.mean(each))


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_videos_of_two_shapes_are_refused(metric, video):
    with pytest.raises(ValueError, match="one shape"):
        metric(video, video[:2])


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_float_videos_are_refused(metric, video):
    with pytest.raises(ValueError, match=r"uint8 \[frames, height, width, 3\]"):
        metric(video, video / 255)


def test_ssim_refuses_frames_smaller_than_its_window(video):
    with pytest.raises(ValueError, match="at least 11"):
        ssim(video[:, :8], video[:, :8])


def test_to_uint8_rounds_and_clips():
    frames = np.array([-0.5, 0.0, 0.5, 0.999, 1.0, 2.0]).reshape(1, 1, 2, 3)
    assert to_uint8(frames).flatten().tolist() == [0, 0, 128, 255, 255, 255]


def test_to_uint8_refuses_nan():
    with pytest.raises(ValueError, match="finite"):
        to_uint8(np.full((1, 2, 2, 3), np.nan))
