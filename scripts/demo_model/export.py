"""Write the trained demo model as a folder that stock `DiffusionPipeline.from_pretrained` loads.

Example: python scripts/demo_model/export.py --vae runs/demo/vae/checkpoint.pt \\
    --transformer runs/demo/transformer/checkpoint.pt --out psa_diffusers/demo/model
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from cache_latents import load_vae
from captions import build_tokenizer, vocabulary
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from scenes import FPS
from train_transformer import build_model
from training import load_checkpoint

DEFAULTS = {
    "num_frames": 65,
    "height": 256,
    "width": 256,
    "num_inference_steps": 16,
    "guidance_scale": 3.0,
    "negative_prompt": "",
    "fps": FPS,
}
SHIFT = 5.0  # what the transformer's noise levels were shifted by at the full grid


def build_pipeline(vae_checkpoint: Path, transformer_checkpoint: Path) -> WanPipeline:
    """The stock pipeline with the averaged weights of two checkpoints."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).eval()
    model.load_state_dict(load_checkpoint(transformer_checkpoint)["average"])
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=model.text_encoder,
        vae=load_vae(vae_checkpoint),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        transformer=model.transformer,
        transformer_2=None,
        boundary_ratio=None,
        expand_timesteps=False,
    )


def portable(folder: Path) -> None:
    """Name classes so that transformers 4 and 5 both find them, and drop what only one of them knows."""
    for path in (folder / "model_index.json", folder / "tokenizer" / "tokenizer_config.json"):
        path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    path = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--transformer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model; replaced when it exists")
    args = parser.parse_args()
    pipeline = build_pipeline(args.vae, args.transformer)
    shutil.rmtree(args.out, ignore_errors=True)
    # The VAE's encoder is not used to generate: half precision halves its file, and it loads as float32.
    pipeline.vae.to(torch.float16)
    pipeline.save_pretrained(args.out, safe_serialization=True)
    portable(args.out)
    (args.out / "defaults.json").write_text(json.dumps(DEFAULTS, indent=2) + "\n")
    (args.out / "vocabulary.json").write_text(json.dumps(vocabulary(), indent=2) + "\n")
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
