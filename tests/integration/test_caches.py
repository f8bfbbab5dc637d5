"""diffusers' caches skip calls: the step stays right, and PSA changes nothing that a cache does."""

import diffusers
import pytest
import torch

from psa_diffusers.integration import enable_psa, operations, psa_statistics

from .checks import check_native_output, kinds
from .tiny_wan import LAYERS, TEXT_DIM, generate, pipeline, tiny_config


def config_class(name):
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    return getattr(diffusers, name)


def first_block_cache(pipe):
    return config_class("FirstBlockCacheConfig")(threshold=0.4)


def mag_cache(pipe):
    ratios = {"mag_ratios": [1.0] * 8, "num_inference_steps": 8, "retention_ratio": 0.5}
    return config_class("MagCacheConfig")(threshold=0.5, max_skip_steps=1, **ratios)


def taylor_seer(pipe):
    settings = {"cache_interval": 2, "disable_cache_before_step": 5, "taylor_factors_dtype": torch.float32}
    # Its default names match no module of Wan.
    return config_class("TaylorSeerCacheConfig")(cache_identifiers=[r"blocks\.\d+"], **settings)


def attention_broadcast(pipe):
    ranges = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (0, 1000)}
    current = {"current_timestep_callback": lambda: pipe.current_timestep}
    return config_class("PyramidAttentionBroadcastConfig")(**ranges, **current)


def faster_cache(pipe):
    return config_class("FasterCacheConfig")(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 900),
        spatial_attention_block_identifiers=("^blocks.*attn1",),
        temporal_attention_block_identifiers=(),
        current_timestep_callback=lambda: pipe.current_timestep,
        attention_weight_callback=lambda module: 0.3,
        is_guidance_distilled=True,
    )


# Steps as PSA counts them: dense (d), sparse (s), or skipped (-).
CACHES = {
    "first block": (first_block_cache, {}, "ddssssss"),
    "mag": (mag_cache, {}, "ddss-s-s"),
    "taylor seer": (taylor_seer, {}, "ddsss-s-"),
    # These two keep one cache for both guidance branches, which Wan runs one after the other: without guidance.
    "attention broadcast": (attention_broadcast, {"guidance_scale": 1.0}, "d-s-s-s-"),
    "faster": (faster_cache, {"guidance_scale": 1.0}, "dds-s-s-"),
}


def enable_cache(pipe, cache):
    make, run, expected = CACHES[cache]
    pipe.transformer.enable_cache(make(pipe))
    return run, expected


@pytest.mark.parametrize("told", [True, False], ids=["context", "timesteps"])
@pytest.mark.parametrize("cache", CACHES)
def test_the_same_calls_are_skipped_and_the_steps_stay_right(cache, told, recorder):
    pipe = pipeline()
    run, expected = enable_cache(pipe, cache)
    native = generate(pipe, steps=8, **run)
    native_calls = len(recorder.calls)
    assert native_calls < 8 * LAYERS * (1 if run else 2)
    enable_psa(pipe, tiny_config())
    if not told:  # the step is then found from the timesteps
        del pipe.transformer.__dict__["cache_context"]
    for _ in range(2):
        recorder.calls.clear()
        torch.testing.assert_close(generate(pipe, steps=8, **run), native, rtol=1e-4, atol=1e-4)
        assert kinds(pipe) == expected
        assert len(recorder.calls) == native_calls
        statistics = psa_statistics(pipe)
        assert recorder.calls.count("sparse") == statistics.sparse_calls > 0
        assert recorder.calls == ["dense"] * statistics.dense_calls + ["sparse"] * statistics.sparse_calls


@pytest.mark.parametrize("cache", CACHES)
def test_with_the_real_planner_and_back(cache):
    pipe = pipeline()
    run, expected = enable_cache(pipe, cache)
    check_native_output(pipe, expected, **run)


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_enabled_and_disabled_after_psa(cache):
    pipe = pipeline()
    native = generate(enable_psa(pipe, tiny_config(backend="reference")))
    run, expected = enable_cache(pipe, cache)
    generate(pipe, steps=8, **run)
    assert kinds(pipe) == expected
    pipe.transformer.disable_cache()
    assert torch.equal(generate(pipe), native)
    assert kinds(pipe) == "dsss"


