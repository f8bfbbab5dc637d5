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
    reference, video = check_pair(reference, video)
    # Frame by frame in float64: exact sums without a float copy of the whole video.
    pairs = zip(reference, video, strict=True)
    squared = sum(float(np.square(a.astype(np.float64) - b).sum()) for a, b in pairs)
    return math.inf if squared == 0 else 10 * math.log10(255.0**2 * reference.size / squared)
