"""Timing sparse attention against dense attention, on inputs with the structure of a video's."""

from .cases import SHAPES, BenchCase, Shape, grid_of
from .measuring import measure
from .sparse_rivals import Extras

__all__ = ["SHAPES", "BenchCase", "Extras", "Shape", "grid_of", "measure"]
