"""Cosmos: video alone, text by cross-attention."""

from .row import ModelRow, video_alone

COSMOS = ModelRow(
    title="Cosmos 1, Predict 2 and 2.5, Transfer 2.5",
    transformers=("CosmosTransformer3DModel",),
    natives=("CosmosAttnProcessor2_0",),
    attention=r"transformer_blocks\.\d+\.attn1",
    layout=video_alone,
    sparse="`attn1`; a ControlNet stays dense",
    text="cross-attention",
    grid="latents [B, C, T, H, W] / patch",
    presets=("cosmos",),
)

COSMOS_3 = ModelRow(
    title="Cosmos 3",
    transformers=("Cosmos3OmniTransformer",),
    dense="its video queries read text and video keys that are not one sequence with them, by grouped heads",
)
