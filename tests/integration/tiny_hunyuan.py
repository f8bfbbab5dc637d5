"""Tiny transformers of HunyuanVideo's kind: video first, then padded text."""

from __future__ import annotations

import math
from typing import Any

import torch

from .tiny_parts import REAL, TEXT, Grid, Tiny, noise, overwrite, padding_mask

# -- HunyuanVideo -------------------------------------------------------------------------------------------------

HUNYUAN = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    num_single_layers=1,
    num_refiner_layers=1,
    patch_size=2,
    patch_size_t=1,
    text_embed_dim=16,
    pooled_projection_dim=8,
    rope_axes_dim=(4, 4, 4),
)


def hunyuan(grid: Grid, batch: int, mask_dtype=torch.long) -> dict[str, Any]:
    frames, height, width = grid
    return dict(
        hidden_states=noise(batch, 4, frames, 2 * height, 2 * width),
        timestep=torch.full((batch,), 500.0),
        encoder_hidden_states=noise(batch, TEXT, 16),
        encoder_attention_mask=padding_mask(REAL, TEXT, batch, mask_dtype),
        pooled_projections=noise(batch, 8),
        guidance=torch.full((batch,), 6000.0),
    )


def hunyuan_i2v(grid: Grid, batch: int) -> dict[str, Any]:
    inputs = hunyuan(grid, batch)
    del inputs["guidance"]
    return inputs


IMAGE = 3  # tokens


def history(grid: Grid) -> int:
    """Tokens of 2 frames, of 3 in pairs at half the size, and of 5 in fours at a quarter, all rounded up."""
    _, height, width = grid
    quarters = math.ceil(height / 4) * math.ceil(width / 4)
    return 2 * height * width + 2 * math.ceil(height / 2) * math.ceil(width / 2) + 2 * quarters


def framepack(grid: Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return hunyuan(grid, batch) | dict(
        image_embeds=noise(batch, IMAGE, 10),
        indices_latents=torch.arange(frames),
        latents_clean=noise(batch, 4, 2, 2 * height, 2 * width),
        indices_latents_clean=torch.arange(2),
        latents_history_2x=noise(batch, 4, 3, 2 * height, 2 * width),
        indices_latents_history_2x=torch.arange(3),
        latents_history_4x=noise(batch, 4, 5, 2 * height, 2 * width),
        indices_latents_history_4x=torch.arange(5),
    )


HUNYUAN_TEXT = overwrite(("encoder_hidden_states", "encoder_attention_mask"))
HUNYUAN_15 = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    num_refiner_layers=1,
    patch_size=1,
    patch_size_t=1,
    text_embed_dim=16,
    text_embed_2_dim=14,
    image_embed_dim=10,
    rope_axes_dim=(4, 4, 4),
    target_size=16,
    task_type="i2v",
)


def hunyuan_15(grid: Grid, batch: int, image: bool = True) -> dict[str, Any]:
    return dict(
        hidden_states=noise(batch, 4, *grid),
        timestep=torch.full((batch,), 500.0),
        encoder_hidden_states=noise(batch, TEXT, 16),
        encoder_attention_mask=padding_mask(REAL, TEXT, batch, torch.long),
        encoder_hidden_states_2=noise(batch, 5, 14),
        encoder_attention_mask_2=padding_mask((2, 4), 5, batch, torch.long),
        image_embeds=noise(batch, IMAGE, 10) * image,
    )


HUNYUAN_15_TEXT = overwrite(
    ("encoder_hidden_states", "encoder_attention_mask"), ("encoder_hidden_states_2", "encoder_attention_mask_2")
)


# -- Motif-Video ----------------------------------------------------------------------------------------------------

MOTIF = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=1,
    num_single_layers=3,
    num_decoder_layers=0,
    mlp_ratio=2.0,
    text_embed_dim=16,
    rope_axes_dim=(4, 4, 4),
)


def motif(grid: Grid, batch: int, image: bool = False, masked: bool = True) -> dict[str, Any]:
    inputs = hunyuan(grid, batch)
    names = ("hidden_states", "timestep", "encoder_hidden_states", *(("encoder_attention_mask",) if masked else ()))
    inputs = {name: inputs[name] for name in names}
    return inputs | (dict(image_embeds=noise(batch, IMAGE, 10)) if image else {})


# -- the table -------------------------------------------------------------------------------------------------------

HUNYUAN_LIKE = {
    "hunyuan": Tiny(
        "HunyuanVideoTransformer3DModel",
        HUNYUAN,
        hunyuan,
        calls=3,
        after=TEXT,
        real=REAL,
        change_padding=HUNYUAN_TEXT,
    ),
    "hunyuan-i2v": Tiny(
        "HunyuanVideoTransformer3DModel",
        HUNYUAN | dict(guidance_embeds=False, image_condition_type="token_replace"),
        hunyuan_i2v,
        calls=3,
        after=TEXT,
        real=REAL,
        change_padding=HUNYUAN_TEXT,
    ),
    "framepack": Tiny(
        "HunyuanVideoFramepackTransformer3DModel",
        HUNYUAN | dict(has_image_proj=True, image_proj_dim=10, has_clean_x_embedder=True),
        framepack,
        calls=3,
        before=history,
        after=IMAGE + TEXT,
        real=tuple(IMAGE + real for real in REAL),
        batch_of_samples=False,
        change_padding=HUNYUAN_TEXT,
    ),
    "hunyuan-1.5": Tiny(
        "HunyuanVideo15Transformer3DModel",
        HUNYUAN_15,
        hunyuan_15,
        calls=2,
        after=IMAGE + TEXT + 5,
        real=(IMAGE + 6 + 2, IMAGE + 3 + 4),
        change_padding=HUNYUAN_15_TEXT,
    ),
    "hunyuan-1.5-t2v": Tiny(
        "HunyuanVideo15Transformer3DModel",
        HUNYUAN_15,
        lambda grid, batch: hunyuan_15(grid, batch, image=False),
        calls=2,
        after=IMAGE + TEXT + 5,
        real=(6 + 2, 3 + 4),
        change_padding=HUNYUAN_15_TEXT,
    ),
    "motif": Tiny(
        "MotifVideoTransformer3DModel", MOTIF, motif, calls=4, after=TEXT, real=REAL, change_padding=HUNYUAN_TEXT
    ),
    "motif-i2v": Tiny(
        "MotifVideoTransformer3DModel",
        MOTIF
        | dict(image_embed_dim=10, enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True),
        lambda grid, batch: motif(grid, batch, image=True),
        calls=4,
        after=IMAGE + TEXT,
        real=tuple(IMAGE + real for real in REAL),
        change_padding=HUNYUAN_TEXT,
    ),
    "motif-unmasked": Tiny(
        "MotifVideoTransformer3DModel", MOTIF, lambda grid, batch: motif(grid, batch, masked=False), calls=4, after=TEXT
    ),
}
