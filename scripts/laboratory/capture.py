"""Capture the attention calls of a video pipeline, for the laboratory. Captures do not belong in git.

    python scripts/laboratory/capture.py --output runs/captures
    python scripts/laboratory/capture.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --device cuda --dtype bfloat16 ...

Writes one file a prompt: a list of {query, key, value [1, tokens, heads, head_dim], grid, step, layer, prompt}.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from psa_diffusers.demo import load_pipeline, model_defaults, model_folder
from psa_diffusers.integration import capture_attention

PROMPTS = [
    "an orange square falls on a white background",
    "a blue circle rises on a black background",
    "a green triangle moves left on a yellow background",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/captures"))
    parser.add_argument("--model", help="Folder or hub id of a Diffusers pipeline. Default: the bundled model.")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="The first one is the tuning set.")
    parser.add_argument("--steps", type=int, default=8, help="Denoising steps of the (dense) run.")
    parser.add_argument("--keep-steps", type=int, nargs="+", default=(2, 4, 6))
    parser.add_argument("--layers", type=int, nargs="+", help="Default: all.")
    parser.add_argument("--size", type=int, nargs=3, metavar=("FRAMES", "HEIGHT", "WIDTH"), help="Of the video.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    pipe, size = open_pipeline(arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for number, prompt in enumerate(arguments.prompts):
        noise = torch.Generator().manual_seed(arguments.seed)
        chosen = {"steps": arguments.keep_steps, "layers": arguments.layers}
        with capture_attention(pipe, **chosen, device="cpu") as calls:
            pipe(prompt, num_inference_steps=arguments.steps, generator=noise, output_type="latent", **size)
        first = calls[0].branch  # with the prompt, where guidance makes two
        kept = [call for call in calls if call.branch == first]
        torch.save([as_dict(call, prompt) for call in kept], arguments.output / f"prompt{number}.pt")
        print(f"{arguments.output}/prompt{number}.pt: {len(kept)} calls, {prompt!r}")


def open_pipeline(arguments: argparse.Namespace) -> tuple:
    """The pipeline and its sizes, by the pipeline's argument names."""
    dtype = getattr(torch, arguments.dtype)
    if arguments.model is None:
        pipe, defaults = load_pipeline(torch_dtype=dtype), model_defaults(model_folder())
        size = {name: defaults[name] for name in ("num_frames", "height", "width", "guidance_scale")}
    else:
        from diffusers import DiffusionPipeline

        pipe, size = DiffusionPipeline.from_pretrained(arguments.model, torch_dtype=dtype), {}
    if arguments.size is not None:
        size |= dict(zip(("num_frames", "height", "width"), arguments.size, strict=True))
    return pipe.to(arguments.device), size


def as_dict(call, prompt: str) -> dict:
    """Raises ValueError where the call has text or padding, or another scale, which the laboratory does not have."""
    options = call.options
    if options["full_tokens"] is not None or options["key_lengths"] is not None or options["scale"] is not None:
        raise ValueError(f"{call!r} has text tokens, padding or a scale of its own: the laboratory takes none.")
    facts = {"grid": options["grid"], "step": call.step.index, "layer": call.layer, "prompt": prompt}
    return {"query": call.query, "key": call.key, "value": call.value, **facts}


if __name__ == "__main__":
    main()
