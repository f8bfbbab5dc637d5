"""The page of a comparison: one HTML file with everything in it but the videos. It needs jinja2 and matplotlib."""

from .render import render

__all__ = ["render"]
