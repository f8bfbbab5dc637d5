"""Flow matching as diffusers' flow schedulers expect it.

x = (1 - sigma) * clean + sigma * noise, velocity = noise - clean, timestep = 1000 * sigma.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from wan_transformer import TrainingAttention, encode_text


class TextToVideo(nn.Module):
    """Transformer and text encoder together, the way WanPipeline chains them."""

    def __init__(self, transformer: nn.Module, text_encoder: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder

    def forward(self, latents, sigma, prompts, tokenizer, attention: TrainingAttention) -> torch.Tensor:
        """Velocity [batch, channels, t, h, w] of noised latents at sigma [batch]."""
        embeddings, attention.text_bias = encode_text(self.text_encoder, tokenizer, prompts)
        return self.transformer(latents, sigma * 1000, embeddings, return_dict=False)[0]


def shifted(sigma: torch.Tensor, shift: float) -> torch.Tensor:
    """Move noise levels towards 1, as the schedulers' `shift` / `flow_shift` does."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def shift_for(tokens: int) -> float:
    """More tokens show the same content through more noise: shift grows with the square root of their number."""
    return 5.0 * (tokens / 4352) ** 0.5


def flow_loss(model: TextToVideo, clean: torch.Tensor, prompts: list[str], tokenizer, attention) -> torch.Tensor:
    """Mean squared error of the velocity: [batch], for normalised clean latents."""
    batch = len(clean)
    # stratified over the batch, so that every step sees all noise levels
    uniform = (torch.arange(batch, device=clean.device) + torch.rand(batch, device=clean.device)) / batch
    sigma = shifted(uniform.clamp(1e-3, 1 - 1e-4), shift_for(clean[0, 0].numel()))
    noise = torch.randn_like(clean)
    level = sigma.view(-1, 1, 1, 1, 1)
    noised = (1 - level) * clean + level * noise
    with torch.autocast(clean.device.type, dtype=torch.bfloat16):
        velocity = model(noised, sigma, prompts, tokenizer, attention)
    return F.mse_loss(velocity.float(), noise - clean, reduction="none").mean((1, 2, 3, 4))


@torch.no_grad()
def sample(model: TextToVideo, prompts, grid, tokenizer, attention, steps=16, guidance=3.0, seed=0) -> torch.Tensor:
    """Normalised latents [batch, channels, *grid] drawn with Euler steps and classifier-free guidance."""
    generator = torch.Generator().manual_seed(seed)
    channels = model.transformer.config.in_channels
    latents = torch.randn(len(prompts), channels, *grid, generator=generator)
    shift = shift_for(latents[0, 0].numel())
    levels = shifted(torch.linspace(1, 0, steps + 1), shift)
    for level, following in pairwise(levels):
        sigma = level.expand(2 * len(prompts))
        both = [*prompts, *[""] * len(prompts)]
        with torch.autocast(latents.device.type, dtype=torch.bfloat16):
            velocity = model(latents.repeat(2, 1, 1, 1, 1), sigma, both, tokenizer, attention).float()
        asked, free = velocity.chunk(2)
        latents = latents + (following - level) * (free + guidance * (asked - free))
    return latents
