"""What the JSON files of a model in the diffusers layout say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

INDEX_FILES = ("model_index.json", "modular_model_index.json")  # the second of modular pipelines that have no other


def read_index(file: Path) -> dict[str, Any]:
    """The parts of a pipeline by name: [library, class], or [None, None] where it has none."""
    index = json.loads(file.read_text(encoding="utf-8"))
    for part, value in index.items():
        if isinstance(value, list) and len(value) == 3 and isinstance(value[2], dict):  # of a modular pipeline
            index[part] = list(value[2].get("type_hint") or value[:2])
    return index


def compression(vae: dict[str, Any]) -> tuple[int, int]:
    """How many frames, and pixels of a side, go into one of the latents, by a VAE's ``config.json``."""
    temporal, spatial = (vae.get(f"{axis}_compression_ratio") for axis in ("temporal", "spatial"))
    if temporal and spatial:  # HunyuanVideo, Cosmos, LTX-2
        return temporal, spatial
    if "spatio_temporal_scaling" in vae:  # LTX
        stages = 2 ** sum(vae["spatio_temporal_scaling"])
        return vae.get("patch_size_t", 1) * stages, vae.get("patch_size", 1) * stages
    if temporal:  # CogVideoX, Allegro
        return temporal, 2 ** (len(vae["block_out_channels"]) - 1)
    worked_out = _compression_of_class(vae)
    if worked_out is not None:
        return worked_out
    stages = vae.get("temperal_downsample", (False, True, True))  # Wan; diffusers spells it so
    return vae.get("scale_factor_temporal") or 2 ** sum(stages), vae.get("scale_factor_spatial") or 2 ** len(stages)


def _compression_of_class(vae: dict[str, Any]) -> tuple[int, int] | None:
    """What a VAE's class works out of its config, where it does (Mochi, EasyAnimate, MiniMax-H3)."""
    import diffusers
    import torch

    cls = getattr(diffusers, vae.get("_class_name") or "", None)
    if cls is None or "temperal_downsample" in vae:
        return None
    with torch.device("meta"):
        model = cls.from_config(vae)
    found = [getattr(model, f"{axis}_compression_ratio", None) for axis in ("temporal", "spatial")]
    return tuple(found) if all(found) else None
