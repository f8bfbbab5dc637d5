"""The composed run of a transformer: its parts are timed, and put together as it says."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "time_transformer.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("time_transformer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def test_composition(script):
    dense = {"outside": 1.0, "block": 2.0, "attention": 1.5}
    sparse = {"outside": 1.0, "block": 0.9, "attention": 0.0}
    row = script.compose(dense, sparse, layers=40, steps=50, budget=0.15)
    share = 60 / 81
    assert (row["dense_step"], row["sparse_step"], row["dense_steps"]) == (81.0, 37.0, 13)
    assert row["attention_share"] == pytest.approx(share)
    assert row["run_speedup"] == pytest.approx(50 * 81 / (13 * 81 + 37 * 37))
    assert row["ceiling"] == pytest.approx(1 / (0.26 + 0.74 * (1 - share + 0.15 * share)))
    assert row["share_of_ceiling"] == pytest.approx(row["run_speedup"] / row["ceiling"])


def test_attention_at_its_ideal_reaches_the_ceiling(script):
    dense = {"outside": 1.0, "block": 2.0, "attention": 1.5}
    sparse = {"outside": 1.0, "block": 0.5 + 0.15 * 1.5, "attention": 0.0}
    assert script.compose(dense, sparse, 40, 50, 0.15)["share_of_ceiling"] == pytest.approx(1.0)


def test_row_of_a_tiny_model(script, tmp_path, capsys):
    file = tmp_path / "rows.csv"
    given = ["--model", "tiny", "--device", "cpu", "--dtype", "float32", "--repeats", "2", "--csv", str(file)]
    assert script.main(given) == 0
    capsys.readouterr()
    (row,) = csv.DictReader(file.open(newline=""))
    assert (row["tokens"], row["blocks"], row["layers"], row["weights"]) == ("256", "2", "4", "random")
    assert row["backend"] == "torch" and "composed" in row and row["device_name"] and row["torch"]
    step = float(row["outside_blocks"]) + 4 * float(row["dense_block"])
    assert float(row["dense_step"]) == pytest.approx(step, rel=1e-4)
    assert 0 < float(row["dense_attention"]) < float(row["dense_block"])
    assert float(row["compute_budget"]) == pytest.approx(0.15, abs=0.02)


def test_steps_that_stay_dense_are_an_error(script):
    from types import SimpleNamespace

    with pytest.raises(RuntimeError, match=r"2 calls stayed dense: .*gradients needed"):
        counted = SimpleNamespace(dense_calls=2, sparse_calls=1, dense_reasons={"gradients needed": 2})
        script.check_sparse(counted, None)


def test_models_have_the_sizes_of_the_published_ones(script):
    from psa_diffusers.benchmark import SHAPES

    for name in ("wan2.1-14b-720p", "wan2.1-1.3b-480p"):
        settings, layers, (frames, height, width) = script.MODELS[name]
        assert (frames, height // 2, width // 2) == SHAPES[name].grid
        assert settings["num_attention_heads"] == SHAPES[name].heads
        assert layers == {"wan2.1-14b-720p": 40, "wan2.1-1.3b-480p": 30}[name]
