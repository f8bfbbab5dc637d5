"""On a GPU: nothing in the denoising loop waits for it."""

import pytest
import torch

from psa_diffusers.integration import enable_psa, psa_statistics

from .tiny_wan import generate, pipeline, tiny_config, transformer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sparse_calls_do_not_synchronise(backend, dtype):
    pipe = pipeline(scheduler="euler").to("cuda")
    # A head dimension and block sizes that the kernels take.
    pipe.transformer = transformer(attention_head_dim=64).to("cuda", dtype)
    config = tiny_config(query_block_size=128, kv_block_size=64, num_levels=4, compute_budget=0.5, backend=backend)
    enable_psa(pipe, config)
    size = {"height": 128, "width": 192, "num_frames": 33}
    generate(pipe, **size)  # compiles the kernels, fills caches
    waits = []

    def watched(module, args, kwargs):
        torch.cuda.set_sync_debug_mode("error")

    def unwatched(module, args, output):
        waits.append(torch.cuda.get_sync_debug_mode())
        torch.cuda.set_sync_debug_mode("default")

    pipe.transformer.register_forward_pre_hook(watched, with_kwargs=True, prepend=True)
    pipe.transformer.register_forward_hook(unwatched, always_call=True)
    sparse = generate(pipe, **size)
    statistics = psa_statistics(pipe)
    assert waits and statistics.sparse_calls == 12 and torch.isfinite(sparse).all()
    assert statistics.planning_seconds > 0 and statistics.attention_seconds > 0
    assert 0.3 < statistics.compute_budget_sparse <= 0.51
