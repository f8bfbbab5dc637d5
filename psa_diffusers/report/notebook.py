"""What a notebook shows: videos that play in it, and tables. Needs IPython."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..metrics import write_video

if TYPE_CHECKING:
    from IPython.display import Markdown, Video


def show_video(video: np.ndarray, fps: float, width: int | None = None) -> Video:
    """A video that plays over and over inside a notebook; nothing is left on disk.

    Args:
        video: uint8 [frames, height, width, 3], height and width even.
        fps: Frames a second.
        width: On the screen, in pixels; default the video's own.
    """
    from IPython.display import Video

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        write_video(path, video, fps)
        data = path.read_bytes()
    attributes = "controls loop autoplay muted"
    return Video(data=data, embed=True, mimetype="video/mp4", width=width, html_attributes=attributes)


def show_table(rows: Sequence[Mapping[str, Any]]) -> Markdown:
    """Rows with the same keys as a table; numbers with three decimals, to the right."""
    from IPython.display import Markdown

    names = list(rows[0])
    right = [isinstance(rows[0][name], int | float) for name in names]
    lines = [_line(names), _line("--:" if number else "---" for number in right)]
    return Markdown("\n".join([*lines, *(_line(_cell(row[name]) for name in names) for row in rows)]))


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
