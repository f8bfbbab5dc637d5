"""What cannot run sparse runs dense, bit-identical to the native, and is counted with its reason."""

from types import SimpleNamespace

import pytest
import torch

from psa_diffusers.integration import PSAProcessor, enable_psa, psa_statistics
from psa_diffusers.integration.native import SLOT

from .tiny_wan import LAYERS, pipeline, tiny_config


def sparse_model(**settings):
    model = pipeline().transformer
    processor = PSAProcessor(model, tiny_config(dense_warmup=0.0, **settings))
    model.set_attn_processor(processor)
    return model, processor


def forward(model, frames=3, height=4, width=6):
    return model(torch.ones(1, 16, frames, height, width), torch.tensor([1]), torch.ones(1, 8, 16), return_dict=False)[
        0
    ]


def test_gradients(recorder):
    model, processor = sparse_model()
    with processor.step(0, 1):
        forward(model).sum().backward()
        assert model.blocks[0].attn1.to_q.weight.grad.abs().sum() > 0
        assert processor.statistics.dense_reasons == {"gradients needed": LAYERS}
        with torch.no_grad():
            forward(model)
    assert recorder.calls == ["dense"] * LAYERS + ["sparse"] * LAYERS


@torch.no_grad()
def test_one_block_of_keys(recorder):
    model, processor = sparse_model(kv_block_size=16, query_block_size=16)
    with processor.step(0, 1):
        forward(model, frames=2, height=4, width=8)  # 16 tokens
        forward(model, frames=3)  # 18
    assert recorder.calls == ["dense"] * LAYERS + ["sparse"] * LAYERS
    assert processor.statistics.dense_reasons == {"one block of keys": LAYERS}


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 6, 10), (5, 4, 4)])
def test_odd_sizes(shape, recorder):
    model, processor = sparse_model()
    with processor.step(0, 1):
        forward(model, *shape)
    frames, height, width = shape
    grid = (frames, height // 2, width // 2)
    if height == width == 2:
        assert recorder.calls == ["dense"] * LAYERS
    else:
        assert [plan["grid"] for plan in recorder.plans] == [grid] * LAYERS


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attn_mask": torch.ones(1, 1, 18, 18, dtype=torch.bool)}, "attention mask"),
        ({"is_causal": True}, "causal attention"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"enable_gqa": True}, "grouped queries"),
        ({"parallel_config": object()}, "context parallel"),
        ({"keys": 17}, "other tokens than the grid's"),
        ({"queries": 9, "keys": 9}, "other tokens than the grid's"),
        ({}, None),
    ],
)
def test_what_the_native_asks_for(options, reason, recorder):
    """The attention function that natives are given, called as a native of another model might."""
    model, processor = sparse_model()
    queries, keys = options.pop("queries", 18), options.pop("keys", 18)
    calls = []

    def probe(module, args):
        query, key = torch.ones(1, queries, 2, 12), torch.ones(1, keys, 2, 12)
        processor._slot = getattr(module, SLOT)
        processor._attention(lambda *args, **given: calls.append((args, given)), query, key, key, **options)

    handle = model.blocks[0].attn1.register_forward_pre_hook(probe)
    with processor.step(0, 1):
        forward(model)
    handle.remove()
    assert processor.statistics.dense_reasons == ({reason: 1} if reason else {})
    assert len(calls) == (reason is not None)
    if calls:
        assert calls[0][1].items() == options.items()


@torch.no_grad()
def test_a_mask_from_the_pipeline(recorder):
    """Block-causal attention passes a mask to the native processor."""
    model, processor = sparse_model()
    block = model.blocks[0]
    mask = torch.ones(18, 18, dtype=torch.bool).tril()
    block.attn1.register_forward_pre_hook(lambda module, args: (args[0], args[1], mask, args[3]))
    with processor.step(0, 1):
        forward(model)
    assert recorder.calls == ["dense", "sparse"]
    assert processor.statistics.dense_reasons == {"attention mask": 1}


@torch.no_grad()
def test_tokens_that_the_grid_does_not_explain(recorder):
    model, processor = sparse_model()
    model.patch_embedding.register_forward_hook(lambda module, args, output: output[:, :, :2].contiguous())
    model.rope.register_forward_hook(lambda module, args, output: tuple(part[:, :12] for part in output))
    model.proj_out.register_forward_hook(lambda module, args, output: torch.cat([output, output[:, :6]], 1))
    with processor.step(0, 1):
        forward(model)
    assert recorder.calls == ["dense"] * LAYERS
    assert processor.statistics.dense_reasons == {"other tokens than the grid's": LAYERS}


@torch.no_grad()
def test_a_forward_around_the_hooks_stays_dense(recorder):
    model, processor = sparse_model()
    with processor.step(0, 1):
        forward(model)
        recorder.calls.clear()
        model.forward(torch.ones(1, 16, 3, 4, 6), torch.tensor([1]), torch.ones(1, 8, 16))
    assert recorder.calls == ["dense"] * LAYERS
    assert processor.statistics.dense_reasons == {"outside the transformer's forward": LAYERS}


@torch.no_grad()
def test_positional_and_named_arguments_are_the_same(recorder):
    model, processor = sparse_model()
    latents, timestep, text = torch.ones(1, 16, 3, 4, 6), torch.tensor([1]), torch.ones(1, 8, 16)
    with processor.step(0, 1):
        model(latents, timestep, text)
        model(hidden_states=latents, encoder_hidden_states=text, timestep=timestep)
    assert recorder.calls == ["sparse"] * 2 * LAYERS


def test_ring_attention_is_refused(recorder):
    _, processor = sparse_model()
    ring = SimpleNamespace(context_parallel_config=SimpleNamespace(ring_degree=2, ulysses_degree=1))
    with pytest.raises(ValueError, match="does not run under ring attention"):
        processor._parallel_config = ring
    pipe = pipeline()
    for block in pipe.transformer.blocks:
        block.attn1.processor._parallel_config = ring
    enable_psa(pipe, tiny_config())
    with pytest.raises(ValueError, match=r"ring_degree=2.*ulysses_degree instead"):
        forward(pipe.transformer)
    assert psa_statistics(pipe).dense_calls == 0
