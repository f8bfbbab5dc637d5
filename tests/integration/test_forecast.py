"""What is counted without data is what a forward computes: for every family, by its tiny model."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from psa_diffusers import PSAConfig
from psa_diffusers.integration.example_inputs import EXAMPLES
from psa_diffusers.integration.forecast import forecast, measure_layer
from psa_diffusers.integration.meta_forward import meta_forward
from psa_diffusers.integration.models import known_transformers

from .tiny_alone import COSMOS, SKYREELS_BLOCKS
from .tiny_models import TINY
from .tiny_wan import tiny_config

SIZE = 24  # latents of a side: the video is more than the text


def latents_of(name):
    return EXAMPLES[name].latent_frames(22, 4), SIZE, SIZE


def test_there_is_an_example_for_every_family():
    assert set(EXAMPLES) == set(known_transformers())
    assert set(EXAMPLES) == {tiny.model for tiny in TINY.values()}


@pytest.mark.parametrize("name", TINY)
def test_the_count_is_that_of_a_forward_with_data(name):
    tiny = TINY[name]
    model, latents = tiny.build(), latents_of(tiny.model)
    seen = forecast(tiny.model, dict(model.config), latents, tiny_config())
    assert (seen.sparse_calls, seen.dense_reasons) == (tiny.calls, {})
    inputs = EXAMPLES[tiny.model].inputs(model, latents)
    # The fused kernels of a CPU are not counted.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    assert seen.attention_flops + seen.other_flops == counter.get_total_flops()
    assert 0 < seen.attention_share < 1
    assert seen.tokens >= seen.grid[0] * seen.grid[1] * seen.grid[2]


MEASURED = ["mochi", "hunyuan-1.5", "framepack", "minimax", "helios", "kandinsky-6", "easyanimate", "consisid", "ltx-2"]


@pytest.mark.parametrize("name", [*MEASURED, "allegro", "cosmos"])
def test_a_layer_can_be_measured(name):
    tiny = TINY[name]
    settings = dict(tiny.build().config)
    times = measure_layer(tiny.model, settings, latents_of(tiny.model), tiny_config(backend="torch"))
    assert 0 < times.dense_attention < times.dense and 0 < times.planning < times.sparse


def test_cosmos_without_torchvision():
    """Its padding mask, which only torchvision resizes, is one channel: its part in the patch embedding is counted."""
    with_mask = forecast("CosmosTransformer3DModel", {**COSMOS, "concat_padding_mask": True}, (5, 8, 8), tiny_config())
    without = forecast("CosmosTransformer3DModel", COSMOS, (5, 8, 8), tiny_config())
    tokens, width, patch = 5 * 4 * 4, 24, 4
    assert with_mask.other_flops - without.other_flops == 2 * tokens * patch * width


def test_a_mode_that_stays_dense():
    seen = forecast("SkyReelsV2Transformer3DModel", SKYREELS_BLOCKS, (4, 8, 8), tiny_config())
    assert (seen.sparse_calls, seen.dense_reasons) == (0, {"block-causal attention": 2})
    assert seen.least_budget(tiny_config()) == 0.0


def test_what_text_and_conditioning_cost():
    """As the planner says it, which alone knows what it will do."""
    name, config = "helios", tiny_config(compute_budget=0.3)
    model, grid = TINY[name].build(), (9, 4, 6)
    latents = (grid[0], 2 * grid[1], 2 * grid[2])
    seen = forecast(TINY[name].model, dict(model.config), latents, config)
    from psa_diffusers import build_plan

    query, key, value = (torch.randn(1, seen.tokens, 2, 12) for _ in range(3))
    before = seen.tokens - 9 * 4 * 6
    plan = build_plan(query, key, value, config, grid=grid, full_tokens=slice(0, before))
    least = seen.least_budget(config)
    assert f"the cheapest plan costs {least:.4f}" in plan.notes[0]
    assert plan.compute_budget == pytest.approx(least)
    assert seen.least_budget(PSAConfig(rule="topk")) < 1


# -- the meta device --------------------------------------------------------------------------------------------------


def on_meta(make):
    with meta_forward(), torch.device("meta"):
        return make()


def test_what_is_made_of_known_values_can_be_read():
    def read():
        mask = torch.ones(2, 5, dtype=torch.long)
        mask[1, 3:] = 0
        counts = mask.sum(1)
        states = torch.randn(1, 5, 4)
        places = torch.nonzero(mask[1].flatten()).flatten()
        picked = states[:, places], states[0][mask[1].bool()], states[0][~mask[1].bool()]
        return counts.tolist(), int(counts[1]), [part.shape for part in picked], torch.equal(mask, mask), mask.cpu()

    counts, real, shapes, equal, mask = on_meta(read)
    assert (counts, real, equal) == ([5, 3], 3, True)
    assert shapes == [(1, 3, 4), (3, 4), (2, 4)]
    assert mask.tolist() == [[1] * 5, [1, 1, 1, 0, 0]]


@pytest.mark.parametrize(
    "unknown",
    [
        lambda: torch.randn(3).sum(),
        lambda: torch.empty(3).sum(),
        lambda: torch.zeros(3).add_(torch.randn(3)).sum(),
        lambda: written_through_a_view(),
    ],
    ids=["noise", "memory", "written to", "written to by a view"],
)
def test_the_unknown_cannot_be_read(unknown):
    with pytest.raises(RuntimeError, match="meta"):
        on_meta(lambda: float(unknown()))


def written_through_a_view():
    whole = torch.zeros(3)
    whole[1:].copy_(torch.randn(2))
    return whole.sum()


def test_nothing_is_left_behind():
    autocast = torch.autocast
    on_meta(lambda: torch.autocast("meta", enabled=False).__enter__())
    assert torch.autocast is autocast
    with pytest.raises(RuntimeError):
        torch.ones(1, device="meta").item()
    with meta_forward(), torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
