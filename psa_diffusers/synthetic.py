"""Video-like queries, keys and values without a model: for benchmarks, tests and the comparison of planning rules."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def video_like_qkv(
    batch: int,
    grid: tuple[int, int, int],
    heads: int,
    head_dim: int,
    *,
    correlation: float = 3.0,
    noise: float = 0.3,
    temperature: float = 1.0,
    position: float | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    draw_on: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values with the structure of self-attention over a video's tokens.

    Every feature is a smooth random field over (frames, height, width) plus noise of its own at every token. Queries
    share half of their field with the keys, so that a token attends to its surroundings and to look-alikes further
    away. The heads run from local (fine fields, peaked attention) to global (coarse fields, flat attention).

    Args:
        grid: ``(frames, height, width)`` in tokens.
        correlation: Length, in tokens, over which the fields of the middle head are alike; the first head's is half
            of it, the last head's twice.
        noise: Share of a feature's variance that is noise, in [0, 1]. Higher = less smooth, harder to pool.
        temperature: Divides the logits, whose standard deviation runs from 3 (first head) to 1 (last head) at
            temperature 1. Lower = more peaked attention.
        position: None = no rotary embedding. Else queries and keys get the 3-D rotary embedding of video models (theta
            10000, frames, height and width on a third of the features each), and this share of their variance, in
            [0, 1], is a vector common to all tokens: by it a token attends to what is near, whatever it shows.
        seed: Seed of an own generator; the global random state is untouched.
        draw_on: Where the numbers are drawn and smoothed. On the CPU they are the same for every ``device``; on a GPU
            they are others, and large inputs are there a hundred times sooner.

    Returns:
        query, key, value: [batch, frames * height * width, heads, head_dim] in raster order.
    """
    generator = torch.Generator(draw_on).manual_seed(seed)
    tokens = math.prod(grid)
    query, key, value = (torch.empty(batch, tokens, heads, head_dim, dtype=dtype, device=device) for _ in range(3))
    for head in range(heads):
        locality = 1.0 - 2.0 * head / (heads - 1) if heads > 1 else 0.0  # 1 = local ... -1 = global
        length, spread = correlation * 2.0**-locality, 2.0 + locality
        shared, own, content = (
            _smooth_fields((batch, *grid, head_dim), length, generator).view(batch, tokens, head_dim) for _ in range(3)
        )
        keys = _with_noise(shared, noise, generator)
        queries = _with_noise((shared + own) / math.sqrt(2), noise, generator)
        if position is not None:
            common = torch.randn(head_dim, generator=generator, device=generator.device)
            queries, keys = (
                rotate(math.sqrt(1 - position) * tokens + math.sqrt(position) * common, grid)
                for tokens in (queries, keys)
            )
        key[:, :, head] = keys
        query[:, :, head] = queries * (spread / temperature)
        value[:, :, head] = _with_noise(content, noise, generator)
    return query, key, value


def rotate(tokens: Tensor, grid: tuple[int, int, int], theta: float = 10000.0) -> Tensor:
    """The 3-D rotary embedding of tokens [batch, frames * height * width, head_dim] in raster order.

    Height and width turn ``2 * (head_dim // 6)`` features each, frames the rest, in pairs of neighbours, as in Wan.
    """
    head_dim = tokens.shape[-1]
    side = 2 * (head_dim // 6)
    places = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) for size in grid)).view(-1, 3)
    angles = []
    for axis, features in enumerate((head_dim - 2 * side, side, side)):
        speeds = theta ** -(torch.arange(0, features, 2, dtype=torch.float64) / features)
        angles.append(places[:, axis, None] * speeds)
    turn = torch.polar(torch.ones((), dtype=torch.float64), torch.cat(angles, dim=1)).to(tokens.device, torch.complex64)
    pairs = torch.view_as_complex(tokens.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(tokens.dtype)


def _with_noise(field: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    white = torch.randn(field.shape, generator=generator, device=generator.device)
    return math.sqrt(1 - noise) * field + math.sqrt(noise) * white


def _smooth_fields(shape: tuple[int, ...], length: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise smoothed along the three middle axes, of unit variance at every token."""
    field = torch.randn(shape, generator=generator, device=generator.device)
    for axis in (1, 2, 3):
        places = torch.arange(shape[axis], dtype=torch.float32, device=generator.device)
        kernel = torch.exp(-((places[:, None] - places[None, :]) ** 2) / length**2)
        kernel = kernel / kernel.norm(dim=1, keepdim=True)
        field = torch.tensordot(field, kernel, dims=([axis], [1])).movedim(-1, axis)
    return field.contiguous()
