"""Forced through PSA with every block at full resolution, a model gives its native output."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers import transformer_wan

from psa_diffusers.integration import PSAProcessor, disable_psa, enable_psa, psa_statistics
from psa_diffusers.integration.native import reroute

from .tiny_wan import KINDS, LAYERS, generate, pipeline, tiny_config, transformer

ALWAYS = {"dense_warmup": 0.0}


@pytest.mark.parametrize("kind", KINDS)
def test_all_level_1_is_native(kind, recorder):
    pipe = pipeline(kind)
    native = generate(pipe)
    del recorder.calls[:], recorder.plans[:]
    cross_calls, recorder.cross_calls = recorder.cross_calls, 0
    sparse = generate(enable_psa(pipe, tiny_config(**ALWAYS)))
    torch.testing.assert_close(sparse, native, rtol=1e-5, atol=1e-5)
    assert recorder.calls and set(recorder.calls) == {"sparse"}
    assert recorder.cross_calls == cross_calls > 0
    assert {plan["grid"] for plan in recorder.plans} == {(3, 2, 3)}
    assert {plan["shape"] for plan in recorder.plans} == {(1, 18, 2, 12)}
    assert all(plan["full_tokens"] is None and plan["key_lengths"] is None for plan in recorder.plans)


@pytest.mark.parametrize("kind", KINDS)
def test_dense_steps_are_bit_identical_and_use_the_native_backend(kind, recorder):
    pipe = pipeline(kind)
    native = generate(pipe)
    native_calls, recorder.calls = recorder.calls, []
    dense = generate(enable_psa(pipe, tiny_config(dense_warmup=1.0)))
    assert torch.equal(dense, native)
    assert recorder.calls == native_calls and set(native_calls) == {"dense"}
    assert psa_statistics(pipe).dense_reasons == {"dense warm-up": len(native_calls)}
    assert psa_statistics(pipe).sparse_calls == 0


def test_the_sparse_result_is_what_the_model_uses(recorder, monkeypatch):
    from psa_diffusers.integration import operations

    pipe = pipeline()
    native = generate(pipe)
    monkeypatch.setattr(operations, "attend", lambda query, *_: torch.zeros_like(query))
    assert (generate(enable_psa(pipe, tiny_config(**ALWAYS))) - native).abs().max() > 1e-3


def test_vace_blocks_are_sparse_too(recorder):
    pipe = enable_psa(pipeline("vace"), tiny_config(**ALWAYS))
    generate(pipe, steps=1)
    assert len(recorder.calls) == 2 * (LAYERS + 1)  # two guidance branches; one VACE block


def test_dense_layers_count_vace_blocks_beside_their_main_block(recorder):
    pipe = enable_psa(pipeline("vace"), tiny_config(**ALWAYS, dense_layers=(0,)))
    generate(pipe, steps=1, guidance_scale=1.0)
    assert recorder.calls == ["dense", "dense", "sparse"]  # vace block 0, block 0, block 1
    assert psa_statistics(pipe).dense_reasons == {"dense layer": 2}


def test_set_attention_backend_reaches_the_natives():
    pipe = enable_psa(pipeline(), tiny_config())
    pipe.transformer.set_attention_backend("_native_math")
    try:
        disable_psa(pipe)
        backends = {str(module.attn1.processor._attention_backend.value) for module in pipe.transformer.blocks}
        assert backends == {"_native_math"}
    finally:
        pipe.transformer.set_attention_backend("native")


def test_dense_steps_use_the_attention_backend_that_was_set(monkeypatch):
    native, used = transformer_wan.dispatch_attention_fn, []

    def dispatch(query, key, value, *args, backend=None, **options):
        if query.shape[1] == key.shape[1]:
            used.append(getattr(backend, "value", backend))
        return native(query, key, value, *args, backend=backend, **options)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", dispatch)
    for set_first in (True, False):
        pipe, used[:] = pipeline(), []
        try:
            if set_first:
                pipe.transformer.set_attention_backend("_native_math")
            enable_psa(pipe, tiny_config(backend="reference"))
            if not set_first:
                pipe.transformer.set_attention_backend("_native_math")
            generate(pipe, steps=4)
        finally:
            disable_psa(pipe).transformer.set_attention_backend("native")
        assert used == ["_native_math"] * 2 * LAYERS  # one dense step; the sparse ones have PSA's own backend


class HeadsFirst:
    """A native processor of the older kind: ``F.scaled_dot_product_attention`` on [batch, heads, seq, head_dim]."""

    def __call__(self, attn, hidden_states, scale=0.5):
        hidden_states = F.silu(hidden_states)
        return F.scaled_dot_product_attention(hidden_states, hidden_states, hidden_states, scale=scale)


def test_rerouting_by_functional_exchanges_heads_and_tokens():
    seen = {}

    def attention(dense, query, key, value, **options):
        seen.update(shape=query.shape, **options)
        return dense(query, key, value, **options)

    states = torch.randn(2, 3, 5, 4)
    rerouted = reroute(HeadsFirst, attention)
    assert torch.equal(rerouted(HeadsFirst(), None, states), HeadsFirst()(None, states))
    assert seen["shape"] == (2, 5, 3, 4) and seen["scale"] == 0.5


def test_what_calls_no_known_attention_function_is_not_rerouted():
    class Other:
        def __call__(self, attn, hidden_states):
            return hidden_states.softmax(-1)

    assert reroute(Other, lambda *_, **__: None) is None


def test_rerouting_leaves_the_module_alone():
    before = transformer_wan.dispatch_attention_fn
    PSAProcessor(transformer(), tiny_config())
    assert transformer_wan.dispatch_attention_fn is before


def test_a_native_that_is_not_known_stays_dense_and_is_counted(recorder, caplog):
    class Custom(transformer_wan.WanAttnProcessor):
        pass

    pipe = pipeline()
    pipe.transformer.blocks[0].attn1.set_processor(Custom())
    native = generate(pipe)
    recorder.calls.clear()
    enable_psa(pipe, tiny_config(**ALWAYS))
    torch.testing.assert_close(generate(pipe, steps=4), native, rtol=1e-5, atol=1e-5)
    assert recorder.calls[:2] == ["dense", "sparse"]
    assert psa_statistics(pipe).dense_reasons == {"unknown attention processor": 8}


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_model_work_and_are_independent(twin_of, recorder, caplog):
    pipe = enable_psa(pipeline(), tiny_config(**ALWAYS))
    native = generate(disable_psa(pipeline()))
    twin = pipeline()
    twin.transformer = twin_of(pipe.transformer)
    assert twin.transformer.blocks[0].attn1.processor is not pipe.transformer.blocks[0].attn1.processor
    recorder.calls.clear()
    torch.testing.assert_close(generate(twin), native, rtol=1e-5, atol=1e-5)
    assert psa_statistics(pipe).steps == []  # the original counted nothing of the copy's run
    generate(enable_psa(twin, tiny_config(**ALWAYS)))
    assert psa_statistics(twin).sparse_calls == 16
    assert torch.equal(generate(disable_psa(twin)), native)


def test_a_deep_copied_pipeline_knows_its_steps(recorder):
    pipe = enable_psa(pipeline("v2v"), tiny_config())
    twin = copy.deepcopy(pipe)
    generate(twin, steps=8, strength=0.5)
    assert recorder.steps(2 * LAYERS) == "dsss"
    assert psa_statistics(twin).last_step == (3, 4, "sparse")
    assert psa_statistics(pipe).last_step is None
