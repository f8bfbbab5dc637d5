"""A sparse video against its dense reference: every measure, of the clip and of its frames."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from ..metrics import flicker_of_changes, lpips, psnr, psnr_of_frames, ssim_of_frames

MEASURES = ("psnr", "ssim", "lpips", "flicker")
UNITS = {
    "psnr": "PSNR, dB (higher is closer)",
    "ssim": "SSIM (higher is closer)",
    "lpips": "LPIPS (lower is closer)",
    "flicker": "flicker, steps of 255 (lower is closer)",
}
FULL_SCALE = 64  # mean difference of a pixel's channels, of 255, at which the heat-map is at its end


def measure_clip(reference: np.ndarray, video: np.ndarray, lpips_weights: str | Path | None = None) -> dict[str, Any]:
    """PSNR, SSIM, LPIPS and flicker as JSON values: of the clip, and under ``frames`` of every frame.

    JSON has no infinity: the PSNR of an identical clip or frame is null, and ``identical`` says which clips are. Where
    LPIPS cannot be had it is null with ``lpips_reason``. A frame's flicker is that of the change to it; the first has
    none.
    """
    whole = psnr(reference, video)
    structure, changes = ssim_of_frames(reference, video), flicker_of_changes(reference, video)
    distance = lpips(reference, video, lpips_weights)
    return {
        "psnr": _finite(whole),
        "identical": math.isinf(whole),
        "ssim": float(np.mean(structure)),
        "lpips": distance.value,
        "lpips_reason": distance.reason,
        "flicker": float(np.mean(changes)) if changes else None,
        "frames": {
            "psnr": [_finite(value) for value in psnr_of_frames(reference, video)],
            "ssim": structure,
            "lpips": distance.frames,
            "flicker": [None, *changes],
        },
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def difference_video(reference: np.ndarray, video: np.ndarray) -> np.ndarray:
    """A heat-map of the absolute difference, the mean of the channels: black = 0, the brightest ``FULL_SCALE`` or more.

    Returns:
        uint8 [frames, height, width, 3].
    """
    table = heat_colours()
    frames = []
    for a, b in zip(reference, video, strict=True):
        difference = np.abs(b.astype(np.int16) - a).mean(-1) * (255 / FULL_SCALE)
        frames.append(table[difference.round().clip(0, 255).astype(np.uint8)])
    return np.stack(frames)


def heat_colours() -> np.ndarray:
    """uint8 [256, 3]: from black over violet and orange to pale yellow, each lighter than the one before."""
    anchors = [(0, 0, 0), (60, 9, 110), (148, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 200)]
    places = np.linspace(0, 255, len(anchors))
    channels = [np.interp(np.arange(256), places, [anchor[i] for anchor in anchors]) for i in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)
