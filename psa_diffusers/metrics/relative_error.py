"""How far one tensor is from another."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def relative_error(reference: Tensor, other: Tensor) -> float:
    """Euclidean norm of the difference over that of the reference; 0 = equal, lower is closer. In float64.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != other.shape:
        raise ValueError(
            f"reference and other must have one shape, but are {list(reference.shape)} and {list(other.shape)}."
        )
    reference, other = reference.double(), other.double()
    return float((other - reference).norm() / reference.norm())
