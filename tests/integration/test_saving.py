"""Saving, loading and copying pipelines on which PSA is enabled; pipelines made from their parts."""

import copy
import pickle

import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline, WanVideoToVideoPipeline

from psa_diffusers.integration import PSAProcessor, disable_psa, enable_psa, psa_statistics

from .checks import kinds
from .tiny_wan import LAYERS, generate, pipeline, tiny_config


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def load(folder, **options):
    pipe = DiffusionPipeline.from_pretrained(folder, text_encoder=None, tokenizer=None, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def saved(tmp_path):
    pipeline().save_pretrained(tmp_path / "native")
    return tmp_path / "native"


def test_a_pipeline_saved_with_psa_is_the_native_one(saved, tmp_path):
    pipe = load(saved)
    pipe.save_pretrained(tmp_path / "plain")
    sparse = generate(enable_psa(pipe, tiny_config()))
    pipe.save_pretrained(tmp_path / "sparse")
    assert files(tmp_path / "sparse") == files(tmp_path / "plain")
    again = load(tmp_path / "sparse")
    assert torch.equal(generate(again), generate(disable_psa(pipe)))  # PSA is a setting of the run, not of the model
    assert torch.equal(generate(enable_psa(again, tiny_config())), sparse)


def test_weights_load_into_a_transformer_with_psa():
    pipe, other = enable_psa(pipeline(), tiny_config(compute_budget=1.0, backend="reference")), pipeline("experts")
    pipe.transformer.load_state_dict(other.transformer_2.state_dict())
    expected = pipeline()
    expected.transformer = other.transformer_2
    torch.testing.assert_close(generate(pipe), generate(expected), rtol=1e-4, atol=1e-4)
    assert kinds(pipe) == "dsss"


def test_a_transformer_loaded_with_psa_on_goes_into_a_pipeline(saved):
    donor = enable_psa(load(saved), tiny_config())
    sparse = generate(donor)
    pipe = enable_psa(load(saved, transformer=donor.transformer), tiny_config())
    assert torch.equal(generate(pipe), sparse) and kinds(pipe) == "dsss"


def test_from_pipe_keeps_psa():
    one = enable_psa(pipeline(), tiny_config())
    other = WanVideoToVideoPipeline.from_pipe(one)
    other.set_progress_bar_config(disable=True)
    assert isinstance(other.transformer.blocks[0].attn1.processor, PSAProcessor)
    generate(enable_psa(other, tiny_config()), steps=8, strength=0.5)
    assert kinds(other) == "dsss"


@pytest.mark.parametrize("kind", ["t2v", "experts", "i2v"])
def test_a_deep_copy_has_psa_and_is_independent(kind):
    pipe = enable_psa(pipeline(kind), tiny_config())
    sparse = generate(pipe)
    twin = copy.deepcopy(pipe)
    psa_statistics(pipe).reset()
    assert torch.equal(generate(twin), sparse)
    assert psa_statistics(twin).sparse_calls == 3 * 2 * LAYERS and psa_statistics(pipe).sparse_calls == 0
    disable_psa(twin)
    assert torch.equal(generate(pipe), sparse)


def test_parts_in_another_pipeline():
    one = enable_psa(pipeline(), tiny_config())
    other = WanPipeline(**one.components)
    other.set_progress_bar_config(disable=True)
    first = generate(other)
    assert kinds(one) == kinds(other) == "dsss"
    assert torch.equal(first, generate(one))


@pytest.mark.parametrize("whole", [True, False], ids=["pipeline", "transformer"])
def test_what_was_pickled_is_dense_until_it_is_enabled_again(whole, caplog):
    """A pickled transformer does not drag its pipeline along, and so has none to read the step from."""
    pipe = enable_psa(pipeline(), tiny_config())
    sparse, native = generate(pipe), generate(pipeline())
    if whole:
        twin = pickle.loads(pickle.dumps(pipe))
    else:
        twin = pipeline()
        twin.transformer = pickle.loads(pickle.dumps(pipe.transformer))
    assert torch.equal(generate(twin), native)
    assert psa_statistics(twin).dense_reasons == {"step unknown": 4 * 2 * LAYERS}
    assert caplog.text.count("PSA stays dense: it cannot tell which denoising step is running") == 1
    assert torch.equal(generate(enable_psa(twin, tiny_config())), sparse) and kinds(twin) == "dsss"
    assert torch.equal(generate(disable_psa(twin)), native)
    assert torch.equal(generate(pipe), sparse)
