"""Peak signal-to-noise ratio of a video."""

from __future__ import annotations

import math

import numpy as np

from .video_io import check_pair


def psnr(reference: np.ndarray, video: np.ndarray) -> float:
    """PSNR in dB, from the mean squared error over all frames, pixels and channels; higher is closer.

    Args:
        reference, video: uint8 [frames, height, width, 3], of one shape.

    Returns:
        ``10 log10(255^2 / mse)``; ``math.inf`` for identical videos.
    """
    squared = _squared_errors(reference, video)
    return _decibels(math.fsum(squared), np.asarray(reference).size)


def psnr_of_frames(reference: np.ndarray, video: np.ndarray) -> list[float]:
    """PSNR in dB of every frame by itself; ``math.inf`` for identical frames. Arguments as for :func:`psnr`."""
    size = np.asarray(reference)[0].size
    return [_decibels(error, size) for error in _squared_errors(reference, video)]


def _squared_errors(reference: np.ndarray, video: np.ndarray) -> list[float]:
    """The sum of squared differences of each frame."""
    reference, video = check_pair(reference, video)
    # Frame by frame in float64: exact sums without a float copy of the whole video.
    pairs = zip(reference, video, strict=True)
    return [float(np.square(a.astype(np.float64) - b).sum()) for a, b in pairs]


def _decibels(squared: float, size: int) -> float:
    return math.inf if squared == 0 else 10 * math.log10(255.0**2 * size / squared)
