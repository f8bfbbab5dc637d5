"""The fast computations used in training are the ones that stock diffusers runs."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "demo_model"))
pytest.importorskip("skimage")

import captions
import flow
import train_transformer
import wan_transformer
import wan_vae


def test_whole_clip_vae_equals_the_chunked_one():
    torch.manual_seed(0)
    vae = wan_vae.build_vae().eval()
    video = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    with torch.no_grad():
        mean, _ = wan_vae.encode(vae, video)
        torch.testing.assert_close(mean, vae.encode(video).latent_dist.mode(), atol=1e-5, rtol=1e-4)
        decoded = wan_vae.decode(vae, mean).clamp(-1, 1)
        torch.testing.assert_close(decoded, vae.decode(mean).sample, atol=1e-5, rtol=1e-4)


def test_training_transformer_equals_the_stock_one_with_512_text_tokens():
    torch.manual_seed(0)
    tokenizer = captions.build_tokenizer()
    model = train_transformer.build_model(tokenizer).eval()
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1)
    latents, sigma = torch.randn(2, 16, 3, 4, 6), torch.tensor([0.3, 0.9])
    prompts = ["a red circle moving left on a blue background", ""]
    tokens = tokenizer(prompts, padding="max_length", max_length=512, return_tensors="pt")
    with torch.no_grad():
        hidden = model.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        text = hidden * tokens.attention_mask[..., None]
        expected = model.transformer(latents, sigma * 1000, text, return_dict=False)[0]
        attention = wan_transformer.prepare_for_training(model.transformer)
        model.transformer.rope = wan_transformer.ScaledRope(full=(3, 4, 6))
        actual = model(latents, sigma, prompts, tokenizer, attention)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


def test_flow_levels_are_the_schedulers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(4)
    assert scheduler.sigmas[0] == 1.0
    assert flow.shifted(torch.tensor(0.5), 5.0) == pytest.approx(5 / 6)
    assert flow.shift_for(17 * 16 * 16) == pytest.approx(5.0)
