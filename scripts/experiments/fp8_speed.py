"""What e4m3 products gain in time on a Hopper GPU, and what they cost in accuracy there, beside the package's kernel.

    python scripts/experiments/fp8_speed.py --csv benchmarks/experiments/fp8_speed.csv

The attention kernels alone, without the value correction, on the same pyramid and plan of the default rule, inputs of
``psa_diffusers.synthetic``. The kernel with e4m3 values takes plans of three levels alone, so that the package's is
timed on those too. Errors are over sampled blocks of queries, against float64: ``rounding`` on the same plan and the
pyramid in bfloat16, ``emulated`` beside plain torch on the e4m3 numbers that the kernel read (weights not rounded),
``error`` against dense attention.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "laboratory"))
from fp8_launch import LARGEST, Short, fp8_attention_launch, short_layout, shorten, value_granules

from psa_diffusers import PSAConfig, build_plan
from psa_diffusers.backends.triton.hopper import hopper_attention_launch
from psa_diffusers.backends.triton.layout import PyramidLayout
from psa_diffusers.backends.triton.pyramid import Pyramid, build_pyramid, empty_pyramid
from psa_diffusers.backends.triton.read_lists import ReadLists, empty_read_lists, read_lists
from psa_diffusers.benchmark.timing import quantiles, seconds_of
from psa_diffusers.gpu.kernel_launch import KernelLaunch
from psa_diffusers.planning.plan import Plan
from psa_diffusers.synthetic import video_like_qkv

GRID, HEADS, HEAD_DIM = (21, 45, 80), 40, 128
QUERY_BLOCK, KV_BLOCK = 128, 64


class Variant(NamedTuple):
    """A kernel and the levels of its plan; ``stages`` None = the package's."""

    levels: int
    stages: int | None = None
    e4m3_values: bool = False
    fresh: bool = False
    convert_first: bool = False
    flat: bool = False
    registers: int = 232


VARIANTS = {
    "bf16, 4 levels": Variant(4),
    "QK e4m3, 4 levels": Variant(4, 3),
    "QK e4m3, 4 levels, flat tiles": Variant(4, 3, flat=True),
    "bf16": Variant(3),
    "QK e4m3": Variant(3, 3),
    "both e4m3": Variant(3, 4, True),
    "both e4m3, weights first": Variant(3, 4, True, convert_first=True),
    "both e4m3, weights first, 5 stages": Variant(3, 5, True, convert_first=True),
    "both e4m3, weights first, flat tiles": Variant(3, 4, True, convert_first=True, flat=True),
    "both e4m3, sums in registers": Variant(3, 4, True, fresh=True, convert_first=True, registers=240),
}


class Setting(NamedTuple):
    """A plan with everything made from it."""

    plan: Plan
    layout: PyramidLayout
    lists: ReadLists
    level_mask: Tensor
    pyramid: Pyramid
    short: Short  # e4m3 keys, and granules of values


def settings(query: Tensor, key: Tensor, value: Tensor, grid: tuple[int, int, int], levels: int) -> Setting:
    plan = build_plan(query, key, value, PSAConfig(num_levels=levels), grid=grid)
    plan = replace(plan, order=plan.order.to(key.device))
    layout = short_layout(PyramidLayout(triton.cdiv(key.shape[1], KV_BLOCK), KV_BLOCK, levels))
    pyramid = build_pyramid(key, value, layout, order=plan.order, with_centroid_bias=True)
    short = shorten(pyramid, layout, with_values=levels == 3)
    return Setting(plan, layout, read_lists(plan, key.device), plan.level_mask.contiguous(), pyramid, short)


def empty_setting(query: Tensor, levels: int) -> Setting:
    """Without memory, for compilation."""
    length, heads = query.shape[1:3]
    layout = short_layout(PyramidLayout(triton.cdiv(length, KV_BLOCK), KV_BLOCK, levels))
    blocks = (1, heads, triton.cdiv(length, QUERY_BLOCK), layout.kv_blocks)
    level_mask = query.new_empty(blocks, dtype=torch.int8)
    pyramid = empty_pyramid(query, layout, False, True)
    numbers = query.new_empty(1, heads, layout.rows, HEAD_DIM, dtype=torch.uint8)
    scales = query.new_empty(1, heads, HEAD_DIM, dtype=torch.float32)
    short = Short(numbers, scales[..., 0], numbers, scales, scales)
    order = query.new_empty(length, dtype=torch.int64)
    plan = Plan(level_mask, length, length, QUERY_BLOCK, KV_BLOCK, levels, order)
    return Setting(plan, layout, empty_read_lists(level_mask, levels)[0], level_mask, pyramid, short)


