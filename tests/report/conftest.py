"""Captured calls of a tiny pipeline."""

import pytest

from psa_diffusers.integration import capture_attention

from ..integration.tiny_wan import generate, pipeline

LARGE = {"height": 64, "width": 96, "num_frames": 17}  # 5 x 4 x 6 = 120 tokens


@pytest.fixture(scope="session")
def call():
    """One attention call: 120 tokens, 2 heads x 12."""
    pipe = pipeline()
    with capture_attention(pipe, steps=[1], layers=[1], branches=["cond"]) as calls:
        generate(pipe, steps=2, **LARGE)
    return calls[0]
