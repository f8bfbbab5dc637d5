"""Statistics and plans: counted exactly, anew each run, kept only as long as they are needed."""

import json

import pytest
import torch

from psa_diffusers.integration import enable_psa, operations, psa_statistics, statistics
from psa_diffusers.planning.plan import Plan

from .tiny_wan import LAYERS, full_plan, generate, pipeline, tiny_config


def processor_of(pipe):
    return pipe.transformer.blocks[0].attn1.processor


def test_counts_and_budgets(recorder, monkeypatch):
    def half_skipped(query, key, value, config, **options):
        plan = full_plan(query, key, value, config)
        plan.level_mask[..., ::2] = 0
        return plan

    monkeypatch.setattr(operations, "build_plan", half_skipped)
    pipe = enable_psa(pipeline(), tiny_config(dense_layers=(1,)))
    generate(pipe, steps=4)
    statistics = psa_statistics(pipe)
    assert statistics.sparse_calls == 3 * 2
    assert statistics.dense_reasons == {"dense warm-up": 2 * LAYERS, "dense layer": 3 * 2}
    assert statistics.dense_calls == 10
    # 18 keys are 5 blocks, of which blocks 0, 2 and 4 are skipped.
    assert statistics.compute_budget_sparse == pytest.approx(2 / 5)
    assert statistics.compute_budget_all == pytest.approx((6 * 2 / 5 + 10) / 16)
    assert statistics.backend == "stand-in" and statistics.backend_reason == "a test asked for it"
    assert statistics.planning_seconds > 0 and statistics.attention_seconds > 0


def test_to_dict_is_json_and_complete(recorder):
    pipe = enable_psa(pipeline(), tiny_config())
    generate(pipe, steps=2)
    values = json.loads(json.dumps(psa_statistics(pipe).to_dict()))
    assert values["steps"] == [[0, 2, "dense"], [1, 2, "sparse"]]
    assert values["sparse_calls"] == values["dense_calls"] == 4
    assert values["compute_budget_sparse"] == 1.0
    assert set(values) == {
        *("sparse_calls", "dense_calls", "dense_reasons", "steps", "notes", "warnings"),
        *("backend", "backend_reason", "planner", "planner_reason"),
        *(
            "compute_budget_sparse",
            "compute_budget_all",
            "compute_budget_by_step",
            "planning_seconds",
            "calibration",
            "calibration_seconds",
            "attention_seconds",
        ),
    }


def test_nothing_counted_yet():
    statistics = psa_statistics(enable_psa(pipeline(), tiny_config()))
    assert statistics.compute_budget_sparse is statistics.compute_budget_all is statistics.last_step is None
    assert json.dumps(statistics.to_dict())


def test_each_run_counts_anew_and_reset_forgets(recorder):
    pipe = enable_psa(pipeline(), tiny_config())
    statistics = psa_statistics(pipe)
    counts = []
    for _ in range(2):
        generate(pipe, steps=4)
        counts.append((statistics.sparse_calls, statistics.dense_calls, len(statistics.steps)))
    assert counts == [(12, 4, 4)] * 2
    statistics.reset()
    assert (statistics.sparse_calls, statistics.dense_calls, statistics.steps) == (0, 0, [])


def test_the_last_step_is_there_for_a_progress_bar(recorder):
    pipe = enable_psa(pipeline(), tiny_config(dense_last=0.25))
    seen = []

    def look(pipe, index, timestep, inputs):
        seen.append(psa_statistics(pipe).last_step)
        return inputs

    generate(pipe, steps=4, callback_on_step_end=look)
    assert seen == [(0, 4, "dense"), (1, 4, "sparse"), (2, 4, "sparse"), (3, 4, "dense")]


def test_a_step_whose_calls_all_fell_back_is_called_dense(recorder):
    pipe = enable_psa(pipeline(), tiny_config(dense_layers=tuple(range(LAYERS))))
    generate(pipe, steps=4)
    assert [kind for *_, kind in psa_statistics(pipe).steps] == ["dense"] * 4


def test_notes_of_plans_are_kept_once(recorder, monkeypatch):
    def noted(query, key, value, config, **options):
        plan = full_plan(query, key, value, config)
        return Plan(**{**vars(plan), "notes": ("full tokens exceed the budget",)})

    monkeypatch.setattr(operations, "build_plan", noted)
    pipe = enable_psa(pipeline(), tiny_config())
    generate(pipe, steps=4)
    assert psa_statistics(pipe).notes == ["full tokens exceed the budget"]


