"""A dense and a sparse video of the same noise, beside each other: as a picture and as figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..metrics import lpips, psnr, ssim
from ..metrics.video_io import check_pair


def side_by_side(left: np.ndarray, right: np.ndarray, labels: tuple[str, str]) -> np.ndarray:
    """Two videos in one, each under a bar with its label.

    Args:
        left, right: uint8 [frames, height, width, 3], of one shape.
        labels: What to write above each.

    Returns:
        uint8 [frames, height + bar, 2 * width, 3]; an even bar keeps the height even.
    """
    left, right = check_pair(left, right)
    width = left.shape[2]
    bar = np.concatenate([_label(text, width) for text in labels], axis=1)
    bars = np.broadcast_to(bar, (len(left), *bar.shape))
    return np.concatenate([bars, np.concatenate([left, right], axis=2)], axis=1)


def _label(text: str, width: int) -> np.ndarray:
    """A dark bar with the text, made smaller until it fits: uint8 [bar, width, 3]."""
    size = max(10, min(28, width // 14))
    height = (size * 3 // 2 + 1) // 2 * 2
    while size > 6 and ImageFont.load_default(size).getlength(text) > width - 4:
        size -= 1
    picture = Image.new("RGB", (width, height), (24, 24, 24))
    draw = ImageDraw.Draw(picture)
    draw.text((width / 2, height / 2), text, fill=(240, 240, 240), font=ImageFont.load_default(size), anchor="mm")
    return np.asarray(picture)


def compare_videos(reference: np.ndarray, video: np.ndarray, lpips_weights: str | Path | None = None) -> dict[str, Any]:
    """PSNR, SSIM and LPIPS of a video against a reference, as JSON values.

    JSON has no infinity: identical videos give ``psnr: null`` and ``identical: true``. Where LPIPS cannot be had it is
    null with ``lpips_reason``.
    """
    ratio = psnr(reference, video)
    distance = lpips(reference, video, lpips_weights)
    values = {
        "psnr": None if math.isinf(ratio) else ratio,
        "identical": math.isinf(ratio),
        "ssim": ssim(reference, video),
        "lpips": distance.value,
        "lpips_reason": distance.reason,
    }
    if distance.invalid_value is not None:
        values["lpips_with_other_weights_invalid"] = distance.invalid_value
    return values