def launch_of(variant: Variant, setting: Setting, query: Tensor, out: Tensor, counter: Tensor) -> KernelLaunch:
    named = {"query_block_size": QUERY_BLOCK, "order": setting.plan.order, "scale": HEAD_DIM**-0.5, "counter": counter}
    if variant.stages is None:
        lists = (setting.lists, setting.level_mask, setting.layout)
        return hopper_attention_launch(query, out, None, setting.pyramid, *lists, **named, is_padded=False)
    short = setting.short if variant.e4m3_values else setting.short._replace(value=None)
    return fp8_attention_launch(
        query,
        out,
        setting.pyramid,
        short,
        setting.lists,
        setting.level_mask,
        setting.layout,
        **named,
        stages=variant.stages,
        fresh=variant.fresh,
        convert_first=variant.convert_first,
        flat=variant.flat,
        registers=variant.registers,
    )


def compile_one(name: str) -> None:
    """In a process of its own, so that all are compiled at a time, into Triton's cache."""
    if name.startswith("plan"):
        settings(*inputs(8), GRID, int(name[-1]))
        return
    query = torch.empty(1, GRID[0] * GRID[1] * GRID[2], HEADS, HEAD_DIM, dtype=torch.bfloat16, device="meta")
    counter = torch.empty(1, dtype=torch.int32, device="meta")
    launch = launch_of(VARIANTS[name], empty_setting(query, VARIANTS[name].levels), query, query, counter)
    launch.kernel.warmup(**launch.arguments, **launch.options, grid=launch.grid)


def inputs(heads: int) -> list[Tensor]:
    drawn = video_like_qkv(1, GRID, heads, HEAD_DIM, dtype=torch.bfloat16, device="cuda", draw_on="cuda")
    return list(drawn)


# -- errors -----------------------------------------------------------------------------------------------------------


def rows_read(setting: Setting, head: int, block: int) -> Tensor:
    """Packed rows that a block of queries reads."""
    levels = setting.level_mask[0, head, block]
    rows = []
    for level in range(1, setting.layout.num_levels + 2):
        size = setting.layout.rows_per_block(level)
        blocks = (levels == level).nonzero()
        row = setting.layout.first_row(level) + blocks * size + torch.arange(size, device=blocks.device)
        rows.append(row.view(-1))
    return torch.cat(rows)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """In float64; ``bias`` is log2 of the tokens in a row."""
    logits = query.double() @ key.double().mT * HEAD_DIM**-0.5 + bias.double() * 0.6931471805599453
    return logits.softmax(-1) @ value.double()


def e4m3(numbers: Tensor) -> Tensor:
    return numbers.view(torch.float8_e4m3fn).double()


def unpacking(rows: int, device: torch.device) -> Tensor:
    """Where in granules each byte of values [rows, HEAD_DIM] is: int64 [rows * HEAD_DIM]."""
    number = torch.arange(rows * HEAD_DIM, device=device).view(rows, HEAD_DIM)
    moved = [value_granules((number >> shift & 255).to(torch.uint8)).flatten().long() << shift for shift in (0, 8, 16)]
    moved += [value_granules((number >> 24 & 255).to(torch.uint8)).flatten().long() << 24]
    return torch.argsort(sum(moved))


