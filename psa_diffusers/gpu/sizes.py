"""Sizes of grids and tiles. Triton has these too, as functions of kernels: on the host they take microseconds each."""

from __future__ import annotations


def ceil_div(number: int, divisor: int) -> int:
    """number / divisor, rounded up."""
    return -(-number // divisor)


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below ``number`` (at least 1)."""
    return 1 << (number - 1).bit_length()
