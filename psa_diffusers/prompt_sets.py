"""The standard sets of prompts in ``configs/prompts``."""

from __future__ import annotations

from pathlib import Path

from .config import configs_folder


def prompt_sets() -> dict[str, Path]:
    """The files of the sets by name."""
    return {file.stem: file for file in sorted((configs_folder() / "prompts").glob("*.txt"))}


def prompt_set(name: str) -> Path:
    """The file of a set, one prompt a line.

    Raises:
        ValueError: there is no set of that name (the message lists those there are).
    """
    sets = prompt_sets()
    if name not in sets:
        raise ValueError(f"prompt_set: no set {name!r}; there are {', '.join(sets)}.")
    return sets[name]
