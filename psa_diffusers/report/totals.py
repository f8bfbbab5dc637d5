"""Rows and totals of a comparison: one row a clip and setting, and the mean of each setting with its interval."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from ..metrics import mean_with_interval
from .measures import MEASURES

DENSE = "dense"
MEANS = (*MEASURES, "compute_budget_sparse", "compute_budget_all", "seconds", "speedup", "speedup_sparse_steps")


def clip_row(clip: str, setting: str, record: dict[str, Any]) -> dict[str, Any]:
    """A row of ``clips.csv`` from the record of a sparse video."""
    dense, config = record["dense_run"], record["config"]
    return {
        "clip": clip,
        "prompt": record["prompt"],
        "seed": record["seed"],
        "setting": setting,
        "compute_budget_asked": None if config.get("budget_schedule") else config["compute_budget"],
        "compute_budget_sparse": record["compute_budget_sparse_calls"],
        "compute_budget_all": record["compute_budget_all_calls"],
        **{name: record[name] for name in MEASURES},
        "identical": record["identical"],
        "seconds": record["seconds_total"],
        "seconds_dense": dense["seconds_total"],
        "speedup": record["speedup"],
        "speedup_sparse_steps": record["speedup_sparse_steps"],
        "dense_steps": record["dense_steps"],
        "sparse_steps": record["sparse_steps"],
        "dense_calls": record["dense_calls"],
        "sparse_calls": record["sparse_calls"],
        "fallback_calls": sum(fallback["calls"] for fallback in record["fallbacks"]),
        "backend": record["backend"],
        "lpips_reason": record["lpips_reason"],
    }


def dense_row(clip: str, record: dict[str, Any]) -> dict[str, Any]:
    """The row of a dense video, from the record of a sparse one: the baseline, with nothing to measure it against."""
    dense = record["dense_run"]
    return {
        "clip": clip,
        "prompt": record["prompt"],
        "seed": record["seed"],
        "setting": DENSE,
        "compute_budget_all": 1.0,
        "identical": True,
        "seconds": dense["seconds_total"],
        "seconds_dense": dense["seconds_total"],
        "speedup": 1.0,
        "dense_steps": len(dense["seconds_of_steps"]),
        "sparse_steps": 0,
    }


def frame_rows(clip: str, setting: str, record: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """The rows of ``frames.csv``."""
    frames = record["frames"]
    for frame in range(len(frames["psnr"])):
        values = {name: frames[name][frame] if frames[name] else None for name in MEASURES}
        yield {"clip": clip, "setting": setting, "frame": frame, **values}


def totals(rows: Sequence[dict[str, Any]], confidence: float) -> list[dict[str, Any]]:
    """One entry a setting, in the order of the rows: the mean and interval of each number, over prompts.

    The PSNR of an identical clip is infinite: it is left out of the mean, and ``identical`` counts such clips.
    """
    entries = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        chosen = [row for row in rows if row["setting"] == setting]
        prompts = [row["prompt"] for row in chosen]
        entries.append(
            {
                "setting": setting,
                "clips": len(chosen),
                "prompts": len(set(prompts)),
                "identical": sum(row["identical"] for row in chosen) if setting != DENSE else None,
                **{
                    name: asdict(mean_with_interval([row.get(name) for row in chosen], prompts, confidence))
                    for name in MEANS
                },
            }
        )
    return entries


def flat(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of :func:`totals` as a row of ``totals.csv``."""
    row = {}
    for name, value in entry.items():
        if isinstance(value, dict):
            row |= {name: value["value"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
        else:
            row[name] = value
    return row
