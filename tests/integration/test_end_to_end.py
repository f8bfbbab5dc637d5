"""The plugin with the real planner and backend on tiny Wan pipelines."""

import pytest
import torch

from psa_diffusers.integration import PSAProcessor, disable_psa, enable_psa, psa_statistics

from .tiny_wan import KINDS, LAYERS, generate, pipeline, tiny_config

LARGE = {"height": 64, "width": 96, "num_frames": 17}  # 5 x 4 x 6 = 120 tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_compute_budget_is_native(kind):
    pipe = pipeline(kind)
    native = generate(pipe, steps=3)
    enable_psa(pipe, tiny_config(compute_budget=1.0, backend="reference"))
    torch.testing.assert_close(generate(pipe, steps=3), native, rtol=1e-4, atol=1e-4)
    assert psa_statistics(pipe).compute_budget_sparse == 1.0
    assert psa_statistics(pipe).sparse_calls > 0
    assert torch.equal(generate(disable_psa(pipe), steps=3), native)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_sparse_run_keeps_its_budget_and_is_near_dense(backend):
    pipe = pipeline()
    native = generate(pipe, **LARGE)
    pipe.transformer.set_attn_processor(PSAProcessor(pipe, tiny_config(compute_budget=0.4, backend=backend)))
    sparse = generate(pipe, **LARGE)
    statistics = psa_statistics(pipe)
    assert 0.3 < statistics.compute_budget_sparse <= 0.4 + 1 / (15 * 30)
    assert statistics.sparse_calls == 3 * 2 * LAYERS and statistics.dense_calls == 2 * LAYERS
    assert statistics.backend == ("reference" if backend == "reference" else "torch")
    error = (sparse - native).norm() / native.norm()
    assert 1e-6 < error < 0.05
    assert torch.equal(generate(pipe, **LARGE), sparse)  # deterministic


@pytest.mark.parametrize("refresh_every", [1, 2])
def test_more_budget_is_nearer_to_dense(refresh_every):
    pipe = pipeline()
    native = generate(pipe, **LARGE)
    errors = []
    for budget in (0.3, 0.6, 0.9):
        enable_psa(pipe, tiny_config(compute_budget=budget, refresh_every=refresh_every, backend="reference"))
        errors.append(float((generate(pipe, **LARGE) - native).norm()))
    assert errors[0] > errors[1] > errors[2]


def test_half_precision():
    pipe = pipeline()
    pipe.transformer.to(torch.bfloat16)
    native = generate(pipe)
    sparse = generate(enable_psa(pipe, tiny_config(compute_budget=1.0, backend="reference")))
    assert psa_statistics(pipe).sparse_calls > 0
    torch.testing.assert_close(sparse, native, rtol=0.05, atol=0.05)
