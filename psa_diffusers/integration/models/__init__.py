"""The models that this package knows: one table. Whoever adds a family writes its row and lists it here."""

from __future__ import annotations

from torch import nn

from . import (
    allegro,
    anyflow,
    cogvideox,
    cosmos,
    dense,
    easyanimate,
    helios,
    hunyuan_video,
    kandinsky,
    ltx,
    minimax_h3,
    mochi,
    motif_video,
    wan,
)
from .row import ModelRow

ROWS: tuple[ModelRow, ...] = (
    wan.WAN,
    wan.SKYREELS,
    hunyuan_video.HUNYUAN_VIDEO,
    hunyuan_video.FRAMEPACK,
    hunyuan_video.HUNYUAN_VIDEO_15,
    cogvideox.COGVIDEOX,
    ltx.LTX,
    ltx.LTX_2,
    mochi.MOCHI,
    cosmos.COSMOS,
    kandinsky.KANDINSKY_5,
    kandinsky.KANDINSKY_6,
    allegro.ALLEGRO,
    easyanimate.EASYANIMATE,
    anyflow.ANYFLOW,
    motif_video.MOTIF_VIDEO,
    helios.HELIOS,
    minimax_h3.MINIMAX_H3,
    # Dense, with the reason.
    cosmos.COSMOS_3,
    anyflow.ANYFLOW_FAR,
    dense.SANA_VIDEO,
    dense.SANA_WM,
    dense.SANA_WM_REFINER,
    dense.LATTE,
    dense.WAN_ANIMATE_2,
    kandinsky.KANDINSKY_6_SR,
)


def find_row(model: nn.Module) -> ModelRow | None:
    """The row of this transformer, or of a class that it derives from."""
    names = [base.__name__ for base in type(model).__mro__]
    return next((row for name in names for row in ROWS if name in row.transformers), None)


def known_transformers() -> list[str]:
    """Class names of all the transformers that can be sparse."""
    return [name for row in ROWS if not row.dense for name in row.transformers]
