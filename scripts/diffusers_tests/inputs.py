"""What some of diffusers' tests lack for a sparse call: amended in both runs, the native one and the one with PSA."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from types import SimpleNamespace

import torch.nn.functional as F
from diffusers.models.transformers import transformer_cosmos

AUDIO_TOKENS = 4


def amend_cosmos() -> None:
    """A stand-in for the one function of torchvision that Cosmos' forward calls, where torchvision is missing."""
    if importlib.util.find_spec("torchvision") is not None:
        return

    def resize(image, size, interpolation):
        return F.interpolate(image, size, mode=interpolation)

    functional, modes = SimpleNamespace(resize=resize), SimpleNamespace(NEAREST="nearest")
    transformer_cosmos.transforms = SimpleNamespace(functional=functional, InterpolationMode=modes)


def amend_minimax_h3(classes: Iterable[type]) -> None:
    """Positions of frames of 2 x 2 tokens in place of ones that no video has, and no more audio than video."""
    for tests in classes:
        layout = vars(tests).get("get_packed_layout")
        if layout is not None:
            layout.__globals__["NUM_AUDIO_TOKENS"] = AUDIO_TOKENS
            tests.get_packed_layout = _with_frames(layout)


def _with_frames(layout):
    def get_packed_layout(self, *args, **options) -> dict:
        packed = layout(self, *args, **options)
        video = packed["video_indices"]
        place = video - video[0]
        for axis, values in enumerate((video[0] + place // 4, place // 2 % 2, place % 2)):
            packed["position_ids"][video, axis] = values.to(packed["position_ids"].dtype)
        return packed

    return get_packed_layout
