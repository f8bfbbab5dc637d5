"""Where the tokens of a tensor of any strides lie."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def strided_pointers(base, strides, batch, head, token, channel):
    """Where tokens of one head lie in a [batch, seq, heads, head_dim] tensor of any strides, [tokens, channels]."""
    base += batch * strides[0] + head * strides[2]
    return base + token[:, None] * strides[1] + channel.to(tl.int64)[None, :] * strides[3]
