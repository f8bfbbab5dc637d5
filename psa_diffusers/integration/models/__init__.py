"""The models that this package knows: one table. Whoever adds a family writes its row and lists it here."""

from __future__ import annotations

from torch import nn

from . import cogvideox, hunyuan_video, ltx, mochi, wan
from .row import ModelRow

ROWS: tuple[ModelRow, ...] = (
    wan.WAN,
    wan.SKYREELS,
    hunyuan_video.HUNYUAN_VIDEO,
    hunyuan_video.FRAMEPACK,
    hunyuan_video.HUNYUAN_VIDEO_15,
    cogvideox.COGVIDEOX,
    ltx.LTX,
    mochi.MOCHI,
)


def find_row(model: nn.Module) -> ModelRow | None:
    """The row of this transformer, or of a class that it derives from."""
    names = [base.__name__ for base in type(model).__mro__]
    return next((row for name in names for row in ROWS if name in row.transformers), None)


def known_transformers() -> list[str]:
    """Class names of all the transformers that can be sparse."""
    return [name for row in ROWS if not row.dense for name in row.transformers]
