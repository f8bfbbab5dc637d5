"""Times blocks of a Wan2.1-shaped transformer, dense and sparse, and composes the time of a whole run from them.

    python scripts/time_transformer.py --model wan2.1-14b-720p --csv benchmarks/transformer_h200.csv

Weights and latents are random, the width is the model's; only ``--blocks`` of its blocks exist. A step of all blocks is
composed: what is outside the blocks, once, and the median block as often as the model has blocks. A run of ``--steps``
denoising steps is composed from dense and sparse steps. Nothing of this is a measured whole run, and rows say so.

Dense attention is cuDNN's on a GPU. A sparse step plans anew in every block. ``attention_share`` (a) is that of dense
self-attention in a dense step; ``ceiling`` is 1 / (w + (1 - w) (1 - a + a b)), w the share of dense steps and b the
compute budget: the speedup if attention alone got faster, and that by 1 / b; ``share_of_ceiling`` is what is reached.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from psa_diffusers import PSAConfig, disable_psa, enable_psa
from psa_diffusers.cli.bench_output import append_csv, environment_of
from psa_diffusers.integration.example_inputs import EXAMPLES
from psa_diffusers.integration.forecast import random_model, speedup_ceiling
from psa_diffusers.integration.schedule import dense_steps

CLASS = "WanTransformer3DModel"
WAN = {
    "patch_size": [1, 2, 2],
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "attention_head_dim": 128,
}
# Settings of the published models, layers, latents (frames, height, width).
MODELS = {
    "wan2.1-14b-720p": ({**WAN, "num_attention_heads": 40, "ffn_dim": 13824}, 40, (21, 90, 160)),
    "wan2.1-1.3b-480p": ({**WAN, "num_attention_heads": 12, "ffn_dim": 8960}, 30, (21, 60, 104)),
    "tiny": (
        {**WAN, "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64, "text_dim": 32},
        4,
        (4, 16, 16),
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="wan2.1-14b-720p")
    parser.add_argument("--compute-budget", type=float, default=0.15)
    parser.add_argument("--blocks", type=int, default=2, help="that exist (default 2)")
    parser.add_argument("--steps", type=int, default=50, help="of the composed run (default 50)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--csv", type=Path, help="append the row here")
    options = parser.parse_args(arguments)
    if min(options.blocks, options.steps, options.repeats) < 1:
        parser.error("--blocks, --steps and --repeats must be at least 1")
    row = measure(options) | environment_of(options.device)
    print(json.dumps(row, indent=2))
    if options.csv:
        append_csv(options.csv, row)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The row."""
    settings, layers, latents = MODELS[options.model]
    torch.manual_seed(0)
    model = random_model(CLASS, {**settings, "num_layers": options.blocks}, options.device)
    model = nn.Module.to(model, getattr(torch, options.dtype))
    inputs = EXAMPLES[CLASS].inputs(model, latents)
    config = PSAConfig(compute_budget=options.compute_budget, dense_warmup=0.0)
    tokens = math.prod(latents) // 4
    with torch.inference_mode():
        dense = timed_steps(model, inputs, tokens, options.repeats)
        enable_psa(model, config)
        processor = model.blocks[0].attn1.processor
        with processor.step(0, 1):
            sparse = timed_steps(model, inputs, tokens, options.repeats)
        counted = processor.statistics
        check_sparse(counted, options)
        disable_psa(model)
    return {
        "model": options.model,
        "weights": "random",
        "blocks": options.blocks,
        "layers": layers,
        "tokens": tokens,
        "heads": settings["num_attention_heads"],
        "head_dim": settings["attention_head_dim"],
        "dtype": options.dtype,
        "compute_budget": counted.compute_budget_sparse,
        "backend": counted.backend,
        "backend_reason": counted.backend_reason,
        "repeats": options.repeats,
        **compose(dense, sparse, layers, options.steps, counted.compute_budget_sparse),
    }


def check_sparse(counted: Any, options: argparse.Namespace) -> None:
    """Every self-attention call of the sparse steps was sparse.

    Raises:
        RuntimeError: some were not, and the times would be of something else.
    """
    if counted.dense_calls or not counted.sparse_calls:
        raise RuntimeError(f"{counted.dense_calls} calls stayed dense: {dict(counted.dense_reasons)}")


