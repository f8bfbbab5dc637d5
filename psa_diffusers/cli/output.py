"""Output folders: checked before the work starts, written whole or not at all."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import CommandError, WrongUsageError
from .run_record import write_json

VIDEO, DENSE_VIDEO, SIDE_BY_SIDE, RECORD = "video.mp4", "dense.mp4", "side_by_side.mp4", "run.json"
FILES = (VIDEO, DENSE_VIDEO, SIDE_BY_SIDE, RECORD)


def default_folder(prompt: str, seed: int) -> Path:
    """``outputs/`` and a name made of the prompt and the seed."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-") or "video"
    return Path("outputs") / f"{words}-seed{seed}"


def check_writable(folder: Path) -> None:
    """Make the folder, and prove that a file can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise WrongUsageError(
            f"cannot write to the output folder {folder} ({error.strerror}). Name another by --output."
        ) from error


class RunFolder:
    """One video's folder. Its ``run.json`` is there before the first video, and says ``finished`` after the last."""

    def __init__(self, path: Path):
        self.path = path

    def existing(self) -> list[str]:
        return [name for name in FILES if (self.path / name).exists()]

    def record(self) -> dict[str, Any]:
        """The record of the run in this folder; empty where there is none."""
        try:
            values = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}

    def write(self, name: str, write: Callable[[Path], None]) -> None:
        """Write one file by ``write(path)``."""
        try:
            write(self.path / name)
        except OSError as error:
            raise CommandError(f"cannot write {self.path / name}: {error.strerror or error}. Disk full?") from error

    def write_record(self, values: dict[str, Any]) -> None:
        try:
            write_json(self.path / RECORD, values)
        except OSError as error:
            raise CommandError(f"cannot write {self.path / RECORD}: {error.strerror or error}.") from error

    def remove(self, *names: str) -> None:
        for name in names:
            (self.path / name).unlink(missing_ok=True)


def plan_folders(
    output: Path, requests: list[dict[str, Any]], numbered: bool, overwrite: bool
) -> list[RunFolder | None]:
    """A folder for every request, None for those that are finished already.

    One prompt goes to ``output`` itself, a file of prompts to ``output/001``, ``output/002``, ... There, a finished run
    of the same request is left alone. A stopped run of the same request is made again, and any other run needs
    ``--overwrite``.
    """
    check_writable(output)
    folders: list[RunFolder | None] = []
    for number, request in enumerate(requests, start=1):
        folder = RunFolder(output / f"{number:03d}" if numbered else output)
        existing = folder.existing()
        if existing and not overwrite:
            record = folder.record()
            stopped = record.get("finished") is False
            if not (numbered or stopped) or not answers(record, request):
                raise WrongUsageError(
                    f"{folder.path} already holds {', '.join(existing)}. Add --overwrite to replace, or name another "
                    "folder by --output."
                )
            if record.get("finished") and VIDEO in existing:
                folders.append(None)
                continue
        folders.append(folder)
    for folder in folders:
        if folder is not None:
            check_writable(folder.path)
    return folders


def answers(record: dict[str, Any], request: dict[str, Any]) -> bool:
    """Whether the record is of this request. Which one of several GPUs made it does not matter."""
    wanted = json.loads(json.dumps(request))
    given = {name: record.get(name) for name in wanted}
    for values in (wanted, given):
        values["device"] = str(values.get("device")).split(":")[0]
    return wanted == given
