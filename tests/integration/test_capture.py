"""Captured attention calls: all of them, of a run that they do not change, and nothing left behind."""

import pytest
import torch

from psa_diffusers import PSAConfig, disable_psa, enable_psa
from psa_diffusers.integration import capture_attention, operations, psa_statistics
from psa_diffusers.metrics import relative_error

from .tiny_wan import LAYERS, generate, pipeline, tiny_config

LARGE = {"height": 64, "width": 96, "num_frames": 17}  # 5 x 4 x 6 = 120 tokens
BEFORE = operations.build_plan, operations.attend


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert (operations.build_plan, operations.attend) == BEFORE


def processors_of(pipe):
    return [type(module.processor).__name__ for module in pipe.transformer.modules() if hasattr(module, "processor")]


def test_a_dense_run_is_captured_and_not_changed():
    pipe = pipeline()
    native, names = generate(pipe, steps=3, **LARGE), processors_of(pipe)
    with capture_attention(pipe) as calls:
        assert torch.equal(generate(pipe, steps=3, **LARGE), native)
    assert processors_of(pipe) == names and not pipe.transformer._forward_pre_hooks
    assert all(not module._forward_pre_hooks for module in pipe.transformer.modules())
    expected = [(step, branch, layer) for step in range(3) for branch in ("cond", "uncond") for layer in range(LAYERS)]
    assert [(call.step.index, call.branch, call.layer) for call in calls] == expected
    assert {call.step.total for call in calls} == {3}
    assert [call.module for call in calls[:LAYERS]] == [f"blocks.{layer}.attn1" for layer in range(LAYERS)]
    for call in calls:
        assert call.query.shape == call.key.shape == call.value.shape == (1, 120, 2, 12)
        assert call.options["grid"] == (5, 4, 6)


def test_a_call_can_be_computed_again():
    pipe = pipeline()
    with capture_attention(pipe, steps=[1], layers=[1], branches=["cond"]) as calls:
        generate(pipe, steps=3, **LARGE)
    (call,) = calls
    assert (call.step.index, call.layer, call.branch) == (1, 1, "cond")
    whole, part = (tiny_config(compute_budget=budget) for budget in (1.0, 0.4))
    assert relative_error(call.dense(), call.attend(whole)) < 1e-5
    plan = call.plan(part)
    assert plan.compute_budget == pytest.approx(0.4, abs=0.01) and plan.order is not None
    assert torch.equal(call.attend(part, plan), call.attend(part))
    assert 1e-4 < relative_error(call.dense(), call.attend(part)) < 0.5
    assert call.plan().kv_block_size == PSAConfig().kv_block_size


def test_with_psa_its_sparse_calls_are_captured():
    pipe = enable_psa(pipeline(), config := tiny_config())
    sparse = generate(pipe, **LARGE)
    with capture_attention(pipe) as calls:
        assert torch.equal(generate(pipe, **LARGE), sparse)
    assert {call.step.index for call in calls} == {1, 2, 3} and len(calls) == 3 * 2 * LAYERS
    assert pipe.transformer.blocks[0].attn1.processor.config is config
    assert psa_statistics(pipe).compute_budget_sparse == pytest.approx(
        sum(call.plan(config).compute_budget for call in calls) / len(calls)
    )


def test_psa_may_be_switched_inside():
    pipe = pipeline()
    native = generate(pipe, **LARGE)
    with capture_attention(pipe, every=5) as calls:
        enable_psa(pipe, tiny_config())
        assert not torch.equal(generate(pipe, **LARGE), native)
        assert len(calls) == 3 * 2 * LAYERS // 5
        disable_psa(pipe)
        assert torch.equal(generate(pipe, **LARGE), native)
    assert len(calls) == 3 * 2 * LAYERS // 5


def test_another_pipeline_is_not_captured():
    pipe, other = pipeline(), enable_psa(pipeline(), tiny_config())
    with capture_attention(pipe) as calls:
        generate(other, **LARGE)
    assert calls == [] and psa_statistics(other).sparse_calls > 0


def test_what_is_captured_is_a_copy_where_it_is_asked_for():
    pipe = pipeline()
    with capture_attention(pipe, device="cpu") as calls:
        generate(pipe, steps=1, **LARGE)
    places = {tensor.data_ptr() for call in calls for tensor in (call.query, call.key, call.value)}
    assert len(places) == 3 * len(calls) and {call.query.device.type for call in calls} == {"cpu"}


def test_an_error_leaves_nothing_behind():
    pipe = pipeline()
    names = processors_of(pipe)
    with pytest.raises(KeyboardInterrupt), capture_attention(pipe):
        raise KeyboardInterrupt
    assert processors_of(pipe) == names


def test_what_it_refuses():
    pipe = pipeline()
    with pytest.raises(ValueError, match="every must be at least 1"), capture_attention(pipe, every=0):
        pass
    with pytest.raises(TypeError, match="must be a pipeline"), capture_attention(pipe.transformer):
        pass
    pipe.transformer.blocks[0].compile(backend="eager")
    with pytest.raises(ValueError, match="is compiled"), capture_attention(pipe):
        pass
