"""Modular pipelines, whose guiders decide how often the transformer is called; and guiders that replace attention."""

import pytest
import torch

from psa_diffusers.integration import disable_psa, enable_psa, psa_statistics
from psa_diffusers.integration.schedule import Step, StepClock

from .checks import kinds
from .tiny_wan import LAYERS, TEXT_DIM, generate, pipeline, tiny_config

guiders = pytest.importorskip("diffusers.guiders")
EXACT = {"compute_budget": 1.0, "backend": "reference"}


def modular(guider=None):
    """Wan's denoising blocks with a tiny transformer."""
    try:
        from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
    except ImportError:
        pytest.skip("this diffusers has no separate denoising blocks for Wan")
    pipe, parts = WanCoreDenoiseStep().init_pipeline(), pipeline()
    pipe.update_components(transformer=parts.transformer, scheduler=parts.scheduler)
    if guider is not None:
        pipe.update_components(guider=guider)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe, steps=8):
    text = torch.randn(2, 512, TEXT_DIM, generator=torch.Generator().manual_seed(1))
    inputs = {"prompt_embeds": text[:1], "negative_prompt_embeds": text[1:], "height": 32, "width": 48, "num_frames": 9}
    return pipe(**inputs, num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output="latents")


def skip_layer():
    from diffusers.hooks import LayerSkipConfig

    window = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    return guiders.SkipLayerGuidance(skip_layer_config=LayerSkipConfig(indices=[1]), **window)


GUIDERS = {
    # A guider, and the attention calls of its eight steps: two of them dense.
    "cfg": (lambda: guiders.ClassifierFreeGuidance(guidance_scale=4.0), 8 * 2 * LAYERS),
    "cfg in a part of the run": (lambda: guiders.ClassifierFreeGuidance(start=0.5), 4 * LAYERS + 4 * 2 * LAYERS),
    "none": (lambda: guiders.ClassifierFreeGuidance(enabled=False), 8 * LAYERS),
    "adaptive projected": (lambda: guiders.AdaptiveProjectedGuidance(), 8 * 2 * LAYERS),
    "skip layer": (skip_layer, None),
}


@pytest.mark.parametrize("guider", GUIDERS)
@pytest.mark.parametrize("refresh_every", [1, 3])
def test_guiders(guider, refresh_every):
    make, calls = GUIDERS[guider]
    pipe = modular(make())
    native = run(pipe)
    assert enable_psa(pipe, tiny_config(**EXACT, refresh_every=refresh_every)) is pipe
    for _ in range(2):
        torch.testing.assert_close(run(pipe), native, rtol=1e-4, atol=1e-4)
        assert kinds(pipe) == "ddssssss"
    statistics = psa_statistics(pipe)
    assert calls is None or statistics.sparse_calls + statistics.dense_calls == calls
    assert set(statistics.dense_reasons) == {"dense warm-up"}
    assert torch.equal(run(disable_psa(pipe)), native)


class Guider:
    _timestep = None


class Modular:
    def __init__(self, timesteps):
        self.scheduler = type("Scheduler", (), {"timesteps": timesteps})
        self.guider, self.guider_2 = Guider(), Guider()


def test_the_guider_tells_the_step_where_the_timestep_is_a_copy():
    """As in half precision on a GPU, where the value cannot be looked up without waiting."""
    timesteps = torch.arange(1000.0, 0.0, -100.0)
    pipe, clock, steps = Modular(timesteps), StepClock(), []
    for index, timestep in enumerate(timesteps):
        current = pipe.guider if index < 4 else pipe.guider_2  # two experts, each with a guider of its own
        current._timestep = timestep
        steps.append(clock.locate(pipe, "unreadable")[0])
    assert steps == [Step(index, 10) for index in range(10)]
    pipe.scheduler.timesteps = timesteps.clone()  # the next run: what the guiders were told is of the last one
    assert clock.locate(pipe, "unreadable") == (None, False)
    pipe.guider._timestep = pipe.scheduler.timesteps[0]
    assert clock.locate(pipe, "unreadable") == (Step(0, 10), True)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_attention_that_a_guider_takes_over_runs_natively(backend):
    """Perturbed attention guidance replaces scaled_dot_product_attention while a layer runs: PSA must not hide it."""
    from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode

    pipe = pipeline()
    attention = pipe.transformer.blocks[1].attn1
    forward = attention.forward

    def perturbed(*args, **kwargs):
        with AttentionScoreSkipFunctionMode():
            return forward(*args, **kwargs)

    plain = generate(pipe)
    attention.forward = perturbed
    native = generate(pipe)
    assert (native - plain).abs().max() > 1e-3
    enable_psa(pipe, tiny_config(compute_budget=1.0, backend=backend))
    torch.testing.assert_close(generate(pipe), native, rtol=1e-4, atol=1e-4)
    assert psa_statistics(pipe).dense_reasons == {"dense warm-up": 2 * LAYERS, "attention intercepted": 3 * 2}
    assert psa_statistics(pipe).sparse_calls == 3 * 2


def test_a_default_device_is_no_interception():
    pipe = enable_psa(pipeline(), tiny_config(**EXACT))
    with torch.device("cpu"):
        generate(pipe)
    assert psa_statistics(pipe).dense_reasons == {"dense warm-up": 2 * LAYERS}
