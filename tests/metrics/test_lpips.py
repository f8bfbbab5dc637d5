"""LPIPS: never downloaded, never reported with other weights than AlexNet's, and its absence explained.

The lpips package and torchvision are not in the test environment, so a stand-in with the same layout takes their place
where only our plumbing is tested; ``test_the_real_package`` runs where they are installed.
"""

from __future__ import annotations

import builtins
import sys
import types

import numpy as np
import pytest
import torch

from psa_diffusers.metrics import lpips

lpips_module = sys.modules["psa_diffusers.metrics.lpips"]
CHANNELS = {0: (3, 64, 11), 3: (64, 192, 5), 6: (192, 384, 3), 8: (384, 256, 3), 10: (256, 256, 3)}
SLICES = {0: 1, 3: 2, 6: 3, 8: 4, 10: 5}


@pytest.fixture
def videos():
    rng = np.random.default_rng(0)
    return tuple(rng.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8) for _ in range(2))


@pytest.fixture
def random_weights(tmp_path):
    """A file laid out as torchvision's AlexNet, with random numbers."""
    generator = torch.Generator().manual_seed(0)
    state = {"classifier.1.weight": torch.zeros(1)}
    for index, (inputs, outputs, size) in CHANNELS.items():
        state[f"features.{index}.weight"] = torch.randn(outputs, inputs, size, size, generator=generator) * 0.05
        state[f"features.{index}.bias"] = torch.zeros(outputs)
    torch.save(state, tmp_path / "alexnet.pth")
    return tmp_path / "alexnet.pth"


class StandIn(torch.nn.Module):
    """Named and called as lpips.LPIPS; the distance is that of the first convolution."""

    def __init__(self, net, pnet_rand, verbose):
        super().__init__()
        assert net == "alex" and pnet_rand and not verbose  # anything else would download
        self.net = torch.nn.Module()
        for index, (inputs, outputs, size) in CHANNELS.items():
            stage = torch.nn.Module()
            stage.add_module(str(index), torch.nn.Conv2d(inputs, outputs, size))
            self.net.add_module(f"slice{SLICES[index]}", stage)

    def forward(self, a, b):
        first = self.net.slice1._modules["0"]
        assert a.min() >= -1 and a.max() <= 1 and a.shape[1] == 3
        return (first(a) - first(b)).square().mean(dim=(1, 2, 3), keepdim=True)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=StandIn))


def refuse_import(monkeypatch, name, error):
    real = builtins.__import__
    monkeypatch.delitem(sys.modules, name, raising=False)

    def importing(module, *arguments, **options):
        level = arguments[3] if len(arguments) > 3 else options.get("level", 0)
        if module == name and level == 0:
            raise error
        return real(module, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", importing)


def test_a_cuda_torchvision_beside_a_cpu_torch_is_a_reason_not_a_crash(videos, monkeypatch):
    refuse_import(monkeypatch, "torchvision", RuntimeError("operator torchvision::nms does not exist"))
    result = lpips(*videos)
    assert result.value is None and "torchvision cannot be imported (RuntimeError)" in result.reason


def test_a_missing_package_names_the_extra(videos, stand_in, monkeypatch):
    refuse_import(monkeypatch, "lpips", ModuleNotFoundError("No module named 'lpips'"))
    result = lpips(*videos)
    assert result.value is None and "psa-diffusers[metrics]" in result.reason


def test_missing_weights_are_a_reason_and_no_download(videos, stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    result = lpips(*videos)
    assert result.value is None and "nothing is downloaded" in result.reason
    assert lpips(*videos, weights=tmp_path / "none.pth").reason.startswith("there is no file")


def test_random_weights_run_but_are_marked_invalid(videos, stand_in, random_weights):
    result = lpips(*videos, weights=random_weights)
    assert result.value is None
    assert result.invalid_value > 0
    assert "invalid" in result.reason
    assert lpips(videos[0], videos[0], weights=random_weights).invalid_value == 0


def test_the_result_does_not_depend_on_the_batch(videos, stand_in, random_weights):
    one, all_at_once = (lpips(*videos, weights=random_weights, batch=batch).invalid_value for batch in (1, 8))
    assert one == pytest.approx(all_at_once, rel=1e-5)


def test_a_file_with_other_content_is_a_reason(videos, stand_in, tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    assert "does not hold AlexNet weights" in lpips(*videos, weights=tmp_path / "text.pth").reason
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "few.pth")
    assert "does not hold AlexNet weights" in lpips(*videos, weights=tmp_path / "few.pth").reason


def test_the_right_hash_makes_it_a_value(videos, stand_in, random_weights, monkeypatch):
    monkeypatch.setattr(lpips_module, "_sha256", lambda path: lpips_module.ALEXNET_SHA256 + "0" * 56)
    result = lpips(*videos, weights=random_weights)
    assert result.value > 0 and result.reason is None and result.invalid_value is None


def test_the_real_package(videos, random_weights):
    try:
        import lpips as package  # noqa: F401
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"lpips or torchvision cannot be imported: {type(error).__name__}")
    result = lpips(*videos, weights=random_weights)
    assert result.value is None and result.invalid_value > 0
