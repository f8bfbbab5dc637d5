"""The demo model's VAE: configuration, initialisation, and a whole-clip forward pass for training.

Diffusers encodes and decodes Wan videos in chunks of four frames with cached features. The functions here compute the
same values in one pass over the clip, without the final clamp, so that training is fast and gradients flow everywhere.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
    patchify,
    unpatchify,
)
from torch import nn

CONFIG = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}


def build_vae() -> AutoencoderKLWan:
    """A new VAE whose residual branches start small (the default initialisation does not train)."""
    vae = AutoencoderKLWan(**CONFIG)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, WanResidualBlock):
                module.conv2.weight *= 0.1
            elif isinstance(module, WanAttentionBlock):
                module.proj.weight *= 0.1
        vae.encoder.conv_out.weight *= 0.5
        vae.quant_conv.bias[CONFIG["z_dim"] :] = -6.0  # little posterior noise at first
    return vae


def encode(vae: AutoencoderKLWan, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance [batch, z_dim, 1 + t, h, w] of videos [batch, 3, 1 + 4t, 16h, 16w] in -1..1."""
    encoder = vae.encoder
    x = encoder.conv_in(patchify(video, vae.config.patch_size))
    for block in encoder.down_blocks:
        shortcut = block.avg_shortcut(x)
        for resnet in block.resnets:
            x = resnet(x)
        if block.downsampler is not None:
            x = _downsample(block.downsampler, x)
        x = x + shortcut
    x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(encoder.mid_block(x))))
    mean, log_variance = vae.quant_conv(x).chunk(2, dim=1)
    return mean, log_variance.clamp(-30.0, 20.0)


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Videos [batch, 3, 1 + 4t, 16h, 16w], not clamped, of latents [batch, z_dim, 1 + t, h, w]."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        shortcut = None if block.avg_shortcut is None else block.avg_shortcut(x, first_chunk=True)
        for resnet in block.resnets:
            x = resnet(x)
        if block.upsampler is not None:
            x = _upsample(block.upsampler, x)
        if shortcut is not None:
            x = x + shortcut
    x = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    return unpatchify(x, vae.config.patch_size)


def _downsample(layer: WanResample, x: torch.Tensor) -> torch.Tensor:
    x = _each_frame(layer.resample, x)
    if layer.mode == "downsample3d" and x.shape[2] > 1:
        x = torch.cat([x[:, :, :1], layer.time_conv(x)], dim=2)
    return x


def _upsample(layer: WanResample, x: torch.Tensor) -> torch.Tensor:
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        rest = layer.time_conv(x[:, :, 1:])
        batch, channels, frames, height, width = rest.shape
        rest = rest.view(batch, 2, channels // 2, frames, height, width).permute(0, 2, 3, 1, 4, 5)
        x = torch.cat([x[:, :, :1], rest.reshape(batch, channels // 2, 2 * frames, height, width)], dim=2)
    return _each_frame(layer.resample, x)


def _each_frame(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    batch, _, frames = x.shape[:3]
    x = layer(x.transpose(1, 2).flatten(0, 1))
    return x.unflatten(0, (batch, frames)).transpose(1, 2)


def normalised(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Latents as the transformer sees them: zero mean, unit variance in each channel."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return (latents - mean.to(latents)) / std.to(latents)


def count_parameters(module: nn.Module) -> int:
    """Number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def fast_norms() -> None:
    """Replace the VAE's norms in this process by an equal computation with fewer passes over memory."""

    def forward(self: WanRMS_norm, x: torch.Tensor) -> torch.Tensor:
        values = x.float()
        scale = torch.rsqrt(values.square().mean(1, keepdim=True) + 1e-12)
        return (values * scale * self.gamma).to(x.dtype)

    WanRMS_norm.forward = forward
