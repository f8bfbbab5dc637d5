"""A random Wan pipeline of a few thousand parameters in the diffusers layout: seconds to make and to run."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = ("<pad>", "<unk>", "</s>", "a", "on", "the", "to", "red", "blue", "circle", "ball", "square", "moves", "left")
SIZE = {"num_frames": 5, "height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 1.0, "fps": 8}
VOCABULARY = {
    "shapes": {"circle": ["circle", "ball"], "square": ["square"]},
    "colours": {"red": ["red"], "blue": ["blue"]},
    "motions": {"left": ["moves left", "moves to the left"]},
    "other_words": ["a", "on"],
    "examples": ["a red circle moves left"],
    "fps": 8,
}


def make_tokenizer():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=512
    )


def make_pipeline(seed: int = 0):
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text = UMT5Config(
            vocab_size=len(WORDS),
            d_model=16,
            d_kv=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=2,
        )
        vae = AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        )
        transformer = WanTransformer3DModel(
            patch_size=(1, 1, 1),  # 128 tokens at the default size: two blocks of keys
            num_attention_heads=2,
            attention_head_dim=32,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
        )
        return WanPipeline(
            tokenizer=make_tokenizer(),
            text_encoder=UMT5EncoderModel(text).eval(),
            vae=vae.eval(),
            transformer=transformer.eval(),
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        )


def save_model(folder: Path, vocabulary: bool = True) -> Path:
    make_pipeline().save_pretrained(folder)
    (folder / "defaults.json").write_text(json.dumps(SIZE))
    if vocabulary:
        (folder / "vocabulary.json").write_text(json.dumps(VOCABULARY))
    return folder
