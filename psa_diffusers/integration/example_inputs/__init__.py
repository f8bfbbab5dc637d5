"""Arguments of a forward of a transformer with nothing in them, for forecasts: of the right shapes, for one sample."""

from __future__ import annotations

from . import alone, joint
from .parts import Example, Size

__all__ = ["EXAMPLES", "Example", "Size"]

EXAMPLES: dict[str, Example] = {
    "WanTransformer3DModel": Example(alone.wan),
    "WanVACETransformer3DModel": Example(alone.wan),
    "WanAnimateTransformer3DModel": Example(
        alone.animate,
        alone.animate_frames,
        counted="a segment of 77 frames and the reference image",
        any_frames=True,
        layers_alike=False,  # every fifth one has a face adapter, and the face's motion is encoded before all
    ),
    "ChronoEditTransformer3DModel": Example(alone.wan),
    "SkyReelsV2Transformer3DModel": Example(alone.wan),
    "HunyuanVideoTransformer3DModel": Example(joint.hunyuan_video),
    "HunyuanVideoFramepackTransformer3DModel": Example(
        joint.framepack,
        joint.framepack_frames,
        counted="a window of 9 latent frames after the whole history",
        any_frames=True,
    ),
    "HunyuanVideo15Transformer3DModel": Example(joint.hunyuan_video_15),
    "CogVideoXTransformer3DModel": Example(joint.cogvideox),
    "ConsisIDTransformer3DModel": Example(joint.consisid),
    "LTXVideoTransformer3DModel": Example(alone.ltx),
    "LTX2VideoTransformer3DModel": Example(alone.ltx_2, counted="video and sound, at 24 frames a second"),
    "MochiTransformer3DModel": Example(joint.mochi),
    "CosmosTransformer3DModel": Example(alone.cosmos, settings=alone.cosmos_settings),
    "Kandinsky5Transformer3DModel": Example(alone.kandinsky_5),
    "Kandinsky6Transformer3DModel": Example(alone.kandinsky_6, counted="video and sound, at 24 frames a second"),
    "AllegroTransformer3DModel": Example(alone.allegro, any_frames=True),
    "EasyAnimateTransformer3DModel": Example(joint.easyanimate),
    "AnyFlowTransformer3DModel": Example(alone.anyflow),
    "MotifVideoTransformer3DModel": Example(joint.motif_video),
    "HeliosTransformer3DModel": Example(
        alone.helios,
        alone.helios_frames,
        counted="a chunk of 9 latent frames after the whole history",
        any_frames=True,
    ),
    "MiniMaxH3Transformer3DModel": Example(
        joint.minimax_h3,
        joint.minimax_h3_frames,
        counted="512 text tokens, video and sound",
        any_frames=True,
    ),
}
