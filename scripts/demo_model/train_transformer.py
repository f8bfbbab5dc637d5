"""Train the demo model's transformer and text encoder by flow matching on cached latents.

The training starts on small token grids, whose rotary positions are spread over the full grid's range, and ends at the
full grid. Each stage is one call; the checkpoint in --run carries over:
  python scripts/demo_model/train_transformer.py --run runs/demo/transformer --latents runs/demo/latents \\
      --stage looks --grids 1x8x8=1 --minutes 6
Running a stage again continues it.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from cache_latents import parse_grid
from captions import build_tokenizer, training_caption
from flow import TextToVideo, flow_loss
from torch import nn
from tqdm import tqdm
from training import (
    Average,
    Clock,
    learning_rate,
    load_checkpoint,
    random_state,
    save_checkpoint,
    seed_everything,
    set_random_state,
)
from wan_transformer import FULL_GRID, build_text_encoder, build_transformer, prepare_for_training


class Latents:
    """Cached full-length latents of one frame size, of which each step uses evenly spaced frames, with fresh captions.

    A grid of one frame takes it at a random time, so that looks are learnt cheaply before motion.
    """

    def __init__(self, folder: Path, grid: tuple[int, int, int], tokens: int) -> None:
        self.frames = grid[0]
        state = load_checkpoint(folder / f"{FULL_GRID[0]}x{grid[1]}x{grid[2]}.pt")
        self.latents, self.what = state["latents"], state["what"]
        self.batch = max(1, round(tokens / (grid[0] * grid[1] * grid[2])))
        self.name = "x".join(map(str, grid))

    def draw(self) -> tuple[torch.Tensor, list[str]]:
        """Clean latents [batch, channels, t, h, w] and their captions."""
        chosen = [random.randrange(len(self.what)) for _ in range(self.batch)]
        captions = [training_caption(self.what[index], random) for index in chosen]
        last = self.latents.shape[2] - 1
        if self.frames == 1:
            clean = torch.stack([self.latents[index, :, [random.randint(0, last)]] for index in chosen])
        else:
            clean = self.latents[chosen, :, :: last // (self.frames - 1)]
        return clean.float(), captions


def parse_grids(texts: list[str]) -> dict[tuple[int, int, int], float]:
    """['5x8x8=1', ...] -> share of the steps for each grid."""
    pairs = [text.split("=") for text in texts]
    return {parse_grid(grid): float(share) for grid, share in pairs}


def build_optimisers(model: TextToVideo, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [p for p in model.transformer.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
    for optimiser in (muon, adam):
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


def build_model(tokenizer) -> TextToVideo:
    """A new model with random weights."""
    return TextToVideo(build_transformer(), build_text_encoder(len(tokenizer)))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the checkpoint; continued when it exists")
    parser.add_argument("--latents", type=Path, required=True, help="folder written by cache_latents.py")
    parser.add_argument(
        "--stage", required=True, help="name of this stage; a new name starts a new learning-rate cycle"
    )
    parser.add_argument("--grids", nargs="+", default=["1x8x8=1"], help="GRID=SHARE of the steps")
    parser.add_argument("--minutes", type=float, default=30, help="time of this stage over all its sessions")
    parser.add_argument("--tokens", type=int, default=10240, help="video tokens a step: sets each grid's batch size")
    parser.add_argument("--init", type=Path, help="checkpoint whose averaged weights a new run starts from")
    parser.add_argument("--muon-lr", type=float, default=2e-3)
    parser.add_argument("--adam-lr", type=float, default=1e-3)
    parser.add_argument("--floor", type=float, default=0.1, help="last learning rate, as a share of the first")
    parser.add_argument("--ema", type=float, default=0.997)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    seed_everything(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).to(args.device)
    path = args.run / "checkpoint.pt"
    if args.init and not path.exists():
        model.load_state_dict(load_checkpoint(args.init)["average"])
    attention = prepare_for_training(model.transformer)
    average = Average(model, args.ema)
    optimisers = build_optimisers(model, args.muon_lr, args.adam_lr)
    step, seconds = 0, {}
    if path.exists():
        state = load_checkpoint(path)
        model.load_state_dict(state["model"])
        average.module.load_state_dict(state["average"])
        average.updates = step = state["step"]
        seconds = state["seconds"]
        set_random_state(state["random"])
        for optimiser, old in zip(optimisers, state["optimisers"], strict=True):
            peaks = [group["peak"] for group in optimiser.param_groups]
            optimiser.load_state_dict(old)
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["peak"] = peak
    clock = Clock(args.minutes, seconds.get(args.stage, 0.0))

    def save() -> None:
        save_checkpoint(
            path,
            {
                "model": model.state_dict(),
                "average": average.module.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in optimisers],
                "random": random_state(),
                "step": step,
                "seconds": {**seconds, args.stage: clock.elapsed},
                "arguments": {key: str(value) for key, value in vars(args).items()},
            },
        )

    shares = parse_grids(args.grids)
    data = [Latents(args.latents, grid, args.tokens) for grid in shares]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {args.stage} from step {step}")
    bar = tqdm(total=round(args.minutes * 60), initial=round(clock.elapsed), unit="s", mininterval=10)
    saved, samples, losses = clock.elapsed, 0, {}
    while clock.progress < 1:
        source = random.choices(data, list(shares.values()))[0]
        latents, captions = source.draw()
        loss = flow_loss(model, latents.to(args.device), captions, tokenizer, attention).mean()
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(group["peak"], clock.progress, args.floor)
            optimiser.step()
        average.update(model)
        step += 1
        samples += len(latents)
        losses[source.name] = 0.98 * losses.get(source.name, loss.item()) + 0.02 * loss.item()
        report = " ".join(f"{name} {value:.4f}" for name, value in losses.items())
        bar.set_postfix_str(f"step {step} samples {samples} {report}", refresh=False)
        bar.update(round(clock.elapsed) - bar.n)
        if clock.elapsed - saved > 120:
            save()
            saved = clock.elapsed
    save()


if __name__ == "__main__":
    main()
