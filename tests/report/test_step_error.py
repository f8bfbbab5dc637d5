"""The error of one step: nothing at a whole budget, more the smaller the budget, and the pipeline left as it was."""

import pytest
import torch

from psa_diffusers import PSAConfig
from psa_diffusers.report.step_error import PSA3_BUDGET, record_steps, settings_at, step_error

from ..integration.tiny_wan import TEXT_DIM, pipeline, tiny_config

SIZE = {"height": 64, "width": 96, "num_frames": 17, "num_inference_steps": 2}


def record(pipe, guidance_scale):
    text = torch.randn(2, 512, TEXT_DIM, generator=torch.Generator().manual_seed(1))
    run = {**SIZE, "prompt_embeds": text[:1]} | ({"negative_prompt_embeds": text[1:]} if guidance_scale > 1 else {})
    return record_steps(pipe, None, guidance_scale=guidance_scale, **run)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_more_budget_is_nearer_to_the_recorded_step(guidance_scale):
    pipe = pipeline()
    steps = record(pipe, guidance_scale)
    assert [len(step.calls) for step in steps] == [2 if guidance_scale > 1 else 1] * 2
    found = [step_error(pipe, steps[1], tiny_config(compute_budget=budget)) for budget in (0.3, 0.6, 1.0)]
    assert found[0].error > found[1].error > found[2].error and found[2].error < 1e-4
    assert [item.compute_budget for item in found] == pytest.approx([0.3, 0.6, 1.0], abs=0.01)


def test_the_schedule_of_a_config_does_not_count():
    pipe = pipeline()
    step = record(pipe, 1.0)[0]
    dense = tiny_config(dense_warmup=1.0, dense_last=1.0, dense_layers=(0, 1))
    assert step_error(pipe, step, dense) == step_error(pipe, step, tiny_config())
    assert type(pipe.transformer.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


def test_too_few_tokens_are_an_error():
    pipe = pipeline()
    with pytest.raises(ValueError, match="too few tokens"):
        step_error(pipe, record(pipe, 1.0)[0], PSAConfig(kv_block_size=128))


def test_settings_cost_the_same():
    for name, config in settings_at(0.2).items():
        if config.rule == "budget":
            assert config.compute_budget == 0.2, name
        else:
            cost = sum(share * 2.0**-level for level, share in enumerate(config.level_fractions))
            assert cost == pytest.approx(0.2), name
    assert settings_at(PSA3_BUDGET)["PSA-3 shares"].level_fractions == (0.15, 0.10, 0.20, 0.0)
