"""What people do to a pipeline beside running it: in callbacks, in threads, in batches, in one call after another."""

import threading

import pytest
import torch
from diffusers import WanPipeline

from psa_diffusers.integration import disable_psa, enable_psa, psa_statistics

from .checks import kinds
from .tiny_wan import LAYERS, SCHEDULERS, TEXT_DIM, generate, pipeline, tiny_config

EXACT = {"compute_budget": 1.0, "backend": "reference"}
CALLS = 2 * LAYERS  # of a step, with guidance


def after_step(step, do):
    """A callback that does something once, when this step has ended."""

    def callback(pipe, index, timestep, inputs):
        if index == step:
            do(pipe)
        return inputs

    return callback


# -- in callbacks ---------------------------------------------------------------------------------------------------


def test_disabled_while_it_runs():
    """Dense from then on: at full resolution the video is the native one, and the pipeline too."""
    pipe = pipeline()
    native = generate(pipe)
    enable_psa(pipe, tiny_config(**EXACT))
    video = generate(pipe, callback_on_step_end=after_step(1, disable_psa))
    torch.testing.assert_close(video, native, rtol=1e-4, atol=1e-4)
    assert torch.equal(generate(pipe), native)


def test_enabled_while_it_runs():
    pipe = pipeline()
    generate(pipe, callback_on_step_end=after_step(1, lambda pipe: enable_psa(pipe, tiny_config())))
    assert psa_statistics(pipe).steps == [(2, 4, "sparse"), (3, 4, "sparse")]
    generate(pipe)
    assert kinds(pipe) == "dsss"


def test_other_settings_while_it_runs():
    pipe = enable_psa(pipeline(), tiny_config(compute_budget=0.3))
    generate(pipe, callback_on_step_end=after_step(1, lambda pipe: enable_psa(pipe, tiny_config(compute_budget=0.8))))
    assert kinds(pipe) == "dsss"
    first, *others = (budget for _, budget in psa_statistics(pipe).compute_budget_by_step)
    assert first < 0.35 and all(0.7 < budget <= 0.85 for budget in others)


def test_the_same_transformer_runs_in_a_callback():
    pipe = enable_psa(pipeline(), tiny_config())
    expected, inner = generate(pipe), []

    def run_inside(pipe):
        other = WanPipeline(**{**pipe.components, "scheduler": SCHEDULERS["unipc"]()})
        other.set_progress_bar_config(disable=True)
        inner.append(generate(other))

    assert torch.equal(generate(pipe, callback_on_step_end=after_step(1, run_inside)), expected)
    assert len(inner) == 1


# -- in threads -----------------------------------------------------------------------------------------------------


def test_two_pipelines_in_two_threads():
    pipes = [enable_psa(pipeline(), tiny_config(compute_budget=budget)) for budget in (0.3, 0.8)]
    expected, found = [generate(pipe) for pipe in pipes], [[], []]

    def run(number):
        for _ in range(3):
            found[number].append(generate(pipes[number]))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert len(found[number]) == 3 and all(torch.equal(video, expected[number]) for video in found[number])


# -- one call after another ------------------------------------------------------------------------------------------


def test_another_scheduler_between_runs():
    pipe = enable_psa(pipeline(), tiny_config())
    sequences = {"euler": "ddssssss", "heun": "dddd" + 11 * "s", "unipc": "ddssssss"}
    for name, expected in sequences.items():
        pipe.scheduler = SCHEDULERS[name]()
        generate(pipe, steps=8)
        assert kinds(pipe) == expected


def test_guidance_and_sizes_that_change_between_runs():
    pipe = enable_psa(pipeline(), tiny_config(refresh_every=2))
    for guidance_scale, size in ((1.0, {}), (5.0, {"num_frames": 13}), (0.0, {"height": 48, "width": 32}), (5.0, {})):
        generate(pipe, guidance_scale=guidance_scale, **size)
        calls = CALLS if guidance_scale > 1 else LAYERS
        assert kinds(pipe) == "dsss" and psa_statistics(pipe).sparse_calls == 3 * calls


def test_inference_mode_and_then_not():
    pipe = enable_psa(pipeline(), tiny_config(refresh_every=4))
    with torch.inference_mode():
        inside = generate(pipe)
    assert torch.equal(generate(pipe), inside.clone())


# -- batches ---------------------------------------------------------------------------------------------------------

TEXT = torch.randn(2, 512, TEXT_DIM, generator=torch.Generator().manual_seed(2))


def two_prompts(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    return generate(pipe, prompt_embeds=TEXT, negative_prompt_embeds=TEXT.flip(0), generator=generators)


def test_a_batch_of_prompts_with_a_generator_each_is_each_alone():
    pipe = pipeline()
    native = two_prompts(pipe)
    torch.testing.assert_close(two_prompts(enable_psa(pipe, tiny_config(**EXACT))), native, rtol=1e-4, atol=1e-4)
    together = two_prompts(enable_psa(pipe, tiny_config()))
    assert kinds(pipe) == "dsss" and psa_statistics(pipe).sparse_calls == 3 * CALLS
    for sample, seed in enumerate((3, 4)):
        text = {"prompt_embeds": TEXT[[sample]], "negative_prompt_embeds": TEXT[[1 - sample]]}
        alone = generate(pipe, **text, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(together[[sample]], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("run", [{"num_videos_per_prompt": 2}, {"latents": torch.randn(1, 16, 3, 4, 6)}, {"steps": 7}])
def test_other_ways_to_ask(run):
    pipe = pipeline()
    native = generate(pipe, **run)
    found = generate(enable_psa(pipe, tiny_config(**EXACT)), **run)
    torch.testing.assert_close(found, native, rtol=1e-4, atol=1e-4)
    assert set(kinds(pipe)) == {"d", "s"}


@pytest.mark.parametrize("kind", ["np", "pt", "pil", "latent"])
def test_every_kind_of_output(kind):
    pipe = enable_psa(pipeline(), tiny_config())
    generate(pipe, output_type=kind)
    assert kinds(pipe) == "dsss"
