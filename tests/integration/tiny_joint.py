"""Tiny transformers whose self-attention sees text or conditioning beside the video, without a mask."""

from __future__ import annotations

from typing import Any

import torch

from .tiny_hunyuan import history
from .tiny_parts import REAL, TEXT, Grid, Tiny, noise, overwrite, padding_mask

# -- CogVideoX ----------------------------------------------------------------------------------------------------

COGVIDEOX = dict(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    time_embed_dim=2,
    text_embed_dim=8,
    num_layers=2,
    sample_width=8,
    sample_height=8,
    sample_frames=8,
    patch_size=2,
    temporal_compression_ratio=4,
    max_text_seq_length=TEXT,
    use_rotary_positional_embeddings=True,
)


def cogvideox(grid: Grid, batch: int, patch_t: int = 1) -> dict[str, Any]:
    frames, height, width = grid
    angles = noise(frames * height * width, 16)
    return dict(
        hidden_states=noise(batch, frames * patch_t, 4, 2 * height, 2 * width),
        encoder_hidden_states=noise(batch, TEXT, 8),
        timestep=torch.full((batch,), 500),
        image_rotary_emb=(angles.cos(), angles.sin()),
    )


CONSISID = COGVIDEOX | dict(
    is_train_face=True,
    cross_attn_interval=1,
    cross_attn_dim_head=8,
    cross_attn_num_heads=2,
    LFE_id_dim=6,
    LFE_vit_dim=6,
    LFE_depth=5,
    LFE_dim_head=8,
    LFE_num_heads=2,
    LFE_num_id_token=1,
    LFE_num_querie=2,
    LFE_output_dim=21,
    LFE_ff_mult=1,
    LFE_num_scale=1,
)


def consisid(grid: Grid, batch: int) -> dict[str, Any]:
    return cogvideox(grid, batch) | dict(id_cond=noise(batch, 6), id_vit_hidden=[noise(batch, 4, 6)])


# -- Mochi -----------------------------------------------------------------------------------------------------------

MOCHI = dict(
    patch_size=2,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    pooled_projection_dim=16,
    in_channels=4,
    out_channels=None,
    text_embed_dim=16,
    time_embed_dim=4,
    max_sequence_length=16,
)


def mochi(grid: Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return dict(
        hidden_states=noise(batch, 4, frames, 2 * height, 2 * width),
        encoder_hidden_states=noise(batch, TEXT, 16),
        timestep=torch.full((batch,), 500),
        encoder_attention_mask=padding_mask(REAL, TEXT, batch),
    )


# -- EasyAnimate -------------------------------------------------------------------------------------

EASYANIMATE = dict(
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    patch_size=2,
    sample_width=8,
    sample_height=8,
    num_layers=2,
    mmdit_layers=1,
    time_embed_dim=2,
    text_embed_dim=16,
)


def easyanimate(grid: Grid, batch: int, t5: int = 0) -> dict[str, Any]:
    frames, height, width = grid
    inputs = dict(
        hidden_states=noise(batch, 4, frames, 2 * height, 2 * width),
        timestep=torch.full((batch,), 500),
        encoder_hidden_states=noise(batch, TEXT, 16),
    )
    return inputs | (dict(encoder_hidden_states_t5=noise(batch, t5, 12)) if t5 else {})


# -- Helios, MiniMax-H3 -------------------------------------------------------------------------------------------

HELIOS = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=32,
    ffn_dim=32,
    num_layers=2,
    rope_dim=(4, 4, 4),
    is_amplify_history=True,
)


