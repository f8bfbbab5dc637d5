"""The callable for vLLM-Omni's sparse-attention dispatcher, called as its contract says; vLLM-Omni is not needed."""

from __future__ import annotations

import inspect
import logging
from importlib.metadata import EntryPoint

import pytest
import torch
import torch.nn.functional as F

from psa_diffusers import PSAConfig, pyramid_sparse_attention, vllm_omni
from psa_diffusers.integration import enable_psa, operations
from psa_diffusers.vllm_omni import counts, sparse_attention

from ..test_readme import PROJECT
from .tiny_wan import generate, pipeline

GRID, LATENTS, PATCH = (3, 8, 10), (3, 16, 20), (1, 2, 2)
LENGTH, SCALE = 240, 0.3  # the default scale would be 0.25


@pytest.fixture(autouse=True)
def fresh_counts():
    counts.clear()
    yield
    counts.clear()


def inputs(batch=2, length=LENGTH, heads=2, dtype=torch.float32, kv_heads=None):
    draw = torch.Generator().manual_seed(0)
    sizes = [heads, kv_heads or heads, kv_heads or heads]
    return [torch.randn(batch, length, count, 16, generator=draw).to(dtype) for count in sizes]


def state(step=5, total=10, batch=2, latents=LATENTS):
    """What the framework adds, as it does: a value a sample."""
    return {
        "denoise_step_idx": torch.full((batch,), step),
        "total_denoise_steps": torch.full((batch,), total),
        "latent_shape": torch.tensor([latents] * batch),
        "patch_size": torch.tensor([PATCH] * batch),
        # Derived by the dispatcher, and things of others.
        "total_latent_frames": 3,
        "patches_per_frame": 80,
        "kv_cache_dtype": "auto",
    }


def call(tensors, params, is_causal=False, softmax_scale=SCALE):
    return sparse_attention(*tensors, params, is_causal=is_causal, softmax_scale=softmax_scale)


def dense(query, key, value, **options):
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, scale=SCALE, **options).transpose(1, 2)


def test_the_entry_point_leads_here():
    ((name, value),) = PROJECT["entry-points"]["vllm_omni.sparse_attn"].items()
    found = EntryPoint(name, value, "vllm_omni.sparse_attn").load()
    assert name == "psa" and found is sparse_attention and callable(found)
    names = list(inspect.signature(found).parameters)
    assert names == ["query", "key", "value", "params", "is_causal", "softmax_scale"]
    assert found.capabilities == {"supports_attention_mask": False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sparse_call_is_that_of_the_package(dtype):
    tensors = inputs(dtype=dtype)
    out = call(tensors, {**state(), "compute_budget": 0.5})
    assert out.shape == tensors[0].shape and out.dtype == dtype and dict(counts) == {"sparse": 1}
    assert torch.equal(out, pyramid_sparse_attention(*tensors, PSAConfig(compute_budget=0.5), grid=GRID, scale=SCALE))
    assert not torch.allclose(out, dense(*tensors), atol=1e-3)
    everything = call(tensors, {**state(), "compute_budget": 1.0})
    assert torch.allclose(everything, dense(*tensors), atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_sizes_and_steps_may_be_plain_numbers():
    plain = {"denoise_step_idx": 5, "total_denoise_steps": 10, "latent_shape": LATENTS, "patch_size": list(PATCH)}
    assert torch.equal(call(inputs(), plain), call(inputs(), state())) and dict(counts) == {"sparse": 2}


def test_a_preset_and_settings_over_it():
    assert vllm_omni.config_of({"preset": "psa-3"}) == PSAConfig.preset("psa-3")
    given = {"preset": "psa-3", "dense_warmup": 0.0, "level_fractions": [0.1, 0.1, 0.1, 0.1]}
    config = vllm_omni.config_of(given)
    assert (config.rule, config.dense_warmup, config.level_fractions) == ("topk", 0.0, (0.1,) * 4)
    assert vllm_omni.config_of({}) == PSAConfig() and vllm_omni.config_of(given) is config


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"denoise_step_idx": torch.tensor([2, 2])}, "dense warm-up"),
        ({"dense_last": 0.5}, "dense last steps"),
        ({"denoise_step_idx": None}, "step unknown"),
        ({"denoise_step_idx": torch.tensor([5, 6])}, "samples in other steps, or of other sizes"),
        ({"latent_shape": None}, "token grid unknown"),
        ({"latent_shape": torch.tensor([(3, 16, 18)] * 2)}, "other tokens than the grid's"),
        ({"kv_block_size": 256}, "one block of keys"),
    ],
)
def test_calls_that_stay_dense(changed, reason, caplog):
    params = {name: value for name, value in {**state(), **changed}.items() if value is not None}
    tensors = inputs()
    with caplog.at_level(logging.WARNING):
        outputs = [call(tensors, params) for _ in range(2)]
    assert dict(counts) == {reason: 2} and all(torch.equal(out, dense(*tensors)) for out in outputs)
    said = [record.getMessage() for record in caplog.records]
    assert said == ([] if reason.startswith("dense ") else [f"PSA: attention stays dense: {reason}."])


def test_causal_and_grouped_calls_stay_dense():
    tensors = inputs()
    assert torch.equal(call(tensors, state(), is_causal=True), dense(*tensors, is_causal=True))
    grouped = inputs(heads=4, kv_heads=2)
    assert torch.equal(call(grouped, state()), dense(*grouped, enable_gqa=True))
    assert dict(counts) == {"causal attention": 1, "grouped queries": 1}


def test_without_dense_steps_the_step_need_not_be_known():
    params = {name: value for name, value in state().items() if "step" not in name}
    call(inputs(), {**params, "dense_warmup": 0.0})
    assert dict(counts) == {"sparse": 1}


@pytest.mark.parametrize(
    "given, said",
    [
        ({"compute_bugdet": 0.2}, "unknown setting 'compute_bugdet'; 'compute_budget'?"),
        ({"compute_budget": 2}, "compute_budget must be in"),
        ({"preset": "no"}, "no preset 'no'"),
        ({"dense_layers": [1]}, "dense_layers must be left out here"),
        ({"refresh_every": 2}, "refresh_every must be left out here"),
    ],
)
def test_settings_that_cannot_be(given, said):
    with pytest.raises(ValueError, match=said):
        call(inputs(), {**state(), **given})


def test_a_run_is_that_of_the_plugin(monkeypatch):
    """Every sparse call of a tiny Wan pipeline, computed through this door: the latents are the same."""
    settings = {"kv_block_size": 8, "query_block_size": 8, "num_levels": 3, "compute_budget": 0.3}
    native = generate(enable_psa(pipeline(), PSAConfig(**settings)), steps=4)
    grids, build_plan = [], operations.build_plan

    def remembering(*given, **options):
        grids.append(options["grid"])
        return build_plan(*given, **options)

    def attend(query, key, value, config, plan, scale):
        sizes = {"latent_shape": torch.tensor([grids[-1]]), "patch_size": torch.ones(1, 3)}
        return call((query, key, value), {**state(3, 4, 1), **sizes, **settings}, softmax_scale=scale)

    monkeypatch.setattr(operations, "build_plan", remembering)
    monkeypatch.setattr(operations, "attend", attend)
    through = generate(enable_psa(pipeline(), PSAConfig(**settings)), steps=4)
    assert len(grids) == counts["sparse"] > 0 and set(counts) == {"sparse"}
    assert torch.equal(native, through)
    assert not torch.equal(native, generate(pipeline(), steps=4))
