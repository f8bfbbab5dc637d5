"""The small trained text-to-video model inside the package, and what goes with it.

The model folder is an ordinary diffusers pipeline; ``DiffusionPipeline.from_pretrained(model_folder())`` loads it.
Beside the weights lie ``defaults.json`` (how it is meant to be run) and ``vocabulary.json`` (what it can draw).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULTS_FILE = "defaults.json"
VOCABULARY_FILE = "vocabulary.json"


def model_folder() -> Path:
    """Folder of the bundled model.

    Raises:
        FileNotFoundError: this copy of the package came without it.
    """
    folder = Path(__file__).parent / "model"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"The bundled model is not in {folder}. Reinstall psa-diffusers, or name a Wan model by --model."
        )
    return folder


def load_pipeline(**options: Any):
    """The bundled model as a diffusers pipeline; options go to ``DiffusionPipeline.from_pretrained``."""
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(model_folder(), **options)


def model_defaults(folder: str | Path) -> dict[str, Any]:
    """Size, frames, steps, guidance and fps that the model in this folder is meant for; empty where it does not say."""
    path = Path(folder) / DEFAULTS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@dataclass(frozen=True)
class Vocabulary:
    """The words that a model with a small vocabulary knows.

    Attributes:
        groups: Words by what they are, e.g. ``{"colours": ("red", ...), "shapes": (...)}``.
        fillers: Known words that say nothing alone, e.g. "a".
    """

    groups: dict[str, tuple[str, ...]]
    fillers: tuple[str, ...] = ()

    def split(self, prompt: str) -> tuple[list[str], list[str]]:
        """The prompt's words that mean something to the model, and those that it does not know."""
        words = re.findall(r"[^\W_]+(?:'[^\W_]+)?", prompt.lower())
        meaningful = {word for group in self.groups.values() for word in group}
        known = [word for word in words if word in meaningful]
        unknown = [word for word in words if word not in meaningful and word not in self.fillers]
        return known, list(dict.fromkeys(unknown))

    def describe(self) -> str:
        """What the model can draw, as one line."""
        return "; ".join(f"{name}: {', '.join(words)}" for name, words in self.groups.items())


def model_vocabulary(folder: str | Path) -> Vocabulary | None:
    """The vocabulary of the model in this folder; None where it has none of its own (any prompt is fine then)."""
    path = Path(folder) / VOCABULARY_FILE
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    fillers = tuple(values.pop("fillers", ()))
    return Vocabulary({name: tuple(words) for name, words in values.items() if isinstance(words, list)}, fillers)
