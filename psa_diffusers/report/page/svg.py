"""matplotlib's figures as SVG inside a page: text in the page's font, axes in its text colour, ids of their own."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK = "#010203"  # stands for the page's text colour, which depends on light and dark
# One a setting, each at least 3:1 against the page's background, light and dark.
COLOURS = ("#0072b2", "#d55e00", "#008f68", "#b5509a", "#8a7000", "#6f62d6", "#c23b3b", "#4f7f8f")


@contextmanager
def page_style() -> Iterator[None]:
    """Figures drawn in this context fit the page."""
    import matplotlib
    from cycler import cycler

    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    style = {
        **dict.fromkeys(inked, _INK),
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "legend.frameon": False,
        "font.size": 10,
        "svg.fonttype": "none",
        "svg.hashsalt": "psa",
    }
    with matplotlib.rc_context(style):
        yield


def to_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an ``<svg>`` element.

    Args:
        figure: Drawn in :func:`page_style`, and to be turned into SVG there too.
        name: Prefix of its ids, one of its own in the page.
        label: What it shows, for those who do not see it.
    """
    memory = io.StringIO()
    figure.savefig(memory, format="svg", transparent=True, metadata={"Date": None})
    text = memory.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace(_INK, "currentColor").replace("#000000", "currentColor")
    text = re.sub(r"font: (\d+(?:\.\d+)?)px [^;\"]*", r"font-size: \1px", text)
    # Its size in inches is its natural width; the page makes it narrower where it must.
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
