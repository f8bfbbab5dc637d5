"""Structural similarity of a video."""

from __future__ import annotations

import numpy as np
from skimage.metrics import structural_similarity

from .video_io import check_pair

_WINDOW = 11  # pixels that the Gaussian of sigma 1.5 spans in scikit-image


def ssim(reference: np.ndarray, video: np.ndarray) -> float:
    """Mean SSIM over the frames, in [-1, 1]; 1 = identical.

    Each frame by scikit-image with the settings of Wang et al. 2004 (Gaussian window, sigma 1.5, population
    covariance), on RGB, averaged over channels.

    Args:
        reference, video: uint8 [frames, height, width, 3], of one shape, at least 11 x 11 pixels.
    """
    return float(np.mean(ssim_of_frames(reference, video)))


def ssim_of_frames(reference: np.ndarray, video: np.ndarray) -> list[float]:
    """SSIM of every frame by itself; arguments as for :func:`ssim`."""
    reference, video = check_pair(reference, video)
    if min(reference.shape[1:3]) < _WINDOW:
        raise ValueError(
            f"ssim: height and width must be at least {_WINDOW}, but are {reference.shape[1]} and {reference.shape[2]}."
        )
    settings = dict(channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    return [float(structural_similarity(a, b, **settings)) for a, b in zip(reference, video, strict=True)]
