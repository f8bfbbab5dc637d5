"""Dense videos, kept by content: a folder for each, named by the hash of all that determines the frames."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ..metrics import read_video, write_lossless, write_video
from .denoise import Generated
from .errors import CommandError
from .output import DENSE_VIDEO, RECORD
from .run_record import device_name, versions, write_json
from .settings import GenerationSettings

FRAMES = "frames.mkv"
DETERMINING = ("torch", "diffusers", "transformers")  # packages whose version may change the frames
UNREAD = ("config", "preset", "offload", "model")  # settings that a dense video does not depend on


def dense_request(prompt: str, settings: GenerationSettings, identity: dict[str, str]) -> dict[str, Any]:
    """Everything that determines a dense video: what is asked for, the weights, the machine, and the software."""
    import torch

    asked = {name: value for name, value in settings.to_dict().items() if name not in UNREAD}
    asked["device"] = torch.device(settings.device).type
    machine = {"device_name": device_name(settings.device)}
    if asked["device"] == "cpu":
        machine["threads"] = torch.get_num_threads()
    found = versions()
    return {
        "prompt": prompt,
        **asked,
        **machine,
        "weights": {name: value for name, value in identity.items() if name != "name"} or identity,
        "versions": {name: found[name] for name in DETERMINING},
    }


def key_of(request: dict[str, Any]) -> str:
    """The name of its folder."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:32]


class DenseStore:
    """The folder of all dense videos. Each entry appears whole or not at all, whoever else writes at the same time."""

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self, key: str) -> tuple[np.ndarray, dict[str, Any]] | None:
        """Frames and record of an entry; None where it is missing, or where a bit of its frames is wrong."""
        try:
            record = json.loads((self.folder / key / RECORD).read_text(encoding="utf-8"))
            frames = read_video(self.folder / key / FRAMES)
        except (OSError, ValueError):
            return None
        return (frames, record) if record.get("frames_sha256") == _digest(frames) else None

    def video(self, key: str) -> Path:
        return self.folder / key / DENSE_VIDEO

    def save(
        self, key: str, request: dict[str, Any], run: Generated, fps: float, facts: dict[str, Any]
    ) -> dict[str, Any]:
        """Write an entry, and return its record."""
        record = {
            **request,
            **facts,
            "frames_sha256": _digest(run.frames),
            "seconds_total": run.total_seconds,
            "seconds_per_step": run.seconds_per_step("dense"),
            "seconds_of_steps": run.step_seconds,
        }
        target, partial = self.folder / key, self.folder / f".{key}.{os.getpid()}"
        try:
            partial.mkdir(parents=True, exist_ok=True)
            write_lossless(partial / FRAMES, run.frames, fps)
            write_video(partial / DENSE_VIDEO, run.frames, fps)
            write_json(partial / RECORD, record)
            shutil.rmtree(target, ignore_errors=True)  # what load() refused
            partial.replace(target)
        except OSError as error:
            raise CommandError(f"cannot write {target}: {error.strerror or error}. Disk full?") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return record


def _digest(frames: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(frames).tobytes()).hexdigest()
