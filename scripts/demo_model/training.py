"""What both training scripts share: clocks, checkpoints, weight averages, the learning rate."""

from __future__ import annotations

import copy
import math
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn


def learning_rate(peak: float, progress: float, floor: float = 0.05, warmup: float = 0.02) -> float:
    """Linear warm-up, then a cosine from `peak` down to `floor * peak`; `progress` runs from 0 to 1."""
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return peak * max(progress / warmup, 0.02)
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    return peak * (floor + (1 - floor) * cosine)


class Average:
    """Exponential moving average of a module's weights, warmed up so that early steps are forgotten."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move the average towards the module's current weights."""
        self.updates += 1
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), weight)


class Clock:
    """Training time over all sessions of a run, in seconds, against a budget in minutes."""

    def __init__(self, minutes: float, already: float = 0.0) -> None:
        self.budget = minutes * 60
        self.already = already
        self.start = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds trained in all sessions."""
        return self.already + time.monotonic() - self.start

    @property
    def progress(self) -> float:
        """Share of the budget that is used."""
        return self.elapsed / self.budget


def random_state() -> dict:
    """States of the generators that training draws from."""
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}


def set_random_state(state: dict) -> None:
    """Continue from what `random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def save_checkpoint(path: Path, state: dict) -> None:
    """Write a checkpoint so that a crash never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint written by `save_checkpoint` (own files only: it unpickles)."""
    return torch.load(path, map_location="cpu", weights_only=False)
