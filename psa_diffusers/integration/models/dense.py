"""Families of which nothing can be made sparse, and why."""

from .row import ModelRow

SANA_VIDEO = ModelRow(
    title="SanaVideo, Sana-WM",
    transformers=("SanaVideoTransformer3DModel", "SanaWMTransformer3DModel"),
    dense="its attention is linear: there are no pairs of tokens to leave out",
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

KANDINSKY_6_SR = ModelRow(
    title="Kandinsky 6 SR",
    transformers=("Kandinsky6SRTransformer3DModel",),
    dense="it has a sparse attention of its own (NABLA)",
)
