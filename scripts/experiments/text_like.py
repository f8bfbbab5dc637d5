"""Experiment 11: text-like sequences, full attention over tokens without spatial smoothness. Where pooling breaks.

    python scripts/experiments/text_like.py

Tokens are draws of a vocabulary with Zipf's frequencies plus topics that last some tokens ("topic" 0 = none), with a
rotary embedding along the sequence; every query looks for tokens of its kind.
"""

import math

import _laboratory  # noqa: F401
import torch
from block_policies import PRESETS, budget_rule, quantiles
from cases import Case
from experiment import arguments_of, finish
from harness import measure
from policies import BINARY

from psa_diffusers import PSAConfig
from psa_diffusers.synthetic import rotate

TOPICS = (0.0, 0.25, 0.5, 0.75)
RASTER = {"order": "raster"}
PAPER = PSAConfig(importance_reduction="max", **RASTER)
POLICIES = {
    "binary, top-k": quantiles(BINARY, PAPER),
    "PSA-2": quantiles(PRESETS["PSA-2"], PAPER),
    "PSA-3": quantiles(PRESETS["PSA-3"], PAPER),
    "ours": budget_rule(PSAConfig(**RASTER)),
    "ours, value_correction=none": budget_rule(PSAConfig(value_correction="none", **RASTER)),
}


def text_like(length: int, heads: int, head_dim: int, topic: float, *, seed: int = 0, device: str = "cpu") -> Case:
    """``topic`` is the share of a token's variance that it has in common with its neighbours (over 64 tokens)."""
    generator = torch.Generator().manual_seed(seed)
    words = 2000
    frequency = 1 / torch.arange(1, words + 1)
    drawn = torch.multinomial(frequency, length, replacement=True, generator=generator)
    tensors = [torch.empty(1, length, heads, head_dim) for _ in range(3)]
    for head in range(heads):
        meaning, content = (torch.randn(words, head_dim, generator=generator) for _ in range(2))
        lasting = torch.randn(2, length // 64 + 1, head_dim, generator=generator).repeat_interleave(64, 1)[:, :length]
        own = [math.sqrt(1 - topic) * part[drawn] for part in (meaning, content)]
        key, value = (x + math.sqrt(topic) * y for x, y in zip(own, lasting, strict=True))
        other = torch.randn(length, head_dim, generator=generator)
        query = (key + other) / math.sqrt(2) * (1.0 + head / max(1, heads - 1))
        for tensor, rows in zip(tensors, (query, key, value), strict=True):
            tensor[0, :, head] = rows
    grid = (length, 1, 1)
    turned = [rotate(x[0].transpose(0, 1), grid).transpose(0, 1)[None] for x in tensors[:2]]
    return Case(f"topic {topic}", "text-like", *(x.to(device) for x in (*turned, tensors[2])), grid)


def main() -> None:
    arguments, rows = arguments_of(__doc__), []
    for topic in TOPICS:
        case = text_like(4096, arguments.heads, arguments.head_dim, topic, device=arguments.device)
        rows += measure([case], POLICIES, (0.15,), topic=topic)
    finish(arguments.output, "text_like", rows, by="topic")


if __name__ == "__main__":
    main()