def helios(grid: Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    inputs = dict(
        hidden_states=noise(batch, 4, frames, 2 * height, 2 * width),
        timestep=torch.full((batch,), 500),
        encoder_hidden_states=noise(batch, TEXT, 16),
        indices_hidden_states=torch.arange(frames).expand(batch, -1) + 10,
    )
    for name, count in (("short", 2), ("mid", 3), ("long", 5)):
        inputs[f"latents_history_{name}"] = noise(batch, 4, count, 2 * height, 2 * width)
        inputs[f"indices_latents_history_{name}"] = torch.arange(count).expand(batch, -1)
    return inputs


MINIMAX = dict(
    num_attention_heads=2,
    attention_head_dim=12,
    hidden_size=24,
    num_layers=2,
    num_refiner_layers=1,
    ffn_dim=32,
    in_channels=4,
    audio_in_channels=6,
    patch_size=(1, 2, 2),
    text_dim=16,
    freq_dim=32,
    time_embed_hidden_dim=16,
    time_embed_dim=8,
    rope_freq_dim=2,
)
AUDIO = 6


def minimax(grid: Grid, batch: int) -> dict[str, Any]:
    """Text, the keyframe at the begin, audio of two channels, video."""
    frames, height, width = grid
    frame, video = height * width, frames * height * width
    place = torch.cartesian_prod(*(torch.arange(size, dtype=torch.float64) for size in grid))
    place[:, 0] += TEXT
    text = torch.zeros(TEXT, 3, dtype=torch.float64)
    text[:, 0] = torch.arange(TEXT)
    audio = torch.zeros(AUDIO, 3, dtype=torch.float64)
    audio[:, 0] = TEXT + torch.arange(AUDIO // 2).repeat(2)
    audio[:, 2] = torch.arange(2).repeat_interleave(AUDIO // 2)
    places = torch.cat([text, place[:frame], audio, place])
    ends = torch.tensor([TEXT, frame, AUDIO, video]).cumsum(0).tolist()
    tags = torch.tensor([0] * TEXT + [2] * frame + [1] * AUDIO + [2] * video)
    return dict(
        hidden_states=noise(batch, frame + video, 16),
        audio_hidden_states=noise(batch, AUDIO, 6),
        encoder_hidden_states=noise(batch, TEXT, 16),
        timestep=torch.tensor([0.0, 500.0]),
        timestep_indices=(torch.arange(len(places)) >= ends[1]).long(),
        token_tags=tags,
        position_ids=places,
        video_indices=torch.cat([torch.arange(ends[0], ends[1]), torch.arange(ends[2], ends[3])]),
        audio_indices=torch.arange(ends[1], ends[2]),
        text_indices=torch.arange(TEXT),
    )


# -- the table -------------------------------------------------------------------------------------------------------

JOINT = {
    "cogvideox": Tiny("CogVideoXTransformer3DModel", COGVIDEOX, cogvideox, calls=2, before=TEXT),
    "cogvideox-1.5": Tiny(
        "CogVideoXTransformer3DModel",
        COGVIDEOX | dict(patch_size_t=2),
        lambda grid, batch: cogvideox(grid, batch, patch_t=2),
        calls=2,
        before=TEXT,
    ),
    "consisid": Tiny("ConsisIDTransformer3DModel", CONSISID, consisid, calls=2, before=TEXT),
    "mochi": Tiny(
        "MochiTransformer3DModel",
        MOCHI,
        mochi,
        calls=2,
        after=TEXT,
        real=REAL,
        cut=True,
        a_sample=True,
        change_padding=overwrite(("encoder_hidden_states", "encoder_attention_mask")),
    ),
    "easyanimate": Tiny("EasyAnimateTransformer3DModel", EASYANIMATE, easyanimate, calls=2, before=TEXT),
    "easyanimate-t5": Tiny(
        "EasyAnimateTransformer3DModel",
        EASYANIMATE | dict(text_embed_dim_t5=12),
        lambda grid, batch: easyanimate(grid, batch, t5=4),
        calls=2,
        before=TEXT + 4,
    ),
    "helios": Tiny(
        "HeliosTransformer3DModel",
        HELIOS,
        helios,
        calls=2,
        before=history,
    ),
    "minimax": Tiny(
        "MiniMaxH3Transformer3DModel",
        MINIMAX,
        minimax,
        calls=2,
        before=lambda grid: TEXT + grid[1] * grid[2] + AUDIO,
        batch_of_samples=False,
    ),
}
