"""Times the planner's GPU kernels, stage by stage, beside dense attention on the same tensors. Needs a GPU.

    python scripts/time_planning.py --shapes 4096x12 16384x12 75600x40 --csv benchmarks/planning_h200.csv
    python scripts/time_planning.py --shapes 75600x40 --presets psa-3 psa-threshold --torch

Times are GPU times: launches are queued behind a pause, so that the host's time does not count; ``host`` is what the
host needs to enqueue the whole plan, ``torch planner`` (with ``--torch``) the plan by torch operators. Medians. Inputs
are smooth random fields with noise, bfloat16; their head dim is 128 unless a shape names another.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from psa_diffusers import PSAConfig
from psa_diffusers.backends.triton.read_lists import empty_read_lists, launch_order_launch, read_lists_launch
from psa_diffusers.gpu.target import target_of
from psa_diffusers.planning import build_plan
from psa_diffusers.planning.blocks import make_layout
from psa_diffusers.planning.triton import planner

GRIDS = {
    **{1024 * frames: (frames, 32, 32) for frames in (2, 4, 6, 8, 16, 32)},
    17550: (13, 30, 45),
    32760: (21, 30, 52),
    75600: (21, 45, 80),
}
COLUMNS = ("gpu", "preset", "tokens", "heads", "head_dim", "stage", "launches", "ms", "share_of_dense")


def main() -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x12", "16384x12"], metavar="TOKENSxHEADS[xHEAD_DIM]")
    parser.add_argument("--presets", nargs="+", default=["default"], choices=list(PSAConfig.presets()), metavar="NAME")
    parser.add_argument("--settings", type=json.loads, default={}, metavar="JSON", help="what differs from the preset")
    parser.add_argument("--torch", action="store_true", help="also time the planner of torch operators")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    rows = []
    for shape, preset in itertools.product(options.shapes, options.presets):
        sizes = read_shape(shape)
        config = replace(PSAConfig.preset(preset), **options.settings)
        times = measure(*sizes, config, options.repeats, options.torch)
        dense = times["dense"][1]
        for stage, (launches, ms) in times.items():
            known = (torch.cuda.get_device_name(), preset, *sizes)
            rows.append((*known, stage, launches, round(ms, 4), f"{ms / dense:.4f}"))
            print(*rows[-1], flush=True)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    return 0


def read_shape(text: str) -> tuple[int, int, int]:
    """Tokens, heads and head dim."""
    tokens, heads, head_dim = map(int, f"{text}x128".split("x")[:3])
    return tokens, heads, head_dim


def measure(
    tokens: int, heads: int, head_dim: int, config: PSAConfig, repeats: int, with_torch: bool
) -> dict[str, tuple[int, float]]:
    """Launches and milliseconds by stage: dense attention, the whole plan, its kernels, the block lists, host time."""
    query, key, value = make_inputs(tokens, heads, head_dim)
    grid = GRIDS[tokens]

    def plan(config: PSAConfig = config) -> object:
        return build_plan(query, key, value, config, grid=grid)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(*(tensor.transpose(1, 2) for tensor in (query, key, value)))

    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        times = {"dense": (1, gpu_time(dense, min(repeats, 5)))}
    stages = launches_of(query, key, value, config, grid)
    times["plan"] = (sum(map(len, stages.values())) - 2, gpu_time(plan, repeats))
    for name, launches in stages.items():
        times[name] = (
            len(launches),
            gpu_time(lambda launches=launches: [launch.run() for launch in launches], repeats),
        )
    times["host"] = (0, host_time(plan, repeats))
    if with_torch:
        by_torch = replace(config, backend="torch")
        times["torch planner"] = (0, gpu_time(lambda: plan(by_torch), min(repeats, 5)))
    return times


def launches_of(query: Tensor, key: Tensor, value: Tensor, config: PSAConfig, grid: tuple[int, int, int]) -> dict:
    """Every launch of a plan and of its block lists, by kernel, over buffers that a whole plan has filled."""
    target, sizes = target_of(query.device), (config.query_block_size, config.kv_block_size)
    where = {"curve": config.order, "grid": grid, "full_tokens": None, "device": query.device}
    layout = make_layout(query.shape[1], key.shape[1], *sizes, **where)
    known = {"scale": query.shape[-1] ** -0.5, "target": target}
    levels, launches, _ = planner.level_plan(query, key, value, config, layout, None, **known)
    lists, lengths = empty_read_lists(levels, config.num_levels)
    launches.append(read_lists_launch(levels, lists, lengths, config.kv_block_size))
    launches.append(launch_order_launch(levels, lists, lengths))
    by_kernel: dict[str, list] = {}
    for launch in launches:
        launch.run()
        by_kernel.setdefault(launch.kernel.__name__, []).append(launch)
    return by_kernel


def gpu_time(run: Callable[[], object], repeats: int) -> float:
    """Median milliseconds on the GPU."""
    run()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def host_time(run: Callable[[], object], repeats: int) -> float:
    """Median milliseconds until the call returns, on an idle GPU."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def make_inputs(tokens: int, heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """[1, tokens, heads, head_dim] bfloat16, made on the GPU: queries share half of their field with the keys."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    query, key, value = (torch.empty(1, tokens, heads, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    for head in range(heads):
        shared, own, content = (_field(GRIDS[tokens], head_dim, generator) for _ in range(3))
        for tensor, field in ((query, 2.0 * (shared + own) / 2**0.5), (key, shared), (value, content)):
            noise = torch.randn(field.shape, device="cuda", generator=generator)
            tensor[0, :, head] = 0.84 * field + 0.55 * noise
    return query, key, value


def _field(grid: tuple[int, int, int], head_dim: int, generator: torch.Generator) -> Tensor:
    coarse = torch.randn(1, head_dim, *(max(2, size // 3) for size in grid), device="cuda", generator=generator)
    field = F.interpolate(coarse, size=grid, mode="trilinear", align_corners=True)
    return (field / field.std()).reshape(head_dim, -1).T


if __name__ == "__main__":
    sys.exit(main())
