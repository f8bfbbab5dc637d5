"""Whole pipelines with images, sound, guiders or windows: all steps are found, in each window anew."""

from __future__ import annotations

import pytest
import torch

from psa_diffusers.integration import disable_psa, enable_psa, operations, psa_statistics, schedule

from .tiny_pipelines import PIPELINES
from .tiny_wan import tiny_config

STEPS = 4


def generate(pipe, tiny):
    inputs = {"num_inference_steps": STEPS} if "pyramid_num_inference_steps_list" not in tiny.run else {}
    inputs |= {"output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    outputs = pipe(**inputs, **tiny.run, return_dict=False)
    return outputs[0][-1] if isinstance(outputs[0], list) else outputs[0]


@pytest.fixture
def counted(monkeypatch):
    """How many sparse calls there were, over all windows (statistics are of the last one)."""
    calls, attend = [], operations.attend
    monkeypatch.setattr(operations, "attend", lambda *args: calls.append(1) or attend(*args))
    return calls


@pytest.mark.parametrize("readable", [True, False], ids=["cpu", "as on a gpu"])
@pytest.mark.parametrize("name", PIPELINES)
def test_steps_and_calls(name, readable, counted, monkeypatch):
    if not readable:
        monkeypatch.setattr(schedule, "_is_readable", lambda *_: False)
    tiny = PIPELINES[name]
    pipe = tiny.build()
    native = generate(pipe, tiny)
    enable_psa(pipe, tiny_config(backend="reference", dense_last=0.25))
    sparse = generate(pipe, tiny)
    statistics = psa_statistics(pipe)
    assert [kind for *_, kind in statistics.steps] == ["dense", "sparse", "sparse", "dense"]
    assert statistics.dense_reasons == {"dense warm-up": tiny.calls, "dense last steps": tiny.calls}
    assert statistics.sparse_calls == 2 * tiny.calls and len(counted) == 2 * tiny.calls * tiny.windows
    assert (sparse - native).abs().max() > 1e-5
    enable_psa(pipe, tiny_config(backend="reference", compute_budget=1.0))
    # Of the whole, since some windows begin with what was decoded and encoded again.
    assert (generate(pipe, tiny) - native).norm() < 1e-4 * native.norm()
    assert torch.equal(generate(disable_psa(pipe), tiny), native)
