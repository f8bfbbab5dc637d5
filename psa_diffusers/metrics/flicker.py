"""Temporal flicker: changes from frame to frame that are not in the reference."""

from __future__ import annotations

import numpy as np

from .video_io import check_pair


def temporal_flicker(reference: np.ndarray, video: np.ndarray) -> float | None:
    """Mean absolute difference of the frame differences, in steps of 255; 0 = every change is the reference's.

    A still error (a shifted background, say) does not count; one that comes and goes does.

    Args:
        reference, video: uint8 [frames, height, width, 3], of one shape.

    Returns:
        The mean over the changes, pixels and channels; None for a single frame, which has no change.
    """
    changes = flicker_of_changes(reference, video)
    return float(np.mean(changes)) if changes else None


def flicker_of_changes(reference: np.ndarray, video: np.ndarray) -> list[float]:
    """The same for the change to each frame but the first: [frames - 1]."""
    reference, video = check_pair(reference, video)
    flicker, before = [], None
    for a, b in zip(reference, video, strict=True):  # (b1 - b0) - (a1 - a0) = (b1 - a1) - (b0 - a0)
        error = b.astype(np.int16) - a
        if before is not None:
            flicker.append(float(np.abs(error - before).mean()))
        before = error
    return flicker