def timed_steps(model: nn.Module, inputs: dict[str, Any], tokens: int, repeats: int) -> dict[str, float]:
    """Median seconds ``outside`` all blocks, of a ``block``, and of its dense self-``attention`` (0 if sparse)."""
    outside, blocks, attention = [], [], []
    for repeat in range(1 + repeats):
        clock = Clock(inputs["hidden_states"].device)
        with ExitStack() as stack:
            for block in model.blocks:
                stack.enter_context(clock.around(block, "block"))
            stack.enter_context(clock.in_self_attention(tokens))
            stack.enter_context(dense_kernels(inputs["hidden_states"].device))
            with clock.timed("whole"):
                model(**inputs)
        if repeat > 0:  # the first compiles
            taken = clock.seconds()
            outside.append(taken["whole"][0] - sum(taken["block"]))
            blocks += taken["block"]
            attention += taken.get("attention", [])
    return {
        "outside": statistics.median(outside),
        "block": statistics.median(blocks),
        "attention": statistics.median(attention) if attention else 0.0,
    }


@contextmanager
def dense_kernels(device: torch.device) -> Iterator[None]:
    """cuDNN's attention on a GPU, and others only where it cannot."""
    if device.type != "cuda":
        yield
        return
    kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(kernels, set_priority=True):
        yield


class Clock:
    """Seconds of named parts: by events on a GPU, which is not waited for until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._parts: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        started = self._now()
        yield
        self._parts.append((part, started, self._now()))

    @contextmanager
    def around(self, module: nn.Module, part: str) -> Iterator[None]:
        """Inside, every forward of the module counts."""
        started = []
        handles = [
            module.register_forward_pre_hook(lambda *ignored: started.append(self._now())),
            module.register_forward_hook(lambda *ignored: self._parts.append((part, started.pop(), self._now()))),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def in_self_attention(self, tokens: int) -> Iterator[None]:
        """Inside, every dense attention of so many tokens over as many counts as ``attention``."""
        native = F.scaled_dot_product_attention

        def attention(query: torch.Tensor, key: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
            if query.shape[-2] != tokens or key.shape[-2] != tokens:
                return native(query, key, *rest, **named)
            with self.timed("attention"):
                return native(query, key, *rest, **named)

        with mock.patch.object(F, "scaled_dot_product_attention", attention):
            yield

    def seconds(self) -> dict[str, list[float]]:
        if self._is_gpu:
            torch.cuda.synchronize()
        found: dict[str, list[float]] = {}
        for part, started, ended in self._parts:
            taken = started.elapsed_time(ended) / 1e3 if self._is_gpu else ended - started
            found.setdefault(part, []).append(taken)
        return found


def compose(
    dense: dict[str, float], sparse: dict[str, float], layers: int, steps: int, budget: float
) -> dict[str, Any]:
    """Seconds of whole steps and of a run, and how near its speedup is to the ceiling.

    ``dense`` and ``sparse`` are what :func:`timed_steps` gives; ``budget`` is the compute budget of sparse calls.
    """
    dense_step = dense["outside"] + layers * dense["block"]
    sparse_step = sparse["outside"] + layers * sparse["block"]
    share = layers * dense["attention"] / dense_step
    warmup = dense_steps(PSAConfig().dense_warmup, steps)
    run = warmup * dense_step + (steps - warmup) * sparse_step
    speedup = steps * dense_step / run
    ceiling = speedup_ceiling(share, budget, warmup, steps)
    return {
        "dense_block": dense["block"],
        "dense_attention": dense["attention"],
        "sparse_block": sparse["block"],
        "outside_blocks": dense["outside"],
        "dense_step": dense_step,
        "sparse_step": sparse_step,
        "attention_share": share,
        "step_speedup": dense_step / sparse_step,
        "steps": steps,
        "dense_steps": warmup,
        "run_seconds_dense": steps * dense_step,
        "run_seconds": run,
        "run_speedup": speedup,
        "ceiling": ceiling,
        "share_of_ceiling": speedup / ceiling,
        "composed": f"from {layers} times the median block and what is outside the blocks; one forward a step",
    }


if __name__ == "__main__":
    sys.exit(main())
