"""Whole tiny pipelines of other families than Wan, with random weights, in the diffusers layout."""

from __future__ import annotations

from pathlib import Path

import torch

from ..integration.tiny_models import TINY
from .tiny_wan import make_pipeline, make_tokenizer

LETTERS = ("<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz")


def _letters():
    """A token a letter: the template around HunyuanVideo's prompts has more tokens than are cut off then."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=512
    )


def _t5(width: int):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=32, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()


def _ltx():
    from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline

    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
        patch_size_t=1,
    )
    return LTXPipeline(FlowMatchEulerDiscreteScheduler(), vae.eval(), _t5(16), make_tokenizer(), TINY["ltx"].build())


def _cogvideox():
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline

    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    parts = (_t5(8), vae.eval(), TINY["cogvideox"].build(), CogVideoXDDIMScheduler())
    return CogVideoXPipeline(make_tokenizer(), *parts)


def _hunyuan():
    from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
    )
    sizes = {"vocab_size": 32, "intermediate_size": 16, "num_attention_heads": 2}
    llama = LlamaConfig(hidden_size=16, num_hidden_layers=3, max_position_embeddings=512, pad_token_id=0, **sizes)
    clip = CLIPTextConfig(hidden_size=8, num_hidden_layers=1, eos_token_id=2, **sizes)
    return HunyuanVideoPipeline(
        LlamaModel(llama).eval(),
        _letters(),
        TINY["hunyuan"].build(),
        vae.eval(),
        FlowMatchEulerDiscreteScheduler(),
        CLIPTextModel(clip).eval(),
        _letters(),
    )


def _skyreels():
    from diffusers import SkyReelsV2Pipeline

    wan = make_pipeline()
    parts = (wan.text_encoder, TINY["skyreels"].build(), wan.vae, wan.scheduler)
    return SkyReelsV2Pipeline(wan.tokenizer, *parts)


# How to make one, and sizes for which there are several blocks of tokens.
FAMILIES = {
    "ltx": (_ltx, {"--height": 64, "--width": 64, "--num-frames": 5}),
    "cogvideox": (_cogvideox, {"--height": 128, "--width": 128, "--num-frames": 9}),
    "hunyuan": (_hunyuan, {"--height": 128, "--width": 128, "--num-frames": 5}),
    "skyreels": (_skyreels, {"--height": 128, "--width": 128, "--num-frames": 9}),
}


def save_family(name: str, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        FAMILIES[name][0]().save_pretrained(folder)
    return folder
