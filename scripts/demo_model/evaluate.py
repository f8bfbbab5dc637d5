"""Measure the exported demo model with the stock pipeline: VAE reconstruction, and 100 unseen prompts judged.

Example: python scripts/demo_model/evaluate.py --model psa_diffusers/demo/model --out runs/demo/evaluation.json
The result file is written after every clip; running it again goes on with the prompts that are missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import random
import shlex
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from captions import read_eval_prompts
from diffusers import DiffusionPipeline
from judge import judge
from preview import contact_sheet
from scenes import held_out_combinations, random_scene, render
from tqdm import tqdm

PROPERTIES = ("colour", "shape", "background", "motion")


def reconstruction(vae, defaults: dict, count: int, seed: int) -> dict:
    """PSNR in dB of the stock VAE over clips of unseen combinations at the generated size: mean and lowest."""
    rng = random.Random(seed)
    values = []
    for what in rng.sample(held_out_combinations(), count):
        clip = render(random_scene(what, rng), defaults["num_frames"], defaults["height"], defaults["width"])
        video = torch.from_numpy(clip).permute(3, 0, 1, 2)[None] * 2 - 1
        with torch.no_grad():
            output = vae.decode(vae.encode(video.to(vae.device)).latent_dist.mode()).sample.cpu()
        values.append(-10 * torch.log10(((output - video) / 2).square().mean()).item())
    return {"clips": count, "psnr_mean": float(np.mean(values)), "psnr_lowest": float(np.min(values))}


def summary(clips: list[dict]) -> dict:
    """Share of the judged clips that agree with their prompt, for each property and for all four together."""
    shares = {name: float(np.mean([clip["agrees"][name] for clip in clips])) for name in PROPERTIES}
    shares["all_four"] = float(np.mean([all(clip["agrees"].values()) for clip in clips]))
    return {"clips": len(clips), "agreement": shares}


def fingerprint(folder: Path) -> str:
    """SHA-256 over the model's weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; continued when it is of the same weights")
    parser.add_argument("--first", type=int, default=0, help="number of the first prompt to judge, from 0")
    parser.add_argument("--limit", type=int, default=100, help="number of the prompt to stop before")
    parser.add_argument("--reconstructions", type=int, default=8, help="clips for the VAE's PSNR")
    parser.add_argument("--steps", type=int, help="instead of the model's default")
    parser.add_argument("--guidance", type=float, help="instead of the model's default")
    parser.add_argument("--sheet", type=Path, help="PNG of the clips judged in this call")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="clip i is drawn from seed + i")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipeline = DiffusionPipeline.from_pretrained(args.model).to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    defaults = json.loads((args.model / "defaults.json").read_text())
    settings = {key: defaults[key] for key in ("num_frames", "height", "width")}
    settings["num_inference_steps"] = args.steps or defaults["num_inference_steps"]
    settings["guidance_scale"] = args.guidance or defaults["guidance_scale"]
    result = {
        "command": shlex.join(["python", *sys.argv]),
        "weights": fingerprint(args.model),
        "settings": {**settings, "seed": args.seed, "first": args.first, "dtype": "float32", "device": args.device},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }
    old = json.loads(args.out.read_text()) if args.out.exists() else {}
    same = all(old.get(key) == result[key] for key in ("weights", "settings"))
    clips = old["clips"] if same else []
    result["reconstruction"] = (
        old["reconstruction"] if same else reconstruction(pipeline.vae, defaults, args.reconstructions, args.seed)
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    videos = []
    for index, (what, prompt) in enumerate(tqdm(read_eval_prompts()[: args.limit])):
        if index < args.first + len(clips):
            continue
        start = time.monotonic()
        generator = torch.Generator().manual_seed(args.seed + index)
        video = pipeline(prompt, generator=generator, **settings).frames[0]
        verdict = judge(video)
        clips.append(
            {
                "prompt": prompt,
                "seconds": round(time.monotonic() - start, 1),
                "agrees": verdict.agrees(what),
                "found": vars(verdict),
            }
        )
        videos.append(video)
        args.out.write_text(json.dumps({**result, "summary": summary(clips), "clips": clips}, indent=1) + "\n")
    if args.sheet and videos:
        contact_sheet(np.stack([video[:, ::2, ::2] for video in videos])).save(args.sheet)
    print(json.dumps({"reconstruction": result["reconstruction"], **summary(clips)}, indent=1))


if __name__ == "__main__":
    main()
