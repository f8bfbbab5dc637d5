"""Weights that wait elsewhere, or in another dtype, until a layer needs them."""

import accelerate
import pytest
import torch
from torch import nn

from psa_diffusers.integration import disable_psa, enable_psa, psa_statistics

from .checks import check_native_output, kinds
from .tiny_wan import LAYERS, generate, pipeline, tiny_config

CPU = torch.device("cpu")


def model_offload(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def sequential_offload(pipe):
    # What enable_sequential_cpu_offload does to each model; itself it wants another device than the CPU.
    for model in (pipe.transformer, pipe.vae):
        accelerate.cpu_offload(model, CPU)
    assert all(weight.is_meta for weight in pipe.transformer.parameters())


def group_offload(offload_type):
    def offload(pipe):
        blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
        try:
            pipe.transformer.enable_group_offload(CPU, CPU, offload_type=offload_type, **blocks)
        except AttributeError as error:  # diffusers 0.36 asks torch for its accelerator
            pytest.skip(f"group offloading needs an accelerator in this diffusers: {error}")

    return offload


def layerwise_casting(pipe):
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn


WAYS = {
    "model": model_offload,
    "sequential": sequential_offload,
    "group, blocks": group_offload("block_level"),
    "group, leaves": group_offload("leaf_level"),
    "layerwise casting": layerwise_casting,
}


@pytest.mark.parametrize("kind", ["t2v", "experts"])
@pytest.mark.parametrize("way", WAYS)
def test_offloaded_then_enabled(way, kind):
    pipe = pipeline(kind)
    WAYS[way](pipe)
    statistics = check_native_output(pipe, "ddssssss")
    assert statistics["sparse_calls"] == 6 * 2 * LAYERS and statistics["dense_reasons"] == {"dense warm-up": 8}


@pytest.mark.parametrize("way", WAYS)
def test_enabled_then_offloaded(way):
    pipe = pipeline()
    native = pipeline()
    WAYS[way](native)
    expected = generate(native)
    enable_psa(pipe, tiny_config(compute_budget=1.0, backend="reference"))
    WAYS[way](pipe)
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-4, atol=1e-4)
    assert kinds(pipe) == "dsss" and psa_statistics(pipe).sparse_calls == 3 * 2 * LAYERS
    assert torch.equal(generate(disable_psa(pipe)), expected)


def test_nothing_of_psa_is_offloaded():
    """Its tensors are not the model's: moving, casting and saving must not see them."""
    pipe = pipeline()
    names = set(pipe.transformer.state_dict()), {name for name, _ in pipe.transformer.named_buffers()}
    modules = [name for name, _ in pipe.transformer.named_modules()]
    enable_psa(pipe, tiny_config())
    assert (set(pipe.transformer.state_dict()), {name for name, _ in pipe.transformer.named_buffers()}) == names
    assert [name for name, _ in pipe.transformer.named_modules()] == modules
    assert not isinstance(pipe.transformer.blocks[0].attn1.processor, nn.Module)
