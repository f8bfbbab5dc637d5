"""Context parallel: two processes compute what one does. They run on the CPU, over gloo, by diffusers' own code."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from psa_diffusers.integration import enable_psa, operations, parallel
from psa_diffusers.integration.processor import PSAProcessor
from psa_diffusers.integration.tokens import TokenLayout

from .parallel_worker import FAMILIES, forward, make_pipeline, prepare, run, sparse_cases
from .tiny_wan import LAYERS, pipeline, tiny_config

WORLD = 2
STEPS = 4  # the first is dense
CASES = sparse_cases()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each process saw, case by case."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", f"{__package__}.parallel_worker", folder]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    logs = [(folder / f"{rank}.log").open("w") for rank in range(WORLD)]
    processes = [
        subprocess.Popen(
            [str(word) for word in (*command, rank, WORLD)],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=log,
            stderr=log,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
        for log in logs:
            log.close()
    assert codes == [0] * WORLD, "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(WORLD))
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def of_case(ranks, name):
    found = [results.get(name) for results in ranks]
    if found[0] is None:
        pytest.skip("this diffusers does not split that")
    return found


def assert_same_as_one_process(parts, alone):
    heads = [part["plans"][0]["levels"].shape[1] for part in parts]
    for plans in zip(*(part["plans"] for part in parts), alone["plans"], strict=True):
        *shares, whole = plans
        for place, share in enumerate(shares):
            own = slice(sum(heads[:place]), sum(heads[: place + 1]))
            assert share["grid"] == whole["grid"]
            for tensor, expected in zip(share["tensors"], whole["tensors"], strict=True):
                torch.testing.assert_close(tensor, expected[:, :, own], rtol=1e-4, atol=1e-5)
            assert torch.equal(share["levels"], whole["levels"][:, own])
    for part in parts:
        torch.testing.assert_close(part["latents"], alone["latents"], rtol=1e-4, atol=1e-5)
        assert part["statistics"]["compute_budget_sparse"] == pytest.approx(
            alone["statistics"]["compute_budget_sparse"]
        )
        for name in ("sparse_calls", "dense_calls", "dense_reasons", "steps", "backend", "notes"):
            assert part["statistics"][name] == alone["statistics"][name]


@pytest.mark.parametrize("name", CASES)
def test_plans_results_and_statistics_are_those_of_one_process(name, ranks):
    kind, model, config, size, _ = CASES[name]
    alone = run(make_pipeline(kind, **model), config, size)
    assert alone["statistics"]["sparse_calls"] == (STEPS - 1) * 2 * LAYERS
    assert_same_as_one_process(of_case(ranks, name), alone)


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families(name, ranks):
    parts = of_case(ranks, name)
    alone = forward(*prepare(name), budget=0.5)
    assert alone["statistics"]["sparse_calls"] == 2 and alone["statistics"]["dense_calls"] == 0
    assert_same_as_one_process(parts, alone)


def test_one_lambda_for_all_heads(ranks):
    """Processes take different shares of the budget, which they do not when each one spends its own."""
    parts = of_case(ranks, "t2v")
    shares = [[(plan["levels"] == 1).float().mean() for plan in part["plans"]] for part in parts]
    assert shares[0] != shares[1]
    first = [operations.build_plan(*plan["tensors"], CASES["t2v"][2], grid=plan["grid"]) for plan in parts[0]["plans"]]
    own = [plan.level_mask for plan in first]
    assert not all(torch.equal(a, b["levels"]) for a, b in zip(own, parts[0]["plans"], strict=True))


@pytest.mark.parametrize("name", ["enabled before", "compiled"])
def test_other_ways_to_the_same(name, ranks):
    alone = run(make_pipeline(), tiny_config(backend="reference"))
    assert_same_as_one_process(of_case(ranks, name), alone)


def test_one_of_two_experts_is_parallel(ranks):
    alone = run(make_pipeline("experts"), tiny_config(backend="reference"))
    for part in of_case(ranks, "one expert"):
        torch.testing.assert_close(part["latents"], alone["latents"], rtol=1e-4, atol=1e-5)
        assert part["statistics"]["dense_reasons"] == alone["statistics"]["dense_reasons"]


def test_disabled_it_is_native(ranks):
    assert [part["equal"] for part in of_case(ranks, "disabled again")] == [True] * WORLD


@pytest.mark.parametrize("name", ["other tokens", "other tokens, uneven"])
def test_tokens_that_the_grid_does_not_explain_stay_dense_in_all_processes(name, ranks):
    for statistics in of_case(ranks, name):
        assert statistics["sparse_calls"] == 0
        assert statistics["dense_reasons"]["other tokens than the grid's"] == 2 * LAYERS


def test_what_cannot_be_split_is_said(ranks):
    for heads, tokens in zip(of_case(ranks, "heads"), of_case(ranks, "tokens"), strict=True):
        assert "3 attention heads cannot be split over ulysses_degree=2" in heads and "Use 3 processes" in heads
        assert "27 tokens cannot be split evenly over ulysses_degree=2" in tokens and "ulysses_anything" in tokens


def test_ring_attention_is_refused_in_all_processes(ranks):
    for said in of_case(ranks, "ring"):
        assert len(said) == 2
        for error in said:
            assert "does not run under ring attention" in error and "ulysses_degree instead" in error


def context(degree, **settings):
    return SimpleNamespace(ulysses_degree=degree, ring_degree=1, **settings)


@pytest.mark.parametrize(
    ("heads", "degree", "anything", "fits"),
    [(12, 4, False, True), (12, 8, False, False), (14, 5, True, True), (12, 8, True, False), (40, 8, False, True)],
)
def test_heads_over_processes(heads, degree, anything, fits):
    modules = [SimpleNamespace(heads=heads), SimpleNamespace()]
    if fits:
        parallel.check_sizes(context(degree, ulysses_anything=anything), modules, 40 * degree)
    else:
        with pytest.raises(ValueError, match=r"12 attention heads.*2, 3, 4, 6 or 12 processes"):
            parallel.check_sizes(context(degree, ulysses_anything=anything), modules, 40 * degree)


def test_text_in_the_sequence_stays_dense():
    """Each process would hold a part of the text behind its part of the video."""
    processor = PSAProcessor(pipeline().transformer, tiny_config())
    processor._call = SimpleNamespace(layout=TokenLayout((4, 4, 6), after=8), in_order=False)
    shared = SimpleNamespace(context_parallel_config=context(2))
    query = torch.ones(1, 52, 4, 12)
    reason = processor._dense_reason_of(query, query, query, {"parallel_config": shared})
    assert reason == "context parallel with text tokens"


def test_a_diffusers_without_the_exchange_stays_dense(monkeypatch):
    monkeypatch.setattr(parallel, "exchange", None)
    processor = PSAProcessor(pipeline().transformer, tiny_config())
    processor._call = SimpleNamespace(layout=TokenLayout((4, 4, 6)))
    query = torch.ones(1, 48, 4, 12)
    shared = SimpleNamespace(context_parallel_config=context(2))
    assert processor._dense_reason_of(query, query, query, {"parallel_config": shared}) == "context parallel"


def test_only_the_parallel_expert_learns_of_it():
    pipe = enable_psa(pipeline("experts"), tiny_config())
    shared = SimpleNamespace(context_parallel_config=context(2))
    pipe.transformer._parallel_config = shared
    pipe.transformer.blocks[0].attn1.processor._parallel_config = shared
    assert pipe.transformer.blocks[0].attn2.processor._parallel_config is shared
    assert pipe.transformer_2.blocks[0].attn2.processor._parallel_config is None
