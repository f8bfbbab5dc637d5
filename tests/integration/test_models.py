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


@pytest.mark.parametrize(("name", "grid"), [(name, grid) for name, tiny in TINY.items() for grid in tiny.grids])
def test_text_and_conditioning_are_at_full_resolution(name, grid, plans):
    tiny, batch = TINY[name], 2
    model, inputs = tiny.build(), tiny.inputs(grid, batch)
    native = forward(model, inputs)
    enable_psa(model, tiny_config(compute_budget=0.5, **ALWAYS))
    assert (forward(model, inputs) - native).abs().max() > 1e-5  # what is sparse is what the model uses
    video, real = grid[0] * grid[1] * grid[2], tiny.real_after(grid, batch)
    before, after = tiny.around(grid)
    assert len(plans) == tiny.calls * (batch if tiny.a_sample else 1)
    for index, plan in enumerate(plans):
        shown = real[index % batch] if tiny.cut else after
        others = [*range(before), *range(before + video, before + video + shown)]
        assert plan.key_length == video + len(others)
        assert plan.order[video:].tolist() == others
        if tiny.real is not None and not tiny.cut:
            assert plan.key_lengths.tolist() == [before + video + count for count in real]
        else:
            assert plan.key_lengths is None
        assert_full(plan, video, len(others))


def assert_full(plan, video, others):
    """Blocks that hold one of the last ``others`` positions are level 1, or 0 where all of their keys are padding."""
    rows, columns = video // plan.query_block_size, video // plan.kv_block_size
    levels = plan.level_mask
    if others:
        real = plan.real_keys()
        if real is None:
            assert (levels[..., columns:] == 1).all()
        else:
            padded = torch.nn.functional.pad(real, (0, plan.kv_blocks * plan.kv_block_size - plan.key_length))
            expected = padded.view(len(real), 1, 1, plan.kv_blocks, plan.kv_block_size).any(-1).to(torch.int8)
            assert (levels[..., columns:] == expected[..., columns:]).all()
        assert (levels[:, :, rows:, :columns] == 1).all()
    assert (levels[..., :columns] > 1).any()


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


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if tiny.batch_of_samples])
def test_samples_of_a_batch_are_planned_apart(name, plans):
    """So that guidance as a batch of two and as two calls give the same."""
    tiny = TINY[name]
    model, inputs = tiny.build(), tiny.inputs(tiny.grids[0], 2)
    enable_psa(model, tiny_config(compute_budget=0.5, **ALWAYS))
    both = forward(model, inputs)
    assert torch.equal(forward(model, inputs), both)  # deterministic
    del plans[:]
    forward(model, inputs)
    together = [plan.level_mask[sample] for plan in plans for sample in range(len(plan.level_mask))]
    del plans[:]
    for sample in range(2):
        forward(model, one_sample(inputs, sample))
    first, second = plans[: len(plans) // 2], plans[len(plans) // 2 :]
    apart = [plan.level_mask[0] for pair in zip(first, second, strict=True) for plan in pair]
    # Of the first layer: later ones differ by rounding, where a budget is spent to the last step.
    assert all(torch.equal(one, other) for one, other in zip(together[:2], apart[:2], strict=True))
    same = [(one == other).double().mean() for one, other in zip(together, apart, strict=True)]
    assert min(same) > 0.95


def one_sample(inputs, sample):
    """The arguments of one sample of two."""

    def pick(value):
        if isinstance(value, list):
            return [pick(item) for item in value]
        return value[sample : sample + 1] if isinstance(value, torch.Tensor) and len(value) == 2 else value

    return {name: pick(value) for name, value in inputs.items()}


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
