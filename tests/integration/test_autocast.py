"""torch.autocast around a pipeline: sparse calls see what the native attention function would compute with."""

import pytest
import torch

from psa_diffusers.integration import disable_psa, enable_psa, operations, psa_calibration, psa_statistics

from .checks import kinds
from .tiny_wan import LAYERS, generate, pipeline, tiny_config

LOW = torch.bfloat16


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


def autocast(pipe, **run):
    with torch.autocast("cpu", LOW):
        return generate(pipe, **run)


@pytest.fixture
def planned(monkeypatch):
    """The dtypes that are planned with."""
    seen, build_plan = [], operations.build_plan

    def build(query, key, value, config, **options):
        seen.append({query.dtype, key.dtype, value.dtype})
        return build_plan(query, key, value, config, **options)

    monkeypatch.setattr(operations, "build_plan", build)
    return seen


@pytest.mark.parametrize("compiled", [False, True])
def test_a_pipeline_under_autocast(compiled, planned):
    pipe = pipeline()
    exact, native = generate(pipe), autocast(pipe)
    rounding = (native - exact).norm()
    assert rounding > 1e-3  # autocasting does something
    enable_psa(pipe, tiny_config(compute_budget=1.0, backend="reference"))
    if compiled:
        pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert (autocast(pipe) - native).norm() < 2 * rounding
    assert kinds(pipe) == "dsss" and psa_statistics(pipe).dense_reasons == {"dense warm-up": 2 * LAYERS}
    assert planned == [{LOW}] * 3 * 2 * LAYERS
    if not compiled:
        assert torch.equal(autocast(disable_psa(pipe)), native)


def test_plans_are_those_of_the_same_tensors_without_autocast(monkeypatch):
    """Estimates stay float32: only the tensors that come are of the lower dtype."""
    pipe, plans, build_plan = enable_psa(pipeline(), tiny_config()), [], operations.build_plan

    def build(query, key, value, config, **options):
        plan = build_plan(query, key, value, config, **options)
        with torch.autocast("cpu", enabled=False):
            again = build_plan(query, key, value, config, **options)
        plans.append(torch.equal(plan.level_mask, again.level_mask))
        return plan

    monkeypatch.setattr(operations, "build_plan", build)
    autocast(pipe)
    assert len(plans) == 3 * 2 * LAYERS and all(plans)


def test_calibrating_under_autocast():
    pipe = enable_psa(pipeline(), tiny_config(), calibrate=True)
    autocast(pipe, steps=8)
    assert psa_calibration(pipe).schedule and kinds(pipe)[:2] == "dd" and "s" in kinds(pipe)
