"""Tiny random Wan pipelines, and dense stand-ins for the PSA operations."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
    WanVideoToVideoPipeline,
)

from psa_diffusers import PSAConfig
from psa_diffusers.planning.plan import Plan

torch.set_num_threads(1)  # the models are tiny: threads only cost

TEXT_DIM = 16
LAYERS = 2
SIZE = {"height": 32, "width": 48, "num_frames": 9}  # 3 x 2 x 3 = 18 tokens

SCHEDULERS = {
    "unipc": partial(UniPCMultistepScheduler, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    "euler": partial(FlowMatchEulerDiscreteScheduler, shift=7.0),
    "heun": FlowMatchHeunDiscreteScheduler,
}


def tiny_config(**settings) -> PSAConfig:
    return PSAConfig(**{"query_block_size": 8, "kv_block_size": 4, "num_levels": 2, "compute_budget": 0.5, **settings})


def transformer(cls=WanTransformer3DModel, seed=0, **settings):
    torch.manual_seed(seed)
    defaults = dict(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=32,
        num_layers=LAYERS,
        rope_max_seq_len=32,
    )
    return cls(**{**defaults, **settings}).eval()


def vae():
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


KINDS = ("t2v", "i2v", "ti2v", "ti2v-image", "v2v", "vace", "experts")


def pipeline(kind="t2v", scheduler="unipc"):
    """A tiny pipeline with random weights; no text encoder: :func:`generate` gives the embeddings."""
    parts = {"tokenizer": None, "text_encoder": None, "vae": vae(), "scheduler": SCHEDULERS[scheduler]()}
    if kind == "t2v":
        pipe = WanPipeline(transformer=transformer(), **parts)
    elif kind == "experts":
        pipe = WanPipeline(transformer=transformer(), transformer_2=transformer(seed=1), boundary_ratio=0.9, **parts)
    elif kind == "ti2v":
        pipe = WanPipeline(transformer=transformer(), expand_timesteps=True, **parts)
    elif kind == "i2v":
        model = transformer(in_channels=36, added_kv_proj_dim=24, image_dim=4)
        pipe = WanImageToVideoPipeline(transformer=model, image_encoder=None, image_processor=None, **parts)
        pipe.encode_image = lambda image, device: torch.ones(1, 5, 4)
    elif kind == "ti2v-image":
        pipe = WanImageToVideoPipeline(
            transformer=transformer(), image_encoder=None, image_processor=None, expand_timesteps=True, **parts
        )
    elif kind == "v2v":
        pipe = WanVideoToVideoPipeline(transformer=transformer(), **parts)
    elif kind == "vace":
        model = transformer(WanVACETransformer3DModel, vace_layers=[0], vace_in_channels=96)
        pipe = WanVACEPipeline(transformer=model, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, steps=4, guidance_scale=5.0, **settings):
    """Latents [1, 16, 3, 4, 6] of a run with a fixed seed."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 512, TEXT_DIM, generator=torch.Generator().manual_seed(1)).to(pipe._execution_device)
    inputs = {**SIZE, "prompt_embeds": text[:1], "output_type": "latent", "generator": generator}
    if guidance_scale > 1:
        inputs["negative_prompt_embeds"] = text[1:]
    image = Image.new("RGB", (SIZE["width"], SIZE["height"]), (200, 40, 90))
    if isinstance(pipe, WanImageToVideoPipeline):
        inputs["image"] = image
    if isinstance(pipe, WanVideoToVideoPipeline):
        inputs["video"] = [image] * SIZE["num_frames"]
        del inputs["num_frames"]
    inputs |= {"num_inference_steps": steps, "guidance_scale": guidance_scale, **settings}
    return pipe(**inputs).frames


def full_plan(query, key, value, config, **options) -> Plan:
    """Every block at full resolution: the sparse path then computes dense attention."""
    plan = Plan(torch.empty(0), query.shape[1], key.shape[1], config.query_block_size, config.kv_block_size, 2)
    mask = torch.ones(query.shape[0], query.shape[2], plan.query_blocks, plan.kv_blocks, dtype=torch.int8)
    return Plan(mask, query.shape[1], key.shape[1], config.query_block_size, config.kv_block_size, config.num_levels)


def dense_attend(query, key, value, config, plan, scale):
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)