@pytest.mark.parametrize("told", [True, False], ids=["named", "numbered"])
@pytest.mark.parametrize(
    ("refresh_every", "plans_a_branch_and_layer"), [(1, 6), (2, 3), (4, 2), (6, 1), (100, 1)]
)  # over 6 sparse steps
def test_plans_are_kept_for_refresh_every_steps(refresh_every, plans_a_branch_and_layer, told, recorder):
    pipe = enable_psa(pipeline(), tiny_config(refresh_every=refresh_every))
    if not told:
        del pipe.transformer.__dict__["cache_context"]
    generate(pipe, steps=8)
    assert len(recorder.plans) == plans_a_branch_and_layer * 2 * LAYERS
    assert recorder.steps(2 * LAYERS) == "ddssssss"
    assert not processor_of(pipe)._plans  # freed with the last step that could use them


def test_each_layer_and_branch_uses_its_own_plan(recorder, monkeypatch):
    made, used = [], []
    plan_of, attend = operations.build_plan, operations.attend
    monkeypatch.setattr(operations, "build_plan", lambda *args, **options: made.append(plan_of(*args)) or made[-1])
    monkeypatch.setattr(operations, "attend", lambda *args: used.append(args[4]) or attend(*args))
    pipe = enable_psa(pipeline(), tiny_config(refresh_every=3, dense_warmup=0.0))
    generate(pipe, steps=3)
    assert len(made) == 2 * LAYERS
    assert [made.index(plan) for plan in used] == list(range(2 * LAYERS)) * 3


def test_plans_end_with_dense_last_steps(recorder):
    pipe = enable_psa(pipeline(), tiny_config(refresh_every=100, dense_last=0.5))
    held = []

    def look(pipe, index, timestep, inputs):
        held.append(len(processor_of(pipe)._plans))
        return inputs

    generate(pipe, steps=8, callback_on_step_end=look)
    assert held == [0, 0, 4, 0, 0, 0, 0, 0]


def test_plans_of_one_expert_are_freed_by_the_next(recorder):
    pipe = enable_psa(pipeline("experts"), tiny_config(refresh_every=100, dense_warmup=0.0))
    held = []

    def look(pipe, index, timestep, inputs):
        held.append(len(processor_of(pipe)._plans))
        return inputs

    generate(pipe, steps=8, callback_on_step_end=look)
    assert max(held) == 2 * LAYERS and held[-1] == 0
    assert len(recorder.plans) == 2 * 2 * LAYERS


def test_an_interrupted_run_leaves_no_plan_to_the_next(recorder):
    pipe = enable_psa(pipeline(), tiny_config(refresh_every=100, dense_warmup=0.0))
    recorder.fail_at = 6
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, steps=4)
    assert processor_of(pipe)._plans
    recorder.fail_at = None
    recorder.plans.clear()
    generate(pipe, steps=4)
    assert len(recorder.plans) == 2 * LAYERS


@torch.no_grad()
def test_another_shape_makes_another_plan(recorder):
    pipe = enable_psa(pipeline(), tiny_config(refresh_every=100, dense_warmup=0.0))
    processor = processor_of(pipe)
    for index, (frames, width) in enumerate([(3, 6), (3, 6), (6, 6), (3, 12)]):
        with processor.step(index, 9):
            pipe.transformer(torch.ones(1, 16, frames, 4, width), torch.tensor([1]), torch.ones(1, 8, 16))
    assert [plan["grid"] for plan in recorder.plans] == [(3, 2, 3)] * LAYERS + [(6, 2, 3)] * LAYERS + [
        (3, 2, 6)
    ] * LAYERS


def test_counts_of_a_gpu_are_kept_in_few_pieces_of_memory(monkeypatch):
    """Tensors that live on one by one would take the next calls' places. The meta device stands in for a GPU."""
    monkeypatch.setattr(statistics, "_PIECE", 3)
    kept = statistics._Kept()
    counts = [kept.keep(torch.zeros(6, 1, heads, dtype=torch.int64, device="meta")) for heads in (2, 2, 5, 2, 2)]
    assert [tuple(tensor.shape) for tensor in counts] == [(6, 1, heads) for heads in (2, 2, 5, 2, 2)]
    first, second, other, third, fourth = (tensor._base for tensor in counts)
    assert first is second is third and len({id(piece) for piece in (first, other, fourth)}) == 3
    assert [counts[i].storage_offset() for i in (0, 1, 3, 4)] == [0, 12, 24, 0]
    tensor = torch.zeros(2)
    assert kept.keep(tensor) is tensor
