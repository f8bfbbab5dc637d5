"""Sample from a transformer checkpoint at any grid, judge the clips and save a contact sheet.

Example: python scripts/demo_model/preview.py --transformer runs/demo/transformer/checkpoint.pt \\
    --vae runs/demo/vae/checkpoint.pt --grid 5x8x8 --count 16 --out sheet.png
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from cache_latents import load_vae, parse_grid
from captions import build_tokenizer, caption
from flow import sample
from judge import judge
from PIL import Image
from scenes import training_combinations
from train_transformer import build_model
from training import load_checkpoint
from wan_transformer import prepare_for_training
from wan_vae import decode


def videos(vae, latents: torch.Tensor) -> np.ndarray:
    """Decode normalised latents to [batch, frames, height, width, 3] in 0..1."""
    mean, std = (torch.tensor(vae.config[key]).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        decoded = decode(vae, (latents * std + mean).contiguous(memory_format=torch.channels_last_3d))
    return (decoded.float().clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 4, 1).numpy()


def contact_sheet(clips: np.ndarray, columns: int = 5) -> Image.Image:
    """One row a clip, frames evenly spaced from first to last."""
    chosen = np.linspace(0, clips.shape[1] - 1, columns).round().astype(int)
    rows = [np.concatenate([np.pad(clip[i], ((2, 2), (2, 2), (0, 0))) for i in chosen], axis=1) for clip in clips]
    half = (len(rows) + 1) // 2
    rows += [np.zeros_like(rows[0])] * (2 * half - len(rows))
    sheet = np.concatenate([np.concatenate(rows[:half]), np.concatenate(rows[half:])], axis=1)
    return Image.fromarray((sheet * 255).round().astype(np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformer", type=Path, required=True)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--grid", type=parse_grid, default=(5, 8, 8))
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--live", action="store_true", help="use the current weights, not the average")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("sheet.png"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).eval()
    state = load_checkpoint(args.transformer)
    model.load_state_dict(state["model" if args.live else "average"])
    attention = prepare_for_training(model.transformer)
    vae = load_vae(args.vae)
    rng = random.Random(args.seed)
    whats = rng.sample(training_combinations(), args.count)
    prompts = [caption(what, rng) for what in whats]
    clips = []
    for start in range(0, args.count, args.batch):
        batch = prompts[start : start + args.batch]
        latents = sample(
            model, batch, args.grid, tokenizer, attention, args.steps, args.guidance, args.seed * 1000 + start
        )
        clips += [videos(vae, one[None])[0] for one in latents]
    agreed = {}
    for what, prompt, clip in zip(whats, prompts, clips, strict=True):
        verdict = judge(clip)
        for key, value in verdict.agrees(what).items():
            agreed[key] = agreed.get(key, 0) + value
        print(f"{prompt}: {verdict.shape} {verdict.colour} {verdict.motion} {verdict.background} {verdict.overlap:.2f}")
    print(f"step {state['step']}: of {args.count}, agreed " + ", ".join(f"{k} {v}" for k, v in agreed.items()))
    contact_sheet(np.stack(clips)).save(args.out)


if __name__ == "__main__":
    main()
