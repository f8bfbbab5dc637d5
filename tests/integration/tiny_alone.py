"""Tiny transformers whose self-attention sees the video alone, or with frames of a condition."""

from __future__ import annotations

from typing import Any

import torch

from .tiny_parts import REAL, TEXT, Grid, Tiny, noise, overwrite, padding_mask

# -- LTX ---------------------------------------------------------------------------------------------------

LTX = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    cross_attention_dim=16,
    num_layers=2,
    qk_norm="rms_norm_across_heads",
    caption_channels=16,
)


def ltx(grid: Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return dict(
        hidden_states=noise(batch, frames * height * width, 4),
        encoder_hidden_states=noise(batch, TEXT, 16),
        timestep=torch.full((batch,), 500),
        encoder_attention_mask=padding_mask(REAL, TEXT, batch),
        num_frames=frames,
        height=height,
        width=width,
    )


def keyframe(grid: Grid) -> int:
    """Tokens of the one frame that is given as a condition."""
    return grid[1] * grid[2]


def coordinates(grid: Grid, start: float = 0.0) -> torch.Tensor:
    """[3, tokens]: as the condition pipeline numbers them, in seconds and pixels."""
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float32) for size in grid), indexing="ij")
    time, height, width = (axis.flatten() for axis in axes)
    return torch.stack([(time * 8 - 7).clamp(min=0) / 25 + start, height * 32, width * 32])


def ltx_condition(grid: Grid, batch: int) -> dict[str, Any]:
    inputs = ltx(grid, batch)
    for name in ("num_frames", "height", "width"):
        del inputs[name]
    place = torch.cat([coordinates((1, *grid[1:]), start=0.3), coordinates(grid)], 1)
    inputs["hidden_states"] = noise(batch, place.shape[1], 4)
    return inputs | dict(video_coords=place.repeat(batch, 1, 1))


# -- LTX-2 --------------------------------------------------------------------------------------------------------

LTX_2 = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    cross_attention_dim=24,
    audio_in_channels=4,
    audio_out_channels=4,
    audio_num_attention_heads=2,
    audio_attention_head_dim=6,
    audio_cross_attention_dim=12,
    num_layers=2,
    caption_channels=16,
    rope_double_precision=False,
)


def ltx_2(grid: Grid, batch: int, keyframes: int = 0) -> dict[str, Any]:
    inputs = ltx(grid, batch)
    inputs["hidden_states"] = noise(batch, grid[0] * grid[1] * grid[2] + keyframes, 4)
    if keyframes:
        place = torch.cat([coordinates(grid), coordinates((1, *grid[1:]), start=0.3)], 1)
        inputs["video_coords"] = torch.stack([place, place + 1], -1).repeat(batch, 1, 1, 1)
    return inputs | dict(
        # As many as there are video tokens in the smallest grid: their number tells nothing.
        audio_hidden_states=noise(batch, 30, 4),
        audio_encoder_hidden_states=noise(batch, TEXT, 16),
        audio_num_frames=30,
        fps=25.0,
    )


# -- Wan's kin ----------------------------------------------------------------------------------------------------

WAN = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=32,
    ffn_dim=32,
    num_layers=2,
    rope_max_seq_len=32,
)


