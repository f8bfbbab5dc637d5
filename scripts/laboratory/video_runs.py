"""Runs settings over prompts, a row a clip, appended to a CSV file at once; what is in the file is not run again."""

from __future__ import annotations

import csv
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import read_rows
from torch import Tensor
from video_metrics import psnr_of_videos, ssim_of_videos
from video_model import Clips, VideoModel
from video_settings import Setting

from psa_diffusers.metrics import lpips

KEY = ("run", "experiment", "policy", "variant", "budget", "schedule", "dense_first", "dense_last", "prompt", "seed")
MEASURED = ("achieved", "achieved_all", "estimator", "psnr", "ssim", "lpips", "lpips_reason")
COLUMNS = (*KEY, "steps", *MEASURED, "sparse_step_seconds", "dense_step_seconds", "batch")


@dataclass
class Runs:
    """Where and how settings are run.

    Attributes:
        run: A name for model, sizes, dtype and device, the same for the same ones; rows of others are left alone.
        deadline: By ``time.monotonic()``; no run begins after it. None = no limit.
        failures: Settings that raised, with their errors.
    """

    model: VideoModel
    file: Path
    run: str
    batch: int = 16
    deadline: float | None = None
    failures: list[str] = field(default_factory=list)
    _dense: dict[tuple, Clips] = field(default_factory=dict)

    def run_all(self, settings: Sequence[Setting], prompts: Sequence[tuple[str, int]]) -> bool:
        """All settings over all (prompt, seed); False where the time was over before."""
        done = {row_key(row) for row in read_rows(self.file)} if self.file.is_file() else set()
        for number, setting in enumerate(settings, start=1):
            for start in range(0, len(prompts), self.batch):
                batch = prompts[start : start + self.batch]
                missing = [pair for pair in batch if row_key(self._facts(setting, *pair)) not in done]
                if not missing:
                    continue
                if self.deadline is not None and time.monotonic() > self.deadline:
                    say(f"Time is over after {number - 1} of {len(settings)} settings.")
                    return False
                self._run_one(setting, batch, missing, f"{number} of {len(settings)}")
        return True

    def _run_one(self, setting: Setting, batch: Sequence[tuple[str, int]], missing: Sequence, which: str) -> None:
        begin = time.monotonic()
        try:
            rows = list(self._measure(setting, batch))
        except Exception as error:  # one setting that fails must not take the others with it
            name = f"{setting.name} {setting.variant} @ {setting.budget:.4g} {setting.schedule}"
            self.failures.append(f"{name}: {type(error).__name__}: {error}")
            traceback.print_exc()
            return
        append_rows(self.file, [row for row in rows if (row["prompt"], row["seed"]) in missing])
        psnr = sum(row["psnr"] for row in rows) / len(rows)
        name = f"{setting.name} ({setting.variant})" if setting.variant else setting.name
        steps = f"{setting.dense_first}+{setting.dense_last} dense, {setting.schedule}"
        say(f"{which}: {name} @ {setting.budget:.4g}, {steps}: {psnr:.2f} dB, {time.monotonic() - begin:.1f} s")

    def _facts(self, setting: Setting, prompt: str, seed: int) -> dict[str, Any]:
        named = {"experiment": setting.experiment, "policy": setting.name, "variant": setting.variant}
        steps = {"dense_first": setting.dense_first, "dense_last": setting.dense_last, "schedule": setting.schedule}
        return {"run": self.run, **named, "budget": round(setting.budget, 6), **steps, "prompt": prompt, "seed": seed}

    def _measure(self, setting: Setting, batch: Sequence[tuple[str, int]]) -> Iterator[dict[str, Any]]:
        dense, sparse = self.dense(batch), self.model.sparse(*zip(*batch, strict=True), setting)
        closeness = measures(dense.frames, sparse.frames)
        steps, whole = self.model.steps, setting.dense_first + setting.dense_last
        for pair, cost, close in zip(batch, sparse.costs, closeness, strict=True):
            yield {
                **self._facts(setting, *pair),
                "steps": steps,
                "achieved": round(cost, 6),
                "achieved_all": round((whole + (steps - whole) * cost) / steps, 6),
                "estimator": round(sparse.estimator, 6),
                **close,
                "sparse_step_seconds": round(sparse.sparse_seconds, 6),
                "dense_step_seconds": round(dense.dense_seconds, 6),
                "batch": len(batch),
            }

    def dense(self, batch: Sequence[tuple[str, int]]) -> Clips:
        """The dense videos, made once."""
        if tuple(batch) not in self._dense:
            self._dense[tuple(batch)] = self.model.dense(*zip(*batch, strict=True))
        return self._dense[tuple(batch)]


def measures(reference: Tensor, video: Tensor) -> list[dict[str, Any]]:
    """PSNR, SSIM and LPIPS of each video of two batches."""
    found = zip(reference, video, psnr_of_videos(reference, video), ssim_of_videos(reference, video), strict=True)
    rows = []
    for a, b, psnr, ssim in found:
        first = lpips(a[:1].cpu().numpy(), b[:1].cpu().numpy())  # cheap, and tells whether it can be had
        distance = first if first.value is None else lpips(a.cpu().numpy(), b.cpu().numpy())
        rows.append(
            {"psnr": round(psnr, 4), "ssim": round(ssim, 6), "lpips": "", "lpips_reason": distance.reason or ""}
        )
        if distance.value is not None:
            rows[-1]["lpips"] = round(distance.value, 6)
    return rows


def row_key(row: dict[str, Any]) -> tuple[str, ...]:
    """The same for a row that was read and for one to be written."""
    numbers: dict[str, Callable] = {"budget": float, "dense_first": int, "dense_last": int, "seed": int}
    return tuple(str(numbers.get(name, str)(row[name])) for name in KEY)


def append_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = not file.is_file()
    with file.open("a", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
