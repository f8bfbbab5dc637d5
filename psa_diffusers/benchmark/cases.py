"""What a benchmark measures: sizes by number or by the name of a model."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import PSAConfig


@dataclass(frozen=True)
class Shape:
    """One self-attention call of a model at its usual size: latent grid in tokens, text tokens beside it, heads."""

    grid: tuple[int, int, int]
    heads: int
    head_dim: int
    text_tokens: int = 0


SHAPES = {
    "wan2.1-1.3b-480p": Shape((21, 30, 52), 12, 128),  # 81 frames of 480x832
    "wan2.1-14b-720p": Shape((21, 45, 80), 40, 128),  # 81 frames of 720x1280
    "cogvideox-5b": Shape((13, 30, 45), 48, 64, text_tokens=226),  # 49 frames of 480x720
    "hunyuan-720p": Shape((33, 45, 80), 24, 128, text_tokens=256),  # 129 frames of 720x1280
}


@dataclass(frozen=True)
class BenchCase:
    """What one row of a benchmark measures."""

    grid: tuple[int, int, int]
    config: PSAConfig
    batch: int = 1
    heads: int = 4
    head_dim: int = 64
    text_tokens: int = 0  # beside the grid, read in full
    dtype: str = "float32"
    device: str = "cpu"
    seed: int = 0

    @property
    def tokens(self) -> int:
        frames, height, width = self.grid
        return frames * height * width + self.text_tokens

    @property
    def full_tokens(self) -> slice | None:
        """Where the text lies: after the video."""
        return slice(self.tokens - self.text_tokens, self.tokens) if self.text_tokens else None

    @property
    def dense_flops(self) -> int:
        """Floating-point operations of the two matrix products of dense attention."""
        return 4 * self.batch * self.heads * self.head_dim * self.tokens**2


def grid_of(tokens: int) -> tuple[int, int, int]:
    """A grid (frames, height, width) of that many tokens, as near to a quarter as many frames as rows as can be."""

    def unevenness(grid: tuple[int, int, int]) -> float:
        frames, height, width = grid
        return max(4 * frames / height, height / (4 * frames)) * width / height

    divisors = [size for size in range(1, tokens + 1) if tokens % size == 0]
    grids = [
        (tokens // (height * width), height, width)
        for height in divisors
        for width in divisors
        if width >= height and tokens % (height * width) == 0
    ]
    return min(grids, key=unevenness)
