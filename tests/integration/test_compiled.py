"""Compiled repeated blocks: one graph, two after the switch from dense to sparse, none after; counted as uncompiled."""

import pytest
import torch

from psa_diffusers.integration import disable_psa, enable_psa, operations, psa_statistics

from .test_models import forward
from .tiny_models import TINY
from .tiny_wan import generate, pipeline, tiny_config, transformer


class Graphs:
    """A compiler backend that counts graphs and runs them as they are."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


LAYERS = 12  # more than the compiler's limit of variants (8)


def deep(seed=0):
    return transformer(num_layers=LAYERS, seed=seed)


@pytest.mark.parametrize("dense_layers", [(), (1, 3)])
def test_repeated_blocks_compile_to_two_graphs(dense_layers):
    pipe, graphs = pipeline(), Graphs()
    pipe.transformer = deep()
    settings = {"backend": "reference", "compute_budget": 0.5, "dense_layers": dense_layers, "dense_last": 0.25}
    uncompiled = generate(enable_psa(pipe, tiny_config(**settings)), steps=4)
    expected = psa_statistics(pipe).to_dict()
    enable_psa(pipe, tiny_config(**settings))
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=graphs)
    counts = []

    def look(pipe, index, timestep, inputs):
        counts.append(graphs.count)
        return inputs

    compiled = generate(pipe, steps=4, callback_on_step_end=look)
    torch.testing.assert_close(compiled, uncompiled, rtol=1e-4, atol=1e-4)
    assert counts == [1, 2, 2, 2]
    generate(pipe, steps=4)
    assert graphs.count == 2
    statistics = psa_statistics(pipe).to_dict()
    for name in ("sparse_calls", "dense_calls", "dense_reasons", "steps", "compute_budget_sparse"):
        assert statistics[name] == expected[name], name


def test_plans_are_kept_in_compiled_blocks(monkeypatch):
    made, build_plan = [], operations.build_plan
    monkeypatch.setattr(
        operations, "build_plan", lambda *args, **options: made.append(1) or build_plan(*args, **options)
    )
    pipe = pipeline()
    pipe.transformer = deep()
    enable_psa(pipe, tiny_config(refresh_every=2, backend="reference"))
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=Graphs())
    generate(pipe, steps=5)  # 2 dense, 3 sparse steps
    assert len(made) == 2 * 2 * LAYERS


def test_a_compiled_transformer_runs_with_breaks_at_the_hooks():
    pipe, graphs = pipeline(), Graphs()
    enable_psa(pipe, tiny_config(backend="reference"))
    expected = generate(pipe, steps=4)
    model = pipe.transformer
    pipe.transformer = torch.compile(model, backend=graphs)
    torch.testing.assert_close(generate(pipe, steps=4), expected, rtol=1e-4, atol=1e-4)
    assert graphs.count > 0
    statistics = psa_statistics(pipe)
    assert [kind for *_, kind in statistics.steps] == ["dense", "sparse", "sparse", "sparse"]
    assert statistics.sparse_calls == 3 * 2 * 2


def test_a_transformer_compiled_as_one_full_graph_is_refused():
    pipe = enable_psa(pipeline(), tiny_config())
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="compile_repeated_blocks"):
        generate(pipe, steps=2)


def test_joint_attention_under_a_padding_mask():
    """HunyuanVideo: two kinds of blocks, text in the sequence, a mask that the opaque operation must honour."""
    tiny = TINY["hunyuan"]
    model, inputs = tiny.build(), tiny.inputs((3, 4, 5), 2)
    changed = dict(inputs)
    tiny.change_padding(changed)
    settings = {"compute_budget": 0.5, "dense_warmup": 0.0, "backend": "reference"}
    expected = forward(enable_psa(model, tiny_config(**settings)), inputs)
    graphs = Graphs()
    disable_psa(model)
    enable_psa(model, tiny_config(**settings))
    model.compile_repeated_blocks(fullgraph=True, backend=graphs)
    torch.testing.assert_close(forward(model, inputs), expected, rtol=1e-4, atol=1e-4)
    count = graphs.count
    torch.testing.assert_close(forward(model, changed), expected, rtol=1e-4, atol=1e-4)
    assert graphs.count == count  # nothing is compiled anew
    assert psa_statistics(model).sparse_calls == 2 * tiny.calls and psa_statistics(model).dense_calls == 0
