"""Tiny random transformers of every family, one table: how to build and to call each, and what PSA should find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch

torch.set_num_threads(1)  # the models are tiny: threads only cost

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Tiny:
    """A transformer in a table row.

    Attributes:
        model: Class name in diffusers.
        config: Its constructor's arguments.
        inputs: (grid in tokens, batch) -> the forward's arguments.
        calls: Video self-attention calls of a forward, one sample each where ``a_sample``.
        before, after: Text and conditioning tokens around the video, with padding.
        real: Of those after the video, how many are real, by sample; None = all.
        cut: Padding is cut off before attention.
        change_padding: Changes padded text in the arguments; None = there is none.
        layer_0: Calls of layer 0.
    """

    model: str
    config: dict[str, Any]
    inputs: Callable[[Grid, int], dict[str, Any]]
    calls: int
    before: int = 0
    after: int = 0
    real: tuple[int, ...] | None = None
    cut: bool = False
    a_sample: bool = False
    change_padding: Callable[[dict[str, Any]], None] | None = None
    layer_0: int = 1
    grids: tuple[Grid, ...] = field(default=((3, 4, 5), (5, 3, 7), (2, 5, 3)))

    def build(self) -> torch.nn.Module:
        if not hasattr(diffusers, self.model):
            pytest.skip(f"diffusers {diffusers.__version__} has no {self.model}")
        torch.manual_seed(0)
        return getattr(diffusers, self.model)(**self.config).eval()

    def real_after(self, batch: int) -> list[int]:
        return [self.after] * batch if self.real is None else list(self.real[:batch])


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + len(shape)))


def padding_mask(lengths: tuple[int, ...], tokens: int, batch: int, dtype=torch.bool) -> torch.Tensor:
    return (torch.arange(tokens)[None, :] < torch.tensor(lengths[:batch])[:, None]).to(dtype)


def overwrite(*pairs: tuple[str, str]) -> Callable[[dict[str, Any]], None]:
    """Writes other values where these texts are padding, as their masks say."""

    def change(inputs: dict[str, Any]) -> None:
        for text, mask in pairs:
            other = noise(*inputs[text].shape, seed=99)
            inputs[text] = torch.where(inputs[mask].bool()[..., None], inputs[text], other)

    return change


# -- HunyuanVideo -------------------------------------------------------------------------------------------------

TEXT, REAL = 9, (6, 3)
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


HISTORY, IMAGE = 3 * 2 * 2 + 3, 3  # tokens of the smallest history of a 4 x 4 grid


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


# -- LTX, Mochi ---------------------------------------------------------------------------------------------------

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


KEYFRAMES = 15  # one frame of the grid with which it is used


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


TINY = {
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
        before=2 * 3 * 5 + 2 * 2 * 3 + 2 * 1 * 2,
        after=IMAGE + TEXT,
        real=tuple(IMAGE + real for real in REAL),
        change_padding=HUNYUAN_TEXT,
        grids=((4, 3, 5),),
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
    "cogvideox": Tiny("CogVideoXTransformer3DModel", COGVIDEOX, cogvideox, calls=2, before=TEXT),
    "cogvideox-1.5": Tiny(
        "CogVideoXTransformer3DModel",
        COGVIDEOX | dict(patch_size_t=2),
        lambda grid, batch: cogvideox(grid, batch, patch_t=2),
        calls=2,
        before=TEXT,
    ),
    "consisid": Tiny("ConsisIDTransformer3DModel", CONSISID, consisid, calls=2, before=TEXT),
    "ltx": Tiny(
        "LTXVideoTransformer3DModel",
        LTX,
        ltx,
        calls=2,
        change_padding=overwrite(("encoder_hidden_states", "encoder_attention_mask")),
    ),
    "ltx-condition": Tiny(
        "LTXVideoTransformer3DModel", LTX, ltx_condition, calls=2, before=KEYFRAMES, grids=((4, 3, 5), (3, 5, 3))
    ),
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
}
