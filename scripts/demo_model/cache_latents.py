"""Encode drawn training clips to latents once, for the transformer's training; running it again adds more.

Example: python scripts/demo_model/cache_latents.py --vae runs/demo/vae/checkpoint.pt \\
    --out runs/demo/latents --grid 17x8x8 --count 1500
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import random
from pathlib import Path

import numpy as np
import torch
from scenes import Combination, random_scene, render, training_combinations
from tqdm import tqdm
from training import load_checkpoint, save_checkpoint
from wan_vae import build_vae, encode, fast_norms, normalised


def parse_grid(text: str) -> tuple[int, int, int]:
    """'5x8x8' -> (5, 8, 8): latent frames, height, width."""
    frames, height, width = (int(part) for part in text.split("x"))
    return frames, height, width


def load_vae(path: Path):
    """The averaged VAE of a checkpoint, with its latent statistics, for inference."""
    state = load_checkpoint(path)
    vae = build_vae().eval().requires_grad_(False)
    vae.load_state_dict(state["average"])
    vae.register_to_config(**state["statistics"])
    return vae


def draw(job: tuple[Combination, str, int, int, int]) -> np.ndarray:
    """One random clip of a combination, uint8 [frames, height, width, 3]; the text seeds its jitter."""
    what, seed, frames, height, width = job
    return (render(random_scene(what, random.Random(seed)), frames, height, width) * 255).round().astype(np.uint8)


def encode_clips(vae, clips: list[np.ndarray], device: str) -> torch.Tensor:
    """Normalised fp16 latents [count, channels, t, h, w] of uint8 clips."""
    video = torch.stack([torch.from_numpy(clip) for clip in clips]).to(device).float() / 127.5 - 1
    video = video.permute(0, 4, 1, 2, 3).contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad(), torch.autocast(device, dtype=torch.bfloat16):
        latents, _ = encode(vae, video)
    return normalised(vae, latents.float()).half().cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="checkpoint of train_vae.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the latents")
    parser.add_argument("--grid", type=parse_grid, default=(17, 8, 8), help="latent frames x height x width")
    parser.add_argument("--count", type=int, default=1500, help="clips in all")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fast_norms()
    vae = load_vae(args.vae).to(args.device)
    path = args.out / ("x".join(map(str, args.grid)) + ".pt")
    old = load_checkpoint(path) if path.exists() else {"latents": [], "what": []}
    latents, whats = [*old["latents"]], [*old["what"]]
    rng = random.Random(f"{args.seed} {len(whats)}")
    fresh = rng.choices(training_combinations(), k=max(0, args.count - len(whats)))
    frames, height, width = 4 * args.grid[0] - 3, 16 * args.grid[1], 16 * args.grid[2]
    jobs = [(what, f"{args.seed} {len(whats) + i}", frames, height, width) for i, what in enumerate(fresh)]
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        clips = pool.imap(draw, jobs, chunksize=args.batch)
        for start in tqdm(range(0, len(jobs), args.batch)):
            batch = list(itertools.islice(clips, min(args.batch, len(jobs) - start)))
            latents += encode_clips(vae, batch, args.device).unbind()
    save_checkpoint(path, {"latents": torch.stack(latents), "what": [*whats, *fresh]})


if __name__ == "__main__":
    main()