@torch.no_grad()
@pytest.mark.parametrize("refresh_every", [1, 3])
def test_faster_cache_that_leaves_out_the_unconditional_half(refresh_every, recorder):
    """Guidance in one batch: some forwards then run with half of it inside, and plans are made for what runs."""

    def run():
        pipe.transformer._reset_stateful_cache()
        pipe.scheduler.set_timesteps(8)
        latents = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(2))
        text = torch.randn(2, 8, TEXT_DIM, generator=torch.Generator().manual_seed(1))
        for now[0] in pipe.scheduler.timesteps:
            noise = pipe.transformer(
                hidden_states=latents.expand(2, -1, -1, -1, -1),
                timestep=now[0].expand(2),
                encoder_hidden_states=text,
                return_dict=False,
            )[0]
            latents = pipe.scheduler.step(noise[1:] * 4 - noise[:1] * 3, now[0], latents, return_dict=False)[0]
        return latents

    pipe, now = pipeline(), [0]
    config = config_class("FasterCacheConfig")(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 900),
        spatial_attention_block_identifiers=("^blocks.*attn1",),
        temporal_attention_block_identifiers=(),
        unconditional_batch_skip_range=3,
        unconditional_batch_timestep_skip_range=(-1, 950),
        current_timestep_callback=lambda: now[0],
        attention_weight_callback=lambda module: 0.3,
        tensor_format="BCFHW",
    )
    pipe.transformer.enable_cache(config)
    native = run()
    calls = len(recorder.calls)
    enable_psa(pipe, tiny_config(refresh_every=refresh_every))
    recorder.calls.clear()
    torch.testing.assert_close(run(), native, rtol=1e-4, atol=1e-4)
    assert len(recorder.calls) == calls < 8 * LAYERS
    assert {plan["shape"][0] for plan in recorder.plans} == {1, 2}
    assert kinds(pipe).startswith("dds") and recorder.calls.count("sparse") == psa_statistics(pipe).sparse_calls


@pytest.mark.parametrize("refresh_every", [2, 3])
def test_plans_are_not_used_beyond_their_steps(refresh_every, recorder, monkeypatch):
    pipe = enable_psa(pipeline(), tiny_config(refresh_every=refresh_every))
    enable_cache(pipe, "mag")  # computes steps 2, 3, 5 and 7
    ages = []
    made = {}
    attend, build_plan = operations.attend, operations.build_plan

    def building(*args, **options):
        plan = build_plan(*args, **options)
        made[id(plan)] = (plan, psa_statistics(pipe).last_step[0])
        return plan

    def attending(*args):
        ages.append(psa_statistics(pipe).last_step[0] - made[id(args[4])][1])
        return attend(*args)

    monkeypatch.setattr(operations, "build_plan", building)
    monkeypatch.setattr(operations, "attend", attending)
    generate(pipe, steps=8)
    assert 0 < max(ages) < refresh_every
    assert not pipe.transformer.blocks[0].attn1.processor._plans


def test_taylor_seer_across_the_switch_is_reported():
    """It extends the difference of outputs: of a dense and a sparse one, it would enlarge the sparse one's error."""
    cache = config_class("TaylorSeerCacheConfig")
    notes = {}
    for before in (2, 3, 4):
        pipe = enable_psa(pipeline(), tiny_config(backend="reference"))
        pipe.transformer.enable_cache(cache(cache_interval=2, disable_cache_before_step=before, max_order=1))
        generate(pipe, steps=8)  # two dense steps: the outputs of steps 2 and 3 are the first two sparse ones
        notes[before] = psa_statistics(pipe).notes
    assert notes[4] == []
    for before in (2, 3):
        (note,) = notes[before]
        assert "TaylorSeer extrapolates across the switch from dense to sparse at step 2" in note
        assert note.endswith(f"disable_cache_before_step should be at least 4, but is {before}.")
