"""Videos laid out and named as VBench reads them: a folder for each model, ``<prompt>-<index>.mp4`` in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from ..metrics.video_io import whole_file
from .errors import WrongUsageError

READ_INDICES = 5  # VBench's standard mode reads <prompt>-0.mp4 to <prompt>-4.mp4
_NAME_BYTES = 255 - len(".-00.partial.mp4")


def check_names(prompts: Iterable[str], seeds: int) -> None:
    """Refuse prompts that cannot be a file's name: VBench finds a video by the whole prompt in it."""
    for prompt in prompts:
        if any(letter in prompt for letter in "/\\\0") or len(prompt.encode()) > _NAME_BYTES:
            raise WrongUsageError(
                f'--vbench: the prompt "{prompt[:60]}" cannot be in a file\'s name (a slash, or above {_NAME_BYTES} '
                "bytes). Leave it out, or leave --vbench out."
            )
    if seeds > READ_INDICES:
        raise WrongUsageError(f"--vbench: VBench reads {READ_INDICES} videos a prompt, but --seeds has {seeds}.")


def export(folder: Path, model: str, videos: Iterable[tuple[str, int, Path]]) -> int:
    """Copy videos to ``folder/model/<prompt>-<index>.mp4``. Nothing else may lie there: VBench reads whatever it finds.

    Args:
        folder: Of the export.
        model: Name of the setting: what VBench takes for a model.
        videos: Prompt, index and file of each.

    Returns:
        How many there are.
    """
    target = folder / model
    target.mkdir(parents=True, exist_ok=True)
    count = 0
    for prompt, index, video in videos:
        with whole_file(target / f"{prompt}-{index}.mp4") as partial:
            shutil.copyfile(video, partial)
        count += 1
    return count
