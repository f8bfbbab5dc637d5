"""Errors of sparse calls, measured while a pipeline runs: the true ones, of a run that they do not change."""

import pytest
import torch

from psa_diffusers import enable_psa
from psa_diffusers.calibration import probe
from psa_diffusers.integration import capture_attention, operations, watch_errors

from .tiny_wan import LAYERS, generate, pipeline, tiny_config

LARGE = {"height": 64, "width": 96, "num_frames": 17}  # 5 x 4 x 6 = 120 tokens
BEFORE = operations.attend


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert operations.attend is BEFORE


def sparse_pipeline(**settings):
    config = tiny_config(dense_warmup=0.5, compute_budget=0.3, **settings)
    return enable_psa(pipeline("t2v", "euler"), config), config


def hooks_of(pipe):
    return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in pipe.transformer.modules()]


def test_the_run_stays_what_it_was_and_every_sparse_call_is_seen():
    pipe, _ = sparse_pipeline()
    expected, hooks = generate(pipe, steps=4, **LARGE), hooks_of(pipe)
    with watch_errors(pipe) as errors:
        assert torch.equal(generate(pipe, steps=4, **LARGE), expected)
    places = [("transformer", step, layer) for step in (2, 3) for layer in range(LAYERS)]
    assert list(errors.squared_errors()) == places
    assert hooks_of(pipe) == hooks


def test_the_errors_are_those_of_the_outputs(monkeypatch):
    """Where all queries are looked at: of both branches together, as captured calls have them."""
    monkeypatch.setattr(probe, "chosen_blocks", lambda whole: list(range(whole)))
    pipe, config = sparse_pipeline(query_block_size=8)
    with watch_errors(pipe) as errors:
        generate(pipe, steps=4, **LARGE)
    with capture_attention(pipe) as calls:
        generate(pipe, steps=4, **LARGE)
    for (_, step, layer), error in errors.squared_errors().items():
        own = [call for call in calls if (call.step.index, call.layer) == (step, layer)]
        lost = sum((call.attend(config).double() - call.dense()).square().sum() for call in own)
        power = sum(call.dense().double().square().sum() for call in own)
        assert len(own) == 2 and error == pytest.approx(float(lost / power), rel=1e-4)


def test_the_total_is_weighted_and_dense_places_count_as_exact():
    pipe, _ = sparse_pipeline()
    with watch_errors(pipe) as errors:
        generate(pipe, steps=4, **LARGE)
    squares = errors.squared_errors()
    assert errors.total() == pytest.approx((sum(squares.values()) / len(squares)) ** 0.5)
    last = [square for (_, step, _), square in squares.items() if step == 3]
    assert errors.total([0, 0, 0, 1]) == pytest.approx((sum(last) / len(last)) ** 0.5)
    dense = [("transformer", 1, layer) for layer in range(LAYERS)]
    assert errors.total(None, [*squares, *dense]) == pytest.approx(errors.total() * (4 / 6) ** 0.5)


def test_padding_counts_neither_in_the_sparse_nor_in_the_dense_output():
    pipe, _ = sparse_pipeline(order="raster")
    with watch_errors(pipe) as errors:
        generate(pipe, steps=4, num_frames=17, height=48, width=80)
    assert 0 < errors.total() < 1


def test_without_sparse_calls_there_is_no_total():
    with watch_errors(pipeline()) as errors:
        pass
    with pytest.raises(ValueError, match="no sparse call was seen"):
        errors.total()


def test_a_compiled_pipeline_is_refused():
    pipe, _ = sparse_pipeline()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match="watch_errors: the transformer is compiled; watch before it is"):  # noqa: SIM117
        with watch_errors(pipe):
            pass
