"""Times what collecting statistics costs: sparse runs of a transformer with it and without, taking turns.

    python scripts/time_statistics.py --csv benchmarks/statistics.csv
    python scripts/time_statistics.py --device cuda --dtype bfloat16 --steps 4 --csv benchmarks/statistics.csv

A run is ``--steps`` forwards of the transformer, all sparse, each with plans of its own; a GPU is waited for at its
end alone, as in a pipeline. Without statistics, nothing is counted, noted or timed; the planning kernels' totals of
levels, which are part of their work, are made either way. ``overhead`` is the median of the ratios of neighbouring
runs, less 1, with a bootstrapped 95 % interval: what is below zero is noise. ``counting_share`` is the time that the
host spends in the statistics' code, by a run's: on a CPU the cost itself, and less noisy than the difference; on a GPU
the most that it can be, where the GPU waits for the host. ``reading_ms`` is what ``psa_report`` takes, after a run.

``bundled`` is the model inside the package; the others have random weights and two of their blocks.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from scipy.stats import bootstrap
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from time_transformer import CLASS, MODELS, check_sparse

from psa_diffusers import PSAConfig, demo, enable_psa
from psa_diffusers.benchmark.timing import quantiles
from psa_diffusers.cli.bench_output import append_csv, environment_of
from psa_diffusers.integration import PSAStatistics
from psa_diffusers.integration.forecast import random_model
from psa_diffusers.integration.processor import installed_processors
from psa_diffusers.report.run_report import report_of

BUNDLED, BUNDLED_LATENTS = "bundled", (17, 16, 16)  # of 65 frames, 256x256
COUNTING = ("reset", "count_step", "count_dense", "count_sparse", "note")


class NoStatistics(PSAStatistics):
    """Counts nothing."""

    def count_step(self, *ignored: Any, **named: Any) -> None: ...

    def count_dense(self, *ignored: Any, **named: Any) -> None: ...

    def count_sparse(self, *ignored: Any, **named: Any) -> None: ...

    def note(self, text: str) -> None: ...

    @contextmanager
    def timed(self, *ignored: Any, **named: Any) -> Iterator[None]:
        yield


class ClockedStatistics(PSAStatistics):
    """Counts, and adds up the host's ``seconds`` in its own code."""

    seconds = 0.0

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return self._clocked(value) if name in COUNTING else value

    def _clocked(self, method: Callable[..., None]) -> Callable[..., None]:
        def call(*given: Any, **named: Any) -> None:
            started = time.perf_counter()
            method(*given, **named)
            self.seconds += time.perf_counter() - started

        return call

    @contextmanager
    def timed(self, *given: Any, **named: Any) -> Iterator[None]:
        started = time.perf_counter()
        with super().timed(*given, **named):
            inside = time.perf_counter()
            yield
            left = time.perf_counter()
        self.seconds += inside - started + time.perf_counter() - left


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[BUNDLED, *MODELS], default=BUNDLED)
    parser.add_argument("--compute-budget", type=float, default=0.15)
    parser.add_argument("--steps", type=int, default=2, help="of a run (default 2)")
    parser.add_argument("--repeats", type=int, default=20, help="runs with statistics, and without (default 20)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="float32")
    parser.add_argument("--cpu-time", action="store_true", help="of the process, for a busy machine; not with a GPU")
    parser.add_argument("--csv", type=Path, help="append the row here")
    options = parser.parse_args(arguments)
    if options.steps < 2 or options.repeats < 3:  # a single step over and over is no new run
        parser.error("--steps must be at least 2, and --repeats at least 3")
    if options.cpu_time and options.device != "cpu":
        parser.error("--cpu-time is for --device cpu")
    row = measure(options) | environment_of(options.device)
    print(json.dumps(row, indent=2))
    if options.csv:
        append_csv(options.csv, row)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The row."""
    model, inputs, facts = load(options)
    enable_psa(model, PSAConfig(compute_budget=options.compute_budget, dense_warmup=0.0))
    processor = installed_processors([model])[0]
    counted = PSAStatistics()

    def run_with(statistics: PSAStatistics) -> float:
        processor.statistics = statistics
        clock = time.process_time if options.cpu_time else time.perf_counter
        return seconds_of_run(model, inputs, processor, options.steps, clock)

    with torch.inference_mode():
        run_with(counted), run_with(NoStatistics())  # compiles
        check_sparse(counted, options)
        on, off = take_turns(lambda: run_with(counted), lambda: run_with(NoStatistics()), options.repeats)
        share = counting_share(run_with)
    return {
        **facts,
        "dtype": options.dtype,
        "steps": options.steps,
        "compute_budget": counted.compute_budget_sparse,
        "sparse_calls": counted.sparse_calls,
        "backend": counted.backend,
        "planner": counted.planner,
        "repeats": options.repeats,
        "clock": "cpu time" if options.cpu_time else "wall",
        **compare(on, off),
        "counting_share": share,
        "reading_ms": 1e3 * reading_seconds(counted),
    }


def load(options: argparse.Namespace) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """The transformer, the arguments of a forward, and what they are."""
    torch.manual_seed(0)
    if options.model == BUNDLED:
        model, latents, weights = bundled_transformer(), BUNDLED_LATENTS, "trained"
    else:
        settings, _, latents = MODELS[options.model]
        model, weights = random_model(CLASS, {**settings, "num_layers": 2}, options.device), "random"
    model = nn.Module.to(model, device=options.device, dtype=getattr(torch, options.dtype)).eval()
    patch = np.prod(model.config.patch_size)
    facts = {
        "model": options.model,
        "weights": weights,
        "blocks": model.config.num_layers,
        "tokens": int(np.prod(latents) // patch),
        "heads": model.config.num_attention_heads,
        "head_dim": model.config.attention_head_dim,
    }
    return model, inputs_of(model, latents), facts


def inputs_of(model: nn.Module, latents: tuple[int, int, int]) -> dict[str, Any]:
    """Arguments of a forward: noise for latents and text."""
    own = {"device": model.device, "dtype": model.dtype}
    return {
        "hidden_states": torch.randn(1, model.config.in_channels, *latents, **own),
        "timestep": torch.full((1,), 500, device=model.device),
        "encoder_hidden_states": torch.randn(1, 512, model.config.text_dim, **own),
    }


def bundled_transformer() -> nn.Module:
    """Of the model inside the package, without its text encoder."""
    return getattr(diffusers, CLASS).from_pretrained(demo.model_folder() / "transformer")


def seconds_of_run(
    model: nn.Module,
    inputs: dict[str, Any],
    processor: Any,
    steps: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Of so many denoising steps; a GPU is idle before and after."""
    on_gpu = inputs["hidden_states"].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    started = clock()
    for index in range(steps):
        with processor.step(index, steps):
            model(**inputs)
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - started


def take_turns(
    first: Callable[[], float], second: Callable[[], float], repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of both, one after the other; who begins changes from pair to pair."""
    pairs = [(first(), second()) if i % 2 else (second(), first())[::-1] for i in range(repeats)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def compare(on: list[float], off: list[float]) -> dict[str, float]:
    """Medians in milliseconds, and the overhead with its interval."""
    ratios = np.array(on) / np.array(off) - 1
    options = {"method": "percentile", "rng": np.random.default_rng(0), "n_resamples": 9999}
    interval = bootstrap((ratios,), np.median, **options).confidence_interval
    return {
        "with_ms": 1e3 * quantiles(on)["median"],
        "without_ms": 1e3 * quantiles(off)["median"],
        "overhead": float(np.median(ratios)),
        "overhead_low": float(interval.low),
        "overhead_high": float(interval.high),
    }


def counting_share(run_with: Callable[[PSAStatistics], float], repeats: int = 3) -> float:
    """The host's time in the statistics' code by a run's, the median of some runs."""
    shares = []
    for _ in range(repeats):
        clocked = ClockedStatistics()
        seconds = run_with(clocked)
        shares.append(clocked.seconds / seconds)
    return float(np.median(shares))


def reading_seconds(counted: PSAStatistics) -> float:
    """Of ``psa_report`` on the last run's counts."""
    started = time.perf_counter()
    report_of(counted)
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
