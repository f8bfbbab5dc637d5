"""What all pictures share: matplotlib, imported only when a picture is drawn, and a figure that notebooks show."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches. A notebook shows it where it is a cell's last value, once.

    It is not one of pyplot's: nothing has to be closed, and no backend is chosen.

    Raises:
        ImportError: matplotlib is missing; the message names the extra that has it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'psa-diffusers[notebooks]'.") from error

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            return to_png(self)

    return NotebookFigure(figsize=(width, height), layout="constrained")


def to_png(figure: Figure, dots_per_inch: int = 100) -> bytes:
    """The picture as a PNG file's bytes."""
    memory = io.BytesIO()
    figure.savefig(memory, format="png", dpi=dots_per_inch)
    return memory.getvalue()


def bare(axes: Any) -> Any:
    """Axes without ticks."""
    axes.set_xticks([])
    axes.set_yticks([])
    return axes
