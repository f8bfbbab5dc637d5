"""Every model of the table: what is sparse, where its tokens lie, and that nothing else is changed."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch

from psa_diffusers.integration import PSAProcessor, disable_psa, enable_psa, operations, psa_statistics
from psa_diffusers.integration.models import find_row
from psa_diffusers.integration.processor import installed_processors

from .tiny_models import TINY
from .tiny_wan import tiny_config

ALWAYS = {"dense_warmup": 0.0, "backend": "reference"}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@torch.no_grad()
def forward(model, inputs):
    """All that the model returns, as one tensor, of a call in the second of two steps."""
    torch.manual_seed(0)
    processors = installed_processors([model])
    with processors[0].step(1, 2) if processors else nullcontext():
        return torch.cat([part.flatten() for part in model(**inputs, return_dict=False)])


@pytest.fixture
def plans(monkeypatch):
    """The plans that were used, in order."""
    used, attend = [], operations.attend

    def recorded(query, key, value, config, plan, scale):
        used.append(plan)
        return attend(query, key, value, config, plan, scale)

    monkeypatch.setattr(operations, "attend", recorded)
    return used


def every_size():
    return [
        pytest.param(name, grid, batch, id=f"{name}-{'x'.join(map(str, grid))}-{batch}")
        for name, tiny in TINY.items()
        for grid in tiny.grids
        for batch in (1, 2)
    ]


@pytest.mark.parametrize(("name", "grid", "batch"), every_size())
def test_all_level_1_is_native_and_calls_are_as_in_the_table(name, grid, batch, plans):
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(grid, batch)
    native = forward(model, copy.deepcopy(inputs))
    enable_psa(model, tiny_config(compute_budget=1.0, **ALWAYS))
    torch.testing.assert_close(forward(model, inputs), native, **CLOSE)
    statistics = psa_statistics(model)
    calls = tiny.calls * (batch if tiny.a_sample else 1)
    assert len(plans) == statistics.sparse_calls == calls
    assert statistics.dense_reasons == {}
    assert statistics.compute_budget_sparse == 1.0
    assert torch.equal(forward(disable_psa(model), inputs), native)


@pytest.mark.parametrize("name", TINY)
def test_dense_steps_and_layers(name):
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(tiny.grids[0], 2)
    native = forward(model, inputs)
    enable_psa(model, tiny_config(dense_warmup=1.0))
    assert torch.equal(forward(model, inputs), native)
    times = 2 if tiny.a_sample else 1
    assert psa_statistics(model).dense_reasons == {"dense warm-up": tiny.calls * times}
    enable_psa(model, tiny_config(compute_budget=1.0, dense_layers=(0,), **ALWAYS))
    torch.testing.assert_close(forward(model, inputs), native, **CLOSE)
    assert psa_statistics(model).dense_reasons == {"dense layer": tiny.layer_0 * times}
    assert psa_statistics(model).sparse_calls == (tiny.calls - tiny.layer_0) * times


@pytest.mark.parametrize("name", TINY)
def test_text_and_conditioning_are_at_full_resolution(name, plans):
    tiny = TINY[name]
    grid, batch = tiny.grids[0], 2
    model = enable_psa(tiny.build(), tiny_config(compute_budget=0.5, **ALWAYS))
    forward(model, tiny.inputs(grid, batch))
    video, real = grid[0] * grid[1] * grid[2], tiny.real_after(batch)
    for index, plan in enumerate(plans):
        after = real[index % batch] if tiny.cut else tiny.after
        others = [*range(tiny.before), *range(tiny.before + video, tiny.before + video + after)]
        assert plan.key_length == video + len(others)
        assert plan.order[video:].tolist() == others
        if tiny.real is not None and not tiny.cut:
            assert plan.key_lengths.tolist() == [tiny.before + video + count for count in real]
        else:
            assert plan.key_lengths is None
        if others:
            first = video // plan.kv_block_size
            keys = plan.level_mask[:, :, :, first:]
            assert (keys[:, :, :, 0] == 1).all() and set(keys.unique().tolist()) <= {0, 1}
            assert ((keys == 0).any() and tiny.real is not None) or (keys == 1).all()
            rows = plan.level_mask[:, :, video // plan.query_block_size :]
            assert (rows[..., :first] == 1).all()
        assert (plan.level_mask[..., : video // plan.kv_block_size] > 1).any()


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny.change_padding])
def test_padded_text_changes_nothing(name):
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(tiny.grids[0], 2)
    changed = copy.deepcopy(inputs)
    tiny.change_padding(changed)
    native = forward(model, inputs)
    torch.testing.assert_close(forward(model, changed), native, **CLOSE)
    enable_psa(model, tiny_config(compute_budget=0.5, **ALWAYS))
    sparse = forward(model, inputs)
    assert (sparse - native).abs().max() > 1e-5  # it was sparse indeed
    torch.testing.assert_close(forward(model, changed), sparse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_samples_of_a_batch_are_planned_apart(name):
    """So that guidance as a batch of two and as two calls give the same."""
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(tiny.grids[0], 2)
    enable_psa(model, tiny_config(compute_budget=0.5, **ALWAYS))
    both = forward(model, inputs)
    again = forward(model, inputs)
    assert torch.equal(both, again)


@pytest.mark.parametrize("name", TINY)
def test_the_one_line_does_the_same(name):
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(tiny.grids[0], 1)
    if not hasattr(model, "set_attn_processor"):
        pytest.skip(f"{tiny.model} has no set_attn_processor: enable_psa is its way")
    enabled = forward(enable_psa(model, tiny_config(compute_budget=0.5, **ALWAYS)), inputs)
    disable_psa(model)
    model.set_attn_processor(PSAProcessor(model, tiny_config(compute_budget=0.5, **ALWAYS)))
    assert torch.equal(forward(model, inputs), enabled)
    assert psa_statistics(model).sparse_calls == tiny.calls


@pytest.mark.parametrize("name", TINY)
def test_natives_come_back_even_where_they_were_never_seen(name):
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(tiny.grids[0], 1)
    native = forward(model, inputs)
    if hasattr(model, "set_attn_processor"):
        model.set_attn_processor(PSAProcessor(tiny_config()))
    else:
        for path, part in model.named_modules():
            if find_row(model).is_self_attention(path):
                part.processor = PSAProcessor(tiny_config())
    assert torch.equal(forward(disable_psa(model), inputs), native)


@pytest.mark.parametrize("name", TINY)
def test_a_plan_is_kept_for_its_own_prompt_and_sample(name, plans):
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(tiny.grids[0], 2)
    enable_psa(model, tiny_config(compute_budget=0.5, refresh_every=5, **ALWAYS))
    processor = next(
        part.processor for part in model.modules() if isinstance(getattr(part, "processor", 0), PSAProcessor)
    )
    with torch.no_grad():
        for step in range(2):
            with processor.step(step, 9):
                model(**inputs)
    first, second = plans[: len(plans) // 2], plans[len(plans) // 2 :]
    assert [id(plan) for plan in first] == [id(plan) for plan in second]
    assert len({id(plan) for plan in first}) == len(first)
