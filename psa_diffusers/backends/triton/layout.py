"""Where each level of the pyramid lies in the packed buffers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PyramidLayout:
    """Rows of one head's packed keys (or values): level 1, level 2, ..., the centroids, and rows that hold nothing.

    A level is one contiguous run of rows, ``rows_per_block`` for each kv block, blocks in order. Empty rows are zero
    with bias -inf: lanes with nothing to read point there, so that no load in the attention kernel needs a mask and
    nothing stray can enter a sum. The kernels compute the same addresses from the same three numbers.

    Level 1 is packed too, rather than read in place through the permutation: 1.89x the memory of K and V instead of
    0.89x (4 levels, kv blocks of 64), for one base pointer, one indirection a tile (list -> row, not list -> order ->
    token), loads whose neighbours are contiguous whatever the caller's strides, and padding that is dealt with once.
    """

    kv_blocks: int
    kv_block_size: int
    num_levels: int
    empty_rows: int = 1  # rows that hold nothing: a kernel that copies several rows at once needs as many

    def rows_per_block(self, level: int) -> int:
        """Packed rows of one kv block at a level; ``num_levels + 1`` is the centroid."""
        return 1 if level > self.num_levels else self.kv_block_size >> (level - 1)

    def first_row(self, level: int) -> int:
        """Where a level's run of rows starts."""
        return self.kv_blocks * sum(self.rows_per_block(finer) for finer in range(1, level))

    @property
    def empty_row(self) -> int:
        """The first row that holds nothing: the one after the centroids."""
        return self.first_row(self.num_levels + 2)

    @property
    def rows(self) -> int:
        """Rows of a packed buffer, the empty ones included."""
        return self.empty_row + self.empty_rows
