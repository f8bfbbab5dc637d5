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
    """The words of a model with a small vocabulary of its own.

    Attributes:
        things: What it can draw, by kind: ``{"shapes": ("circle", ...), "colours": ("red", ...), ...}``.
        telling: Words that say what to draw: the things and their synonyms.
        known: All words that its tokenizer has, such as "a" and "background" too.
        example: A prompt that it understands; may be empty.
    """

    things: dict[str, tuple[str, ...]]
    telling: frozenset[str]
    known: frozenset[str]
    example: str = ""

    def split(self, prompt: str) -> tuple[list[str], list[str]]:
        """The prompt's words that say what to draw, and those that the model does not know, each once."""
        words = list(dict.fromkeys(re.findall(r"\w+", prompt.lower())))
        return [word for word in words if word in self.telling], [word for word in words if word not in self.known]

    def describe(self) -> str:
        """What the model can draw, as one line."""
        kinds = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in self.things.items())
        return f'{kinds}; e.g. "{self.example}"' if self.example else kinds


def model_vocabulary(folder: str | Path) -> Vocabulary | None:
    """The vocabulary of the model in this folder; None where it has none of its own (any prompt is fine then)."""
    path = Path(folder) / VOCABULARY_FILE
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    things = {kind: names for kind, names in values.items() if isinstance(names, dict)}
    telling = {name for names in things.values() for name in names}
    # Of a phrase such as "moves to the left" the name in it tells, the rest does not.
    phrases = [phrase for names in things.values() for synonyms in names.values() for phrase in synonyms]
    telling |= {phrase for phrase in phrases if " " not in phrase}
    tokenizer = json.loads((Path(folder) / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    known = telling | set(tokenizer["model"]["vocab"])
    example = next(iter(values.get("examples", ())), "")
    return Vocabulary({k: tuple(names) for k, names in things.items()}, frozenset(telling), frozenset(known), example)
