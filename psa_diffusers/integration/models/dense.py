"""Families of which nothing can be made sparse, and why."""

from .row import ModelRow

SANA_VIDEO = ModelRow(
    title="SanaVideo",
    transformers=("SanaVideoTransformer3DModel",),
    dense="its attention is linear: there are no pairs of tokens to leave out",
)

SANA_WM = ModelRow(
    title="Sana-WM",
    transformers=("SanaWMTransformer3DModel",),
    dense="most of its attention is linear, and the rest is not computed by attention processors",
)

SANA_WM_REFINER = ModelRow(
    title="Sana-WM's refiner",
    transformers=("SanaWMLTX2RefinerTransformer3DModel",),
    dense="its attention reads a cache of keys and values over a sliding window",
)

LATTE = ModelRow(
    title="Latte",
    transformers=("LatteTransformer3DModel",),
    dense="its attention is factorised: within a frame, and along time at one place, over few tokens each",
)

WAN_ANIMATE_2 = ModelRow(
    title="Wan-Animate 2",
    transformers=("WanAnimate2Transformer3DModel",),
    dense="its attention reads a cache of the reference's keys and values under a block mask",
)
