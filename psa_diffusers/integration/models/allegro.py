"""Allegro: video alone, text by cross-attention."""

from .row import ModelRow, video_alone

ALLEGRO = ModelRow(
    title="Allegro",
    transformers=("AllegroTransformer3DModel",),
    natives=("AllegroAttnProcessor2_0",),
    attention=r"transformer_blocks\.\d+\.attn1",
    layout=video_alone,
    sparse="`attn1`",
    text="cross-attention",
    grid="latents [B, C, T, H, W] / patch",
    presets=("allegro",),
)