def wan(grid: Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return dict(
        hidden_states=noise(batch, 4, frames, 2 * height, 2 * width),
        timestep=torch.full((batch,), 500),
        encoder_hidden_states=noise(batch, TEXT, 16),
    )


def wan_i2v(grid: Grid, batch: int) -> dict[str, Any]:
    """The condition beside the latents, in the channels, and the image's tokens for cross-attention."""
    frames, height, width = grid
    image = dict(encoder_hidden_states_image=noise(batch, 5, 6))
    return wan(grid, batch) | image | dict(hidden_states=noise(batch, 12, frames, 2 * height, 2 * width))


def wan_ti2v(grid: Grid, batch: int) -> dict[str, Any]:
    """A timestep for each token: the tokens of the first frame are the image."""
    steps = torch.full((batch, grid[0] * grid[1] * grid[2]), 500)
    steps[:, : grid[1] * grid[2]] = 0
    return wan(grid, batch) | dict(timestep=steps)


VACE = WAN | dict(vace_layers=[0], vace_in_channels=6)


def wan_vace(grid: Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return wan(grid, batch) | dict(
        control_hidden_states=noise(batch, 6, frames, 2 * height, 2 * width), control_hidden_states_scale=torch.ones(1)
    )


SKYREELS_BLOCKS = WAN | dict(num_frame_per_block=2)
ANIMATE = WAN | dict(
    in_channels=12,
    latent_channels=4,
    image_dim=None,
    motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
    motion_encoder_size=16,
    motion_style_dim=8,
    motion_dim=4,
    motion_encoder_dim=16,
    face_encoder_hidden_dim=16,
    face_encoder_num_heads=2,
    inject_face_latents_blocks=2,
)


def animate(grid: Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid  # the first frame is the reference
    return wan(grid, batch) | dict(
        hidden_states=noise(batch, 12, frames, 2 * height, 2 * width),
        pose_hidden_states=noise(batch, 4, frames - 1, 2 * height, 2 * width),
        face_pixel_values=noise(batch, 3, 4 * (frames - 2) + 1, 16, 16),
    )


# -- Cosmos, Kandinsky, Allegro, AnyFlow --------------------------------------------------------------------------

COSMOS = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    mlp_ratio=2,
    text_embed_dim=16,
    adaln_lora_dim=4,
    max_size=(8, 32, 32),
    patch_size=(1, 2, 2),
    rope_scale=(2.0, 1.0, 1.0),
    concat_padding_mask=False,  # needs torchvision
    extra_pos_embed_type="learnable",
)


def cosmos(grid: Grid, batch: int) -> dict[str, Any]:
    inputs = wan(grid, batch)
    return inputs | dict(attention_mask=padding_mask(REAL, TEXT, batch))


KANDINSKY = dict(
    in_visual_dim=4,
    out_visual_dim=4,
    in_text_dim=16,
    in_text_dim2=8,
    time_dim=16,
    patch_size=(1, 2, 2),
    model_dim=24,
    ff_dim=32,
    num_text_blocks=1,
    num_visual_blocks=2,
    axes_dims=(4, 4, 4),
)


def kandinsky(grid: Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return dict(
        hidden_states=noise(batch, frames, 2 * height, 2 * width, 4),
        encoder_hidden_states=noise(batch, TEXT, 16),
        timestep=torch.full((batch,), 500.0),
        pooled_projections=noise(batch, 8),
        visual_rope_pos=tuple(torch.arange(size) for size in grid),
        text_rope_pos=torch.arange(TEXT),
    )


KANDINSKY_6 = KANDINSKY | dict(visual_cond=False, in_audio_dim=6, out_audio_dim=6)


def kandinsky_6(grid: Grid, batch: int) -> dict[str, Any]:
    inputs = kandinsky(grid, batch)
    del inputs["text_rope_pos"]
    return inputs | dict(
        audio_hidden_states=noise(batch, 30, 6),  # as many as video tokens: their number tells nothing
        encoder_attention_mask=padding_mask(REAL, TEXT, batch)[:, None, None, :],
    )


ALLEGRO = dict(
    num_attention_heads=2,
    attention_head_dim=96,  # as the real one: no power of two
    in_channels=4,
    out_channels=4,
    num_layers=2,
    cross_attention_dim=192,
    sample_width=8,
    sample_height=8,
    sample_frames=8,
    caption_channels=16,
)


def allegro(grid: Grid, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    places = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    angles = [noise(size, 32, seed=size) for size in grid]
    rotation = [(angle.cos(), angle.sin()) for angle in angles]
    return dict(
        hidden_states=noise(batch, 4, frames, 2 * height, 2 * width),
        encoder_hidden_states=noise(batch, TEXT, 16),
        timestep=torch.full((batch,), 500),
        encoder_attention_mask=padding_mask(REAL, TEXT, batch, torch.float32),
        image_rotary_emb=(rotation, [place.flatten()[None] for place in places]),
    )


ANYFLOW = {name: value for name, value in WAN.items() if name != "rope_max_seq_len"}


def anyflow(grid: Grid, batch: int) -> dict[str, Any]:
    inputs = wan(grid, batch)
    latents = inputs["hidden_states"].transpose(1, 2).contiguous()
    steps = torch.full((batch, grid[0]), 500.0)
    return inputs | dict(hidden_states=latents, timestep=steps, r_timestep=steps - 100.0)


# -- the table -------------------------------------------------------------------------------------------------------

TEXT_BY_CROSS_ATTENTION = overwrite(("encoder_hidden_states", "encoder_attention_mask"))

ALONE = {
    "ltx": Tiny(
        "LTXVideoTransformer3DModel",
        LTX,
        ltx,
        calls=2,
        change_padding=TEXT_BY_CROSS_ATTENTION,
    ),
    "ltx-condition": Tiny("LTXVideoTransformer3DModel", LTX, ltx_condition, calls=2, before=keyframe),
    "wan": Tiny("WanTransformer3DModel", WAN, wan, calls=2),
    "wan-i2v": Tiny(
        "WanTransformer3DModel", WAN | dict(in_channels=12, image_dim=6, added_kv_proj_dim=24), wan_i2v, calls=2
    ),
    "wan-ti2v": Tiny("WanTransformer3DModel", WAN, wan_ti2v, calls=2),
    "wan-vace": Tiny("WanVACETransformer3DModel", VACE, wan_vace, calls=3, layer_0=2),
    "chronoedit": Tiny("ChronoEditTransformer3DModel", WAN, wan, calls=2),
    "skyreels": Tiny("SkyReelsV2Transformer3DModel", WAN, wan, calls=2),
    "wan-animate": Tiny("WanAnimateTransformer3DModel", ANIMATE, animate, calls=2, grids=((3, 4, 5), (5, 3, 7))),
    "cosmos": Tiny("CosmosTransformer3DModel", COSMOS, cosmos, calls=2),
    "kandinsky-5": Tiny("Kandinsky5Transformer3DModel", KANDINSKY, kandinsky, calls=2),
    "allegro": Tiny("AllegroTransformer3DModel", ALLEGRO, allegro, calls=2, change_padding=TEXT_BY_CROSS_ATTENTION),
    "anyflow": Tiny("AnyFlowTransformer3DModel", ANYFLOW, anyflow, calls=2),
    "ltx-2": Tiny("LTX2VideoTransformer3DModel", LTX_2, ltx_2, calls=2, change_padding=TEXT_BY_CROSS_ATTENTION),
    "ltx-2-perturbed": Tiny("LTX2VideoTransformer3DModel", LTX_2 | dict(perturbed_attn=True), ltx_2, calls=2),
    "ltx-2-keyframes": Tiny(
        "LTX2VideoTransformer3DModel",
        LTX_2,
        lambda grid, batch: ltx_2(grid, batch, keyframe(grid)),
        calls=2,
        after=keyframe,
    ),
    "kandinsky-6": Tiny(
        "Kandinsky6Transformer3DModel",
        KANDINSKY_6,
        kandinsky_6,
        calls=2,
        grids=((3, 2, 5), (5, 3, 7)),
    ),
}
