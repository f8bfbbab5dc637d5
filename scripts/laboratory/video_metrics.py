"""PSNR and SSIM of :mod:`psa_diffusers.metrics` for batches of videos, computed on the device that holds them."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

SIGMA, RADIUS = 1.5, 5  # scikit-image's window for Wang et al. 2004: cut at 3.5 sigma
STABILITY = ((0.01 * 255) ** 2, (0.03 * 255) ** 2)


def psnr_of_videos(reference: Tensor, video: Tensor) -> list[float]:
    """dB of every video of uint8 [batch, frames, height, width, 3]; inf where it is the reference."""
    squared = (reference.int() - video.int()).square().flatten(1).sum(1).tolist()
    size = reference[0].numel()
    return [10 * math.log10(255**2 * size / error) if error else math.inf for error in squared]


def ssim_of_videos(reference: Tensor, video: Tensor) -> list[float]:
    """Mean SSIM over frames and channels of every video of uint8 [batch, frames, height, width, 3]."""
    return [float(_ssim(a, b)) for a, b in zip(reference, video, strict=True)]


def _ssim(reference: Tensor, video: Tensor) -> Tensor:
    """float64 scalar. As in scikit-image, the map is averaged where the window lies inside the picture."""
    x, y = (frames.permute(0, 3, 1, 2).double() for frames in (reference, video))
    mean_x, mean_y = _smooth(x), _smooth(y)
    variance_x = _smooth(x * x) - mean_x * mean_x
    variance_y = _smooth(y * y) - mean_y * mean_y
    covariance = _smooth(x * y) - mean_x * mean_y
    c1, c2 = STABILITY
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return (top / ((mean_x * mean_x + mean_y * mean_y + c1) * (variance_x + variance_y + c2))).mean()


def _smooth(pictures: Tensor) -> Tensor:
    """float64 [..., height, width] to [..., height - 10, width - 10]: the window, as products with band matrices."""
    rows, columns = (_band(size, str(pictures.device)) for size in pictures.shape[-2:])
    return rows.T @ (pictures @ columns)


@lru_cache(maxsize=8)
def _band(size: int, device: str) -> Tensor:
    """float64 [size, size - 2 RADIUS]: column i holds the window around place i + RADIUS."""
    distance = torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float64)
    window = torch.exp(-0.5 * (distance / SIGMA) ** 2)
    window = window / window.sum()
    band = torch.zeros(size, size - 2 * RADIUS, dtype=torch.float64)
    for place in range(band.shape[1]):
        band[place : place + 2 * RADIUS + 1, place] = window
    return band.to(device)
