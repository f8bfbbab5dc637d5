"""HunyuanVideo and its kin: video first, then text, in one sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..tokens import NO_GRID, TokenLayout, real_counts
from .row import ModelRow, latent_grid, single_after_dual

JOINT = r"(single_)?transformer_blocks\.\d+\.attn"


def _layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout | str:
    grid, mask = latent_grid(model, arguments), arguments["encoder_attention_mask"]
    if grid is None:
        return NO_GRID
    # The model counts the real text tokens and takes them to come first, whatever the mask looks like.
    lengths = math.prod(grid) + real_counts(mask)
    return TokenLayout(grid, after=arguments["encoder_hidden_states"].shape[1], key_lengths=lengths, padding_of=(mask,))


# -- Framepack ----------------------------------------------------------------------------------------------------

# The history that a forward may be given, by name, and the patches that it is cut into (padded to whole ones).
_HISTORY = {
    "latents_clean": ("indices_latents_clean", (1, 2, 2)),
    "latents_history_2x": ("indices_latents_history_2x", (2, 4, 4)),
    "latents_history_4x": ("indices_latents_history_4x", (4, 8, 8)),
}


def _history_tokens(arguments: Mapping[str, Any]) -> int:
    count = 0
    for name, (indices, patch) in _HISTORY.items():
        latents = arguments.get(name)
        if latents is None or arguments.get(indices) is None:
            continue
        # Only the strongly pooled ones are padded; what is not padded is cut.
        rounded = math.floor if name == "latents_clean" else math.ceil
        count += math.prod(rounded(size / cut) for size, cut in zip(latents.shape[2:], patch, strict=True))
    return count


def _framepack_layout(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout | str:
    grid, mask, before = latent_grid(model, arguments), arguments["encoder_attention_mask"], _history_tokens(arguments)
    if grid is None:
        return NO_GRID
    image = arguments["image_embeds"].shape[1]
    after = image + arguments["encoder_hidden_states"].shape[1]
    if len(mask) == 1:  # padded text is cut off
        return TokenLayout(grid, before, after, after_varies=True)
    lengths = before + math.prod(grid) + image + real_counts(mask)
    return TokenLayout(grid, before, after, key_lengths=lengths, padding_of=(mask,))


# -- 1.5 ----------------------------------------------------------------------------------------------------------


def _layout_15(model: nn.Module, arguments: Mapping[str, Any]) -> TokenLayout | str:
    grid, image = latent_grid(model, arguments), arguments["image_embeds"]
    if grid is None:
        return NO_GRID
    # The model sorts its three conditions so that what is real comes first. Text-to-video gives zeros for an image, and
    # the model masks them.
    texts = [arguments["encoder_hidden_states"], arguments["encoder_hidden_states_2"]]
    masks = [arguments["encoder_attention_mask"], arguments["encoder_attention_mask_2"]]
    after = image.shape[1] + sum(text.shape[1] for text in texts)
    lengths = math.prod(grid) + image.shape[1] * (image != 0).any() + sum(real_counts(mask) for mask in masks)
    return TokenLayout(grid, after=after, key_lengths=lengths, padding_of=(image, *masks))


HUNYUAN_VIDEO = ModelRow(
    title="HunyuanVideo (T2V, I2V)",
    transformers=("HunyuanVideoTransformer3DModel",),
    natives=("HunyuanVideoAttnProcessor2_0",),
    attention=JOINT,
    layout=_layout,
    layer=single_after_dual,
    sparse="joint attention of all blocks; the token refiner stays dense",
    text="last, padded; padding is masked",
    grid="latents [B, C, T, H, W] / patch",
    presets=("hunyuan-video",),
)

FRAMEPACK = ModelRow(
    title="HunyuanVideo-Framepack",
    transformers=("HunyuanVideoFramepackTransformer3DModel",),
    natives=("HunyuanVideoAttnProcessor2_0",),
    attention=JOINT,
    layout=_framepack_layout,
    layer=single_after_dual,
    sparse="joint attention of all blocks; the token refiner stays dense",
    text="history first; image and text last, padding cut off (batch 1) or masked",
    grid="latents [B, C, T, H, W] / patch",
    presets=("hunyuan-video-framepack",),
)

HUNYUAN_VIDEO_15 = ModelRow(
    title="HunyuanVideo-1.5 (T2V, I2V)",
    transformers=("HunyuanVideo15Transformer3DModel",),
    natives=("HunyuanVideo15AttnProcessor2_0",),
    attention=JOINT,
    layout=_layout_15,
    sparse="joint attention of all blocks; the token refiner stays dense",
    text="last: image, glyph and text tokens, the real ones first; padding is masked",
    grid="latents [B, C, T, H, W] / patch",
    presets=("hunyuan-video-1-5",),
)
