"""What policies are compared on: synthetic and captured queries, keys and values, for tuning and for reporting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from psa_diffusers.synthetic import video_like_qkv

# The random fields of psa_diffusers.synthetic: smooth to noisy, peaked to flat.
CONTENTS = {
    "typical": dict(correlation=3.0, noise=0.3, temperature=1.0),
    "smooth": dict(correlation=4.0, noise=0.1, temperature=1.0),
    "smooth, peaked": dict(correlation=3.0, noise=0.1, temperature=0.6),
    "noisy, peaked": dict(correlation=2.0, noise=0.5, temperature=0.7),
    "flat": dict(correlation=3.0, noise=0.3, temperature=2.0),
}
POSITION = 0.3  # share of the common vector in the cases with rotary embedding
TUNING_SEED = 100
TUNING, REPORT = "tuning", "report"


@dataclass(frozen=True, eq=False)
class Case:
    """One attention call, [batch, tokens, heads, head_dim] each; scale 1 / sqrt(head_dim), no padding, no text.

    Here the batch is 1; whole videos are made in batches, and every policy treats a sample as if it were alone.
    """

    name: str
    source: str  # "synthetic" or "captured"
    query: Tensor
    key: Tensor
    value: Tensor
    grid: tuple[int, int, int]

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def tokens(self) -> int:
        return self.query.shape[1]

    @property
    def heads(self) -> int:
        return self.query.shape[2]

    @property
    def scale(self) -> float:
        return self.query.shape[3] ** -0.5

    @cached_property
    def dense(self) -> Tensor:
        heads_first = (tensor.transpose(1, 2) for tensor in self.inputs)
        return torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    def head(self, head: int) -> Case:
        """The case of one head."""
        return Case(self.name, self.source, *(x[:, :, head : head + 1] for x in self.inputs), self.grid)


def synthetic_cases(
    part: str,
    *,
    grid: tuple[int, int, int] = (8, 16, 32),
    heads: int = 4,
    head_dim: int = 64,
    seeds: int = 1,
    device: str = "cpu",
) -> Iterator[Case]:
    """Every content without and with rotary embedding; for TUNING with it alone, of another seed."""
    for seed in [TUNING_SEED] if part == TUNING else range(seeds):
        for name, settings in CONTENTS.items():
            for position in (POSITION,) if part == TUNING else (None, POSITION):
                tensors = video_like_qkv(
                    1, grid, heads, head_dim, seed=seed, position=position, device=device, **settings
                )
                label = f"{name}{'' if position is None else ', rotary'}, seed {seed}"
                yield Case(label, "synthetic", *tensors, grid)


def captured_cases(folder: Path, part: str, *, every: int = 1, device: str = "cpu") -> Iterator[Case]:
    """What ``capture.py`` wrote: the first prompt is for tuning, the others are for reporting; one call in ``every``.

    Raises:
        FileNotFoundError: there are no captures.
    """
    files = sorted(folder.glob("*.pt"))
    if len(files) < 2:
        raise FileNotFoundError(f"{folder} holds {len(files)} captured prompts, but 2 are needed: run capture.py.")
    for file in files[:1] if part == TUNING else files[1:]:
        for call in torch.load(file, map_location=device)[every - 1 :: every]:
            tensors = (call[name].float() for name in ("query", "key", "value"))
            label = f"{file.stem}, step {call['step']}, layer {call['layer']}"
            yield Case(label, "captured", *tensors, tuple(call["grid"]))


def all_cases(
    part: str, captures: Path | None, *, every: int = 1, device: str = "cpu", **synthetic: object
) -> Iterator[Case]:
    """All there are, or with ``seeds=0`` the captured ones alone."""
    if synthetic.get("seeds", 1):
        yield from synthetic_cases(part, device=device, **synthetic)
    if captures is not None:
        yield from captured_cases(captures, part, every=every, device=device)
