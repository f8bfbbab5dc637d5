"""psa-generate with no --model: the trained model inside the package, at a small size."""

from __future__ import annotations

import pytest

from psa_diffusers import demo
from psa_diffusers.metrics import read_video


@pytest.fixture(autouse=True)
def model():
    try:
        return demo.model_folder()
    except FileNotFoundError:
        pytest.skip("the trained model is not in this checkout yet")


def test_it_generates_and_compares(psa_generate, tmp_path):
    run = psa_generate(
        *("--prompt", "a red circle moving left on a blue background", "--compare", "--json"),
        *("--steps", 4, "--num-frames", 9, "--height", 128, "--width", 128, "--output", tmp_path / "out"),
    )
    assert run.code == 0, run.err
    record = run.json
    assert record["sparse_steps"] == 3 and record["fallbacks"] == []
    assert record["model"]["name"] == "bundled" and record["psnr"] > 10
    assert read_video(tmp_path / "out" / "video.mp4").shape == (9, 128, 128, 3)


def test_it_says_what_it_can_draw(psa_generate, tmp_path):
    run = psa_generate("--prompt", "zebras dance", "--output", tmp_path / "out")
    assert run.code == 2 and "unknown: zebras, dance" in run.err
    assert all(word in run.err for word in ("circle", "star", "red", "left", "--model"))


def test_its_defaults_fit_its_own_rules(model):
    values = demo.model_defaults(model)
    tokens = ((values["num_frames"] - 1) // 4 + 1) * (values["height"] // 16) * (values["width"] // 16)
    assert tokens >= 4000
    vocabulary = demo.model_vocabulary(model)
    known, unknown = vocabulary.split(vocabulary.example)
    assert len(known) >= 4 and not unknown


def test_the_stock_pipeline_loads_it(model):
    from diffusers import WanPipeline

    assert isinstance(demo.load_pipeline(), WanPipeline)
    assert sum(file.stat().st_size for file in model.rglob("*") if file.is_file()) <= 30 * 2**20
