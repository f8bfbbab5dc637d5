"""LPIPS (Zhang et al. 2018), when its package and its weights are there. Nothing is ever downloaded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .video_io import check_pair

# torchvision's AlexNet. Its file name carries the start of its SHA-256, which tells it from any other weights.
ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
ALEXNET_SHA256 = "7be5be79"


@dataclass(frozen=True)
class LPIPSResult:
    """A distance (lower is closer), or the reason why there is none.

    Attributes:
        value: Mean LPIPS over the frames; None where it could not be had.
        reason: Why ``value`` is None.
        invalid_value: What came out with weights that are not AlexNet's. It shows that the computation runs; it is
            not LPIPS and must never be reported as such.
        frames: The distance of every frame; None where ``value`` is.
    """

    value: float | None
    reason: str | None = None
    invalid_value: float | None = None
    frames: list[float] | None = None


def lpips(reference: np.ndarray, video: np.ndarray, weights: str | Path | None = None, batch: int = 8) -> LPIPSResult:
    """LPIPS (AlexNet, v0.1) between two videos, averaged over the frames.

    Args:
        reference, video: uint8 [frames, height, width, 3], of one shape.
        weights: File with torchvision's AlexNet weights. None looks into torch's own cache only.
        batch: Frames computed at a time.

    Returns:
        The distance; or None with the reason, when the package or the weights are missing or are other ones.
    """
    reference, video = check_pair(reference, video)
    module, reason = _import_lpips()
    if module is None:
        return LPIPSResult(None, reason)
    path, reason = _find_weights(weights)
    if path is None:
        return LPIPSResult(None, reason)
    try:
        network = _build(module, path)
    except Exception as error:
        return LPIPSResult(None, f"{path} does not hold AlexNet weights: {type(error).__name__}.")
    frames = _distances(network, reference, video, batch)
    value = sum(frames) / len(frames)
    if not _sha256(path).startswith(ALEXNET_SHA256):
        reason = f"{path} is not torchvision's AlexNet ({ALEXNET_FILE}), so the result is invalid."
        return LPIPSResult(None, reason, invalid_value=value)
    return LPIPSResult(value, frames=frames)


def _import_lpips():
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # a CUDA torchvision beside a CPU torch raises RuntimeError
        return None, f"torchvision cannot be imported ({type(error).__name__}); see the extra 'metrics'."
    try:
        import lpips as module
    except Exception as error:
        return None, f"lpips cannot be imported ({type(error).__name__}): pip install 'psa-diffusers[metrics]'."
    return module, None


def _find_weights(given: str | Path | None) -> tuple[Path | None, str | None]:
    import torch

    cached = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET_FILE
    path = Path(given) if given is not None else cached
    if path.is_file():
        return path, None
    if given is not None:
        return None, f"there is no file {path}."
    return None, f"AlexNet's weights are not here: give {ALEXNET_FILE} by --lpips-weights; nothing is downloaded."


def _build(module, path: Path):
    """The network with lpips' own linear weights and AlexNet's convolutions from the file."""
    import torch

    # pnet_rand skips the download; every random convolution is then replaced, and strict loading proves it.
    network = module.LPIPS(net="alex", pnet_rand=True, verbose=False).eval()
    state = torch.load(path, map_location="cpu", weights_only=True)
    convolutions = {name.removeprefix("features."): t for name, t in state.items() if name.startswith("features.")}
    own = network.net.state_dict()  # "slice2.3.weight" is AlexNet's "features.3.weight"
    network.net.load_state_dict({name: convolutions[name.split(".", 1)[1]] for name in own}, strict=True)
    return network


def _distances(network, reference: np.ndarray, video: np.ndarray, batch: int) -> list[float]:
    import torch

    def tensor(frames: np.ndarray):
        return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1

    distances = []
    with torch.no_grad():
        for start in range(0, len(video), batch):
            part = slice(start, start + batch)
            distances.append(network(tensor(reference[part]), tensor(video[part])).flatten())
    return torch.cat(distances).tolist()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
