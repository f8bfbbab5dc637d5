"""Encode drawn training clips to latents once, for the transformer's training; running it again adds more.

Example: python scripts/demo_model/cache_latents.py --vae runs/demo/vae/checkpoint.pt \\
    --out runs/demo/latents --grid 17x8x8 --count 1500
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

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


def encode_scenes(vae, combinations: list[Combination], grid: tuple[int, int, int], rng: random.Random) -> torch.Tensor:
    """Normalised fp16 latents [count, channels, *grid] of one random scene for each combination."""
    frames, height, width = 4 * grid[0] - 3, 16 * grid[1], 16 * grid[2]
    clips = [torch.from_numpy(render(random_scene(what, rng), frames, height, width)) for what in combinations]
    video = (torch.stack(clips) * 2 - 1).permute(0, 4, 1, 2, 3).contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        latents, _ = encode(vae, video)
    return normalised(vae, latents.float()).half()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="checkpoint of train_vae.py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the latents")
    parser.add_argument("--grid", type=parse_grid, default=(17, 8, 8), help="latent frames x height x width")
    parser.add_argument("--count", type=int, default=1500, help="clips in all")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    fast_norms()
    vae = load_vae(args.vae)
    path = args.out / ("x".join(map(str, args.grid)) + ".pt")
    old = load_checkpoint(path) if path.exists() else {"latents": [], "what": []}
    latents, whats = [*old["latents"]], [*old["what"]]
    rng = random.Random(f"{args.seed} {len(whats)}")
    choices = training_combinations()
    for _ in tqdm(range(0, args.count - len(whats), args.batch)):
        batch = rng.choices(choices, k=args.batch)
        latents += encode_scenes(vae, batch, args.grid, rng).unbind()
        whats += batch
    save_checkpoint(path, {"latents": torch.stack(latents), "what": whats})


if __name__ == "__main__":
    main()
