"""Train the demo model's VAE on drawn clips: small clips first, clips of the generated size last.

Example: python scripts/demo_model/train_vae.py --run runs/demo/vae --minutes 40
Running it again continues from the checkpoint in --run. With --freeze-encoder only the decoder learns, on
slightly noised latents; the latents stay what the transformer was trained on.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from scenes import combinations, held_out_combinations, random_scene, render, training_combinations
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
from wan_vae import build_vae, count_parameters, decode, encode, fast_norms

# (batch, frames, size): weights at the start, in the middle and at the end of the training
CLIPS = {
    (16, 1, 64): (1.0, 0.3, 0.0),
    (8, 5, 64): (0.3, 1.0, 0.1),
    (2, 17, 96): (0.0, 0.6, 0.4),
    (1, 33, 128): (0.0, 0.3, 0.7),
    (1, 65, 192): (0.0, 0.0, 0.15),
    (1, 65, 256): (0.0, 0.0, 0.15),
}
FULL = (65, 256)


def draw_batch(count: int, frames: int, size: int, rng: random.Random, unseen: bool = False) -> torch.Tensor:
    """Random clips in -1..1: [count, 3, frames, size, size]."""
    choices = held_out_combinations() if unseen else training_combinations()
    clips = [render(random_scene(rng.choice(choices), rng), frames, size, size) for _ in range(count)]
    video = torch.stack([torch.from_numpy(clip) for clip in clips]) * 2 - 1
    return video.permute(0, 4, 1, 2, 3)


def clip_size(progress: float, rng: random.Random) -> tuple[int, int, int]:
    """Choose (batch, frames, size) for one step."""
    place = min(max(progress, 0.0), 1.0) * 2
    low = min(int(place), 1)
    mix = [w[low] * (low + 1 - place) + w[low + 1] * (place - low) for w in CLIPS.values()]
    return rng.choices(list(CLIPS), mix)[0]


@torch.no_grad()
def latent_statistics(vae: nn.Module, rng: random.Random, count: int = 12) -> dict[str, list[float]]:
    """Mean and standard deviation of each latent channel over full-size training clips."""
    latents = torch.cat([encode(vae, draw_batch(1, *FULL, rng))[0].float() for _ in range(count)])
    return {"latents_mean": latents.mean((0, 2, 3, 4)).tolist(), "latents_std": latents.std((0, 2, 3, 4)).tolist()}


@torch.no_grad()
def psnr(vae: nn.Module, rng: random.Random, count: int, frames: int, size: int) -> float:
    """Mean PSNR in dB over unseen clips, in fp32."""
    values = []
    for _ in range(count):
        video = draw_batch(1, frames, size, rng, unseen=True)
        error = F.mse_loss(decode(vae, encode(vae, video)[0]).clamp(-1, 1), video) / 4
        values.append(-10 * torch.log10(error).item())
    return sum(values) / len(values)


def training_step(vae: nn.Module, video: torch.Tensor, args: argparse.Namespace) -> tuple[torch.Tensor, float]:
    """Loss of one batch, and its reconstruction PSNR."""
    with torch.autocast(video.device.type, dtype=torch.bfloat16):
        if args.freeze_encoder:
            with torch.no_grad():
                latents, kl = encode(vae, video)[0].float(), 0.0
            noise = args.latent_noise * torch.rand(len(video), 1, 1, 1, 1, device=video.device)
            std = torch.tensor(vae.config.latents_std, device=video.device).view(1, -1, 1, 1, 1)
            latents = latents + noise * std * torch.randn_like(latents)
        else:
            mean, log_variance = (x.float() for x in encode(vae, video))
            latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
            kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        output = decode(vae, latents)
    error = output.float() - video
    square = error.square().mean()
    return error.abs().mean() + 2 * square + args.kl * kl, -10 * torch.log10(square.detach() / 4).item()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of the checkpoint; continued when it exists")
    parser.add_argument("--minutes", type=float, default=40, help="training time over all sessions of this run")
    parser.add_argument("--init", type=Path, help="checkpoint whose weights a new run starts from")
    parser.add_argument("--freeze-encoder", action="store_true", help="train the decoder alone, on noised latents")
    parser.add_argument("--latent-noise", type=float, default=0.3, help="largest noise added, in latent deviations")
    parser.add_argument("--full-size", action="store_true", help="use the clip sizes of the end of the training only")
    parser.add_argument("--lr", type=float, default=1.2e-3)
    parser.add_argument("--kl", type=float, default=3e-5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    seed_everything(args.seed)
    fast_norms()
    path = args.run / "checkpoint.pt"
    vae = build_vae()
    state = load_checkpoint(path) if path.exists() else None
    start = state or (load_checkpoint(args.init) if args.init else None)
    if start:
        vae.load_state_dict(start["model"] if state else start["average"])
        vae.register_to_config(**start["statistics"])
    vae.to(args.device)
    for module in vae.modules():
        if isinstance(module, nn.Conv3d | nn.Conv2d):
            layout = torch.channels_last_3d if isinstance(module, nn.Conv3d) else torch.channels_last
            module.to(memory_format=layout)
    if args.freeze_encoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    average = Average(vae, 0.998)
    optimiser = torch.optim.AdamW(
        [p for p in vae.parameters() if p.requires_grad], lr=args.lr, betas=(0.9, 0.99), weight_decay=1e-4
    )
    step, seconds = 0, 0.0
    if state:
        average.module.load_state_dict(state["average"])
        average.updates = state["step"]
        optimiser.load_state_dict(state["optimiser"])
        set_random_state(state["random"])
        step, seconds = state["step"], state["seconds"]
    print(f"{count_parameters(vae) / 1e6:.2f} M parameters, {len(combinations())} combinations, from step {step}")
    train(args, path, vae, average, optimiser, step, Clock(args.minutes, seconds))


def train(args, path: Path, vae, average: Average, optimiser, step: int, clock: Clock) -> None:
    """Run until the time is used; save every five minutes and at the end."""
    bar = tqdm(total=round(args.minutes * 60), initial=round(clock.elapsed), unit="s", mininterval=10)
    saved, smooth = clock.elapsed, {}

    def save() -> None:
        rng = random.Random(1)
        statistics = (
            {key: vae.config[key] for key in ("latents_mean", "latents_std")}
            if args.freeze_encoder
            else latent_statistics(average.module, rng)
        )
        full, small = psnr(average.module, rng, 2, *FULL), psnr(average.module, rng, 8, 17, 128)
        tqdm.write(f"step {step} {clock.elapsed / 60:.1f} min: unseen PSNR full {full:.2f} dB, small {small:.2f} dB")
        save_checkpoint(
            path,
            {
                "model": vae.state_dict(),
                "average": average.module.state_dict(),
                "optimiser": optimiser.state_dict(),
                "statistics": statistics,
                "random": random_state(),
                "step": step,
                "seconds": clock.elapsed,
                "arguments": {k: str(v) for k, v in vars(args).items()},
            },
        )

    while clock.progress < 1:
        progress = clock.progress
        batch, frames, size = clip_size(1.0 if args.full_size else progress, random)
        video = draw_batch(batch, frames, size, random).to(args.device)
        video = video.contiguous(memory_format=torch.channels_last_3d)
        optimiser.param_groups[0]["lr"] = learning_rate(args.lr, progress)
        loss, quality = training_step(vae, video, args)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in vae.parameters() if p.requires_grad], 1.0)
        optimiser.step()
        average.update(vae)
        step += 1
        key = f"{frames}x{size}"
        smooth[key] = 0.95 * smooth.get(key, quality) + 0.05 * quality
        bar.set_postfix_str(
            f"step {step} loss {loss.item():.4f} " + " ".join(f"{k} {v:.1f}" for k, v in smooth.items())
        )
        bar.update(round(clock.elapsed) - bar.n)
        if clock.elapsed - saved > 300:
            save()
            saved = clock.elapsed
    save()


if __name__ == "__main__":
    main()
