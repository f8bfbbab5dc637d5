"""Inside kernels: how keys vary inside their groups, and what that adds to a group's bias.

A block's keys are tiles [GROUPS, BD], as in :mod:`~.pyramid`. ``squares`` are of each group the squared distances of
its keys from their mean, weighed by the query power and summed over channels and keys. They are merged from level to
level: no cancellation, unlike E[x^2] - E[x]^2. :mod:`~psa_diffusers.backends.logit_variance` defines the correction.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def squares_of_rows_alone(tiles):
    """Of groups of one key: 0."""
    squares = ()
    for part in tl.static_range(len(tiles)):
        squares += (tl.zeros([tiles[part].shape[0]], tl.float32),)
    return squares


@triton.jit
def squares_of_pairs(means, counts, squares, power):
    """Of tiles merged in pairs. ``means`` and ``counts`` are those of the tiles before."""
    merged = ()
    for part in tl.static_range(len(means) // 2):
        first, second = counts[2 * part], counts[2 * part + 1]
        gap = means[2 * part] - means[2 * part + 1]
        between = tl.sum(gap * gap * power[None, :], axis=1)
        merged += (
            squares[2 * part] + squares[2 * part + 1] + between * (first * second / tl.maximum(first + second, 1.0)),
        )
    return merged


@triton.jit
def squares_of_groups(mean, count, squares, group_mean, power, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """Of a tile's rows in groups of SIZE, whose mean is ``group_mean`` [GROUPS, BD]."""
    gap = tl.reshape(mean, (GROUPS, SIZE, mean.shape[1])) - group_mean[:, None, :]
    between = tl.sum(gap * gap * power[None, None, :], axis=2)
    return tl.sum(tl.reshape(squares, (GROUPS, SIZE)) + between * tl.reshape(count, (GROUPS, SIZE)), axis=1)


@triton.jit
def correction_and_bias(square, count, scale):
    """min(half the logits' variance, ln of the group's tokens) of each group, and the two's sum, in units of ln 2."""
    LOG2E: tl.constexpr = 1.4426950408889634
    log_count = tl.log2(tl.maximum(count, 1.0))
    half_variance = square * (0.5 * LOG2E * scale * scale) / tl.maximum(count, 1.0)
    correction = tl.minimum(half_variance, log_count, propagate_nan=tl.PropagateNan.ALL)
    return correction, tl.where(count > 0.0, log_count + correction, float("-inf"))


@triton.jit
def store_corrected_bias(place, squares, counts, scale):
    """The bias of a level's rows of one block, the first of which is at ``place``: in one store."""
    biases = ()
    for part in tl.static_range(len(squares)):
        biases += (correction_and_bias(squares[part], counts[part], scale)[1],)
    for _round in tl.static_range(0, 3):  # at most 8 tiles
        if len(biases) > 1:
            biases = _in_turns(biases)
    tl.store(place + tl.arange(0, biases[0].shape[0]), biases[0])


@triton.jit
def _in_turns(tiles):
    """Half as many tiles: of each and the one half of them further, the first numbers, then the second ones."""
    HALF: tl.constexpr = len(tiles) // 2
    merged = ()
    for part in tl.static_range(HALF):
        merged += (tl.interleave(tiles[part], tiles[part + HALF]),)
    return merged


@triton.jit
def load_power(power, head, channel, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr):
    """The query power of one head's channels, of its parts [batch * heads, PARTS, HEAD_DIM]."""
    place = (head * PARTS + tl.arange(0, PARTS))[:, None] * HEAD_DIM + channel[None, :]
    mask = tl.broadcast_to((channel < HEAD_DIM)[None, :], place.shape)
    return tl.sum(tl.load(power + place, mask=mask, other=0.0), axis=0)
