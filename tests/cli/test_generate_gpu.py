"""psa-generate on a CUDA device: defaults, dtypes, offloading, and times that wait for no step."""

from __future__ import annotations

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
PROMPT = ("--prompt", "a red circle moves left")


def test_the_default_is_cuda_and_triton(psa_generate, saved_model, tmp_path):
    run = psa_generate(*PROMPT, "--model", saved_model, "--compare", "--json", "--output", tmp_path / "out")
    record = run.json
    assert record["device"] == "cuda" and record["dtype"] in ("bfloat16", "float16")
    assert record["backend"] == "triton" and record["sparse_steps"] == 3 and record["fallbacks"] == []
    assert record["device_name"] == torch.cuda.get_device_name()
    assert 0 < sum(record["seconds_of_steps"]) <= record["seconds_total"] * 1.05
    assert record["psnr"] is None or record["psnr"] > 15


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_same_seed_gives_the_same_file(psa_generate, saved_model, tmp_path, dtype):
    for name in ("a", "b"):
        run = psa_generate(*PROMPT, "--model", saved_model, "--dtype", dtype, "--output", tmp_path / name)
        assert run.code == 0, run.err
    assert (tmp_path / "a" / "video.mp4").read_bytes() == (tmp_path / "b" / "video.mp4").read_bytes()


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloading_changes_where_not_what(psa_generate, saved_model, tmp_path, offload):
    run = psa_generate(*PROMPT, "--model", saved_model, "--output", tmp_path / "a")
    run = psa_generate(*PROMPT, "--model", saved_model, "--offload", offload, "--output", tmp_path / "b", "--json")
    assert run.code == 0, run.err
    assert run.json["sparse_steps"] == 3 and run.json["fallbacks"] == []
    assert (tmp_path / "a" / "video.mp4").read_bytes() == (tmp_path / "b" / "video.mp4").read_bytes()


def test_the_noise_is_that_of_the_cpu(psa_generate, saved_model, tmp_path):
    """One dense step in float32 from the same seed looks the same on both."""
    from psa_diffusers.metrics import psnr, read_video

    (tmp_path / "dense.yaml").write_text("dense_warmup: 1.0\n")
    for device in ("cpu", "cuda"):
        arguments = ("--device", device, "--dtype", "float32", "--config", tmp_path / "dense.yaml", "--steps", 1)
        assert psa_generate(*PROMPT, "--model", saved_model, *arguments, "--output", tmp_path / device).code == 0
    assert psnr(*(read_video(tmp_path / device / "video.mp4") for device in ("cpu", "cuda"))) > 35
