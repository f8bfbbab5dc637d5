"""Times the attention of the Triton backend, stage by stage, beside dense attention on the same tensors. Needs a GPU.

    python scripts/time_attention.py --shapes 16384x12 17550x48x64 75600x40 --csv benchmarks/attention_stages_h200.csv

Stages take turns, so that a GPU that gets hot slows all of them; medians, p20 and p80. Times are GPU times: launches
are queued behind a pause, so that the host's time does not count. Planning is not in them: scripts/time_planning.py
times that. ``tflops`` counts what the plan asks for, ``compute_budget`` times dense attention's operations. ``host`` is
what the host needs to enqueue the whole call.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from time_planning import GRIDS, host_time, make_inputs, read_shape

from psa_diffusers import PSAConfig
from psa_diffusers.backends.triton import attend_triton, hopper
from psa_diffusers.backends.triton.attention import attention_launch
from psa_diffusers.backends.triton.covariance import build_covariance
from psa_diffusers.backends.triton.layout import PyramidLayout
from psa_diffusers.backends.triton.logit_variance import pyramid_launches
from psa_diffusers.backends.triton.pyramid import build_pyramid, empty_pyramid
from psa_diffusers.backends.triton.read_lists import read_lists
from psa_diffusers.gpu.target import target_of
from psa_diffusers.planning import build_plan

# Of dense attention's operations; all other stages have the compute budget.
FLOPS = {"dense": 1.0, "pyramid": 0.0, "covariance": 0.0, "logit variance": 0.0, "host": 0.0}
COLUMNS = ("gpu", "tokens", "heads", "head_dim", "compute_budget", "stage", "median_ms", "p20_ms", "p80_ms", "tflops")


def main() -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["16384x12"], metavar="TOKENSxHEADS[xHEAD_DIM]")
    parser.add_argument("--compute-budget", type=float, default=0.15)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    rows = []
    for shape in options.shapes:
        rows += measure(*read_shape(shape), options.compute_budget, options.repeats)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    return 0


def measure(tokens: int, heads: int, head_dim: int, budget: float, repeats: int) -> list[tuple]:
    """One row a stage; prints them."""
    query, key, value = make_inputs(tokens, heads, head_dim)
    plan = build_plan(query, key, value, PSAConfig(compute_budget=budget), grid=GRIDS[tokens])
    achieved = plan.compute_budget
    stages = stages_of(query, key, value, plan)
    times = take_turns(stages, repeats)
    times["host"] = [host_time(stages["whole"], repeats)]
    rows = []
    for stage, taken in times.items():
        median, low, high = (sorted(taken)[int(share * (len(taken) - 1))] for share in (0.5, 0.2, 0.8))
        share = FLOPS.get(stage.split(",")[0], achieved)
        tflops = share * 4 * heads * head_dim * tokens**2 / median / 1e9
        sizes = (torch.cuda.get_device_name(), tokens, heads, head_dim, round(achieved, 4))
        rows.append((*sizes, stage, round(median, 4), round(low, 4), round(high, 4), round(tflops, 1)))
        print(*rows[-1], flush=True)
    return rows


def stages_of(query: Tensor, key: Tensor, value: Tensor, plan) -> dict[str, Callable[[], object]]:
    """What is timed, by name: dense attention, the whole call with each kernel, and its stages."""
    head_dim, target = query.shape[-1], target_of(query.device)
    scale = head_dim**-0.5
    heads_first = [tensor.transpose(1, 2) for tensor in (query, key, value)]

    def dense(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*heads_first)

    def whole(logits: str = "variance", values: str = "covariance", hopper_kernel: bool = True) -> object:
        corrections = {"logit_correction": logits, "value_correction": values}
        with mock.patch.object(hopper, "ENABLED", hopper_kernel):
            return attend_triton(query, key, value, plan, scale=scale, **corrections)

    layout = hopper.hopper_layout(PyramidLayout(plan.kv_blocks, plan.kv_block_size, plan.num_levels))

    def build() -> object:
        return build_pyramid(key, value, layout, order=plan.order, with_centroid_bias=True)

    pyramid, lists = empty_pyramid(key, layout, with_centroid_bias=True), read_lists(plan, query.device)
    inputs = (query, key, value, pyramid, layout, plan.order, None)
    head_bias, corrected_launches = pyramid_launches(*inputs, scale=scale)

    def build_corrected() -> None:
        for launch in corrected_launches:
            launch.run()

    counted = lists.read_by_all
    build_corrected()
    covariance = build_covariance(pyramid, layout, counted)
    named = {"query_block_size": plan.query_block_size, "order": plan.order, "scale": scale}
    tensors = (query, torch.empty_like(query), None, pyramid, lists)

    def portable() -> None:
        attention_launch(*tensors, layout, covariance, head_bias, target=target, **named).run()

    stages = {
        "dense, cuDNN": lambda: dense(SDPBackend.CUDNN_ATTENTION),
        "dense, flash": lambda: dense(SDPBackend.FLASH_ATTENTION),
        "whole": whole,
        "whole, no value correction": lambda: whole(values="none"),
        "whole, no logit correction": lambda: whole(logits="none"),
        "whole, kernel for all GPUs": lambda: whole(hopper_kernel=False),
        "pyramid": build,
        "covariance": lambda: build_covariance(pyramid, layout, counted),
        "pyramid, with the logit correction": build_corrected,
        "attention, kernel for all GPUs": portable,
    }
    sizes = (plan.query_block_size, plan.kv_block_size, plan.num_levels)
    if not hopper.hopper_obstacle(target, head_dim, query.dtype, *sizes):
        stages["attention, Hopper kernel"] = lambda: hopper.hopper_attention_launch(
            *tensors, plan.level_mask, layout, covariance, head_bias, is_padded=False, **named
        ).run()
    return stages


def take_turns(stages: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds on the GPU of every stage at every repeat, after one run of each that does not count."""
    for run in stages.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(repeats):
        for name, run in stages.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(4_000_000)
            start.record()
            run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return times


if __name__ == "__main__":
    sys.exit(main())
