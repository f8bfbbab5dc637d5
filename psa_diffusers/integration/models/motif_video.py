"""Motif-Video: video first, then image and text; the decoder's blocks see the video twice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..tokens import NO_GRID, TokenLayout, padded_at_the_end, real_counts
from .row import ModelRow, latent_grid, single_after_dual


def _layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout | str:
    grid = latent_grid(model, arguments)
    image, mask = arguments["image_embeds"], arguments["encoder_attention_mask"]
    if grid is None:
        return NO_GRID
    frames, height, width = grid
    decoder = TokenLayout((2 * frames, height, width))  # the decoder's video, then the encoder's
    others = 0 if image is None else image.shape[1]
    after = others + arguments["encoder_hidden_states"].shape[1]
    if mask is None:
        return TokenLayout(grid, after=after, elsewhere=decoder)
    if not padded_at_the_end(mask):
        return "padding before the end of the text"
    lengths = math.prod(grid) + others + real_counts(mask)
    return TokenLayout(grid, after=after, key_lengths=lengths, padding_of=(mask,), elsewhere=decoder)


MOTIF_VIDEO = ModelRow(
    title="Motif-Video (T2V, I2V)",
    transformers=("MotifVideoTransformer3DModel",),
    natives=("MotifVideoAttnProcessor2_0",),
    attention=r"(single_)?transformer_blocks\.\d+\.attn",
    layout=_layout,
    layer=single_after_dual,
    sparse="joint attention of all blocks, the decoder's too; text cross-attention stays dense",
    text="last, after the image; padding is masked, and dense if it is not at the end",
    grid="latents [B, C, T, H, W] / patch",
    presets=("motif-video",),
)