def expected(setting: Setting, inputs: list[Tensor], samples: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Output of sampled blocks [samples, queries, head_dim], float64: by bf16 rows, by e4m3 ones, dense."""
    query, key, value = inputs
    short, found = setting.short, {"bf16": [], "QK": [], "both": [], "dense": []}
    last = None
    place = unpacking(setting.layout.rows, query.device)
    for head, block in samples:
        if head != last:
            last, values8 = head, None
            keys8 = e4m3(short.key[0, head]) * short.key_scale[0, head]
            if short.value is not None:
                values8 = e4m3(short.value[0, head].flatten()[place].view(-1, HEAD_DIM))
                values8 = values8 * short.value_scale[0, head] + short.value_mean[0, head]
        tokens = setting.plan.order[block * QUERY_BLOCK : (block + 1) * QUERY_BLOCK]
        queries = query[0, tokens, head].float()
        largest = queries.abs().amax(1, keepdim=True).clamp(min=1e-30)
        queries8 = (queries * (LARGEST / largest)).to(torch.float8_e4m3fn).double() * (largest / LARGEST)
        rows = rows_read(setting, head, block)
        rows = rows[setting.pyramid.bias[0, rows] > -torch.inf]
        bias = setting.pyramid.bias[0, rows]
        row_key, row_value = setting.pyramid.key[0, head, rows], setting.pyramid.value[0, head, rows]
        found["bf16"].append(attend(queries, row_key, row_value, bias))
        found["QK"].append(attend(queries8, keys8[rows], row_value, bias))
        found["both"].append(attend(queries8, keys8[rows], row_value if values8 is None else values8[rows], bias))
        found["dense"].append(attend(queries, key[0, :, head], value[0, :, head], bias.new_zeros(key.shape[1])))
    return {name: torch.stack(blocks) for name, blocks in found.items()}


def sampled(out: Tensor, setting: Setting, samples: list[tuple[int, int]]) -> Tensor:
    order = setting.plan.order
    blocks = [out[0, order[block * QUERY_BLOCK : (block + 1) * QUERY_BLOCK], head] for head, block in samples]
    return torch.stack(blocks).double()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# -- the experiment ---------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/experiments/fp8_speed.csv"))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        compile_one(arguments.compile)
        return
    levels = sorted({VARIANTS[name].levels for name in arguments.variants})
    rows = experiment(arguments.variants, levels, arguments.repeats)
    if rows:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def compile_all(names: list[str]) -> None:
    start = time.perf_counter()
    me = [sys.executable, __file__, "--compile"]
    running = {name: subprocess.Popen([*me, name], stderr=subprocess.PIPE, text=True) for name in names}
    for name, process in running.items():
        _, errors = process.communicate()
        if process.returncode:
            print(f"{name}: {errors.strip().splitlines()[-1]}", flush=True)
    print(f"compiled in {time.perf_counter() - start:.1f} s", flush=True)


def experiment(names: list[str], levels: list[int], repeats: int) -> list[dict[str, Any]]:
    compile_all([*names, *(f"plan{number}" for number in levels)])
    drawn = inputs(HEADS)
    query = drawn[0]
    all_settings = {number: settings(*drawn, GRID, number) for number in levels}
    samples = [(head, block) for head in range(0, HEADS, 6) for block in (3, 200, 403, 570)]
    wanted = {number: expected(setting, drawn, samples) for number, setting in all_settings.items()}
    counter = torch.zeros(1, dtype=torch.int32, device="cuda")
    outputs, launches = {}, {}
    for name in names:
        setting = all_settings[VARIANTS[name].levels]
        out = torch.full_like(query, torch.nan)
        launch = launch_of(VARIANTS[name], setting, query, out, counter)
        counter.zero_()
        launch.run()
        torch.cuda.synchronize()
        outputs[name] = sampled(out, setting, samples)
        print(name, f"bad numbers: {int((~out.isfinite()).sum())}", flush=True)
        launches[name] = launch
    seconds = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            counter.zero_()
            seconds[name].append(seconds_of(launches[name].run, "cuda", queued=True))
    rows = []
    for name in names:
        variant = VARIANTS[name]
        true = wanted[variant.levels]
        emulated = true["both" if variant.e4m3_values else "bf16" if variant.stages is None else "QK"]
        times = quantiles(seconds[name])
        base = quantiles(seconds["bf16, 4 levels" if variant.levels == 4 else "bf16"])["median"]
        flops = 4 * HEAD_DIM * HEADS * query.shape[1] ** 2 * all_settings[variant.levels].plan.compute_budget
        rows.append(
            {
                "variant": name,
                "levels": variant.levels,
                "compute_budget": round(all_settings[variant.levels].plan.compute_budget, 5),
                **{f"{key}_ms": round(value * 1e3, 3) for key, value in times.items()},
                "speedup": round(base / times["median"], 3),
                "tflops": round(flops / times["median"] / 1e12, 1),
                "rounding": round(relative(outputs[name], true["bf16"]), 5),
                "emulated": round(relative(outputs[name], emulated), 5),
                "error": round(relative(outputs[name], true["dense"]), 5),
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "triton": triton.__version__,
            }
        )
        print(*rows[-1].values(), flush=True)
    return rows


if __name__ == "__main__":
    main()
