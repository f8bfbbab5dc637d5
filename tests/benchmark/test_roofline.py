"""The counts of the roofline, against what plans, buffers and a plain loop come to."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from psa_diffusers import PSAConfig, build_plan
from psa_diffusers.backends.triton.layout import PyramidLayout
from psa_diffusers.benchmark.roofline import GPUS, Call, Gpu, Work, dense_work, roofline_rows, stage_works
from psa_diffusers.synthetic import video_like_qkv

GRID, HEADS, WIDTH = (4, 16, 32), 2, 16
TOKENS = 2048  # whole blocks
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def plan():
    inputs = video_like_qkv(1, GRID, HEADS, WIDTH)
    return build_plan(*inputs, PSAConfig(compute_budget=0.2), grid=GRID)


@pytest.fixture
def call(plan):
    return Call(TOKENS, HEADS, WIDTH, plan.compute_budget)


def test_attention_is_what_the_plan_reads(plan, call):
    """Two products of head_dim, and one exponential, for each query and each row of the pyramid that it reads."""
    rows = 0
    for level in range(1, plan.num_levels + 2):
        pairs = int((plan.level_mask == level).sum())
        rows += pairs * (64 >> (level - 1) if level <= plan.num_levels else 1)
    work = stage_works(call)["hopper_attention_kernel"]
    assert work.exponentials == pytest.approx(rows * 128)
    assert work.flops == pytest.approx(rows * 128 * 2 * 2 * WIDTH)


def test_pairs_are_the_plans(plan, call):
    assert call.pairs == plan.level_mask.numel()
    works = stage_works(call)
    assert works["levels_kernel"].bytes == 4 * 2 * plan.level_mask.numel() + plan.level_mask.nbytes


def test_pyramid_reads_keys_and_values_and_writes_every_level(call):
    half = torch.bfloat16
    key = torch.empty(1, TOKENS, HEADS, WIDTH, dtype=half, device="meta")
    packed = torch.empty(1, HEADS, PyramidLayout(32, 64, 4, 0).rows, WIDTH, dtype=half, device="meta")
    assert stage_works(call)["pyramid_kernel"].bytes == 2 * key.nbytes + 2 * packed.nbytes
    assert dense_work(call).bytes == 4 * key.nbytes


def test_masses_are_sampled_queries_times_sampled_keys(call):
    """16 of each 128 queries, 8 of each 64 keys."""
    queries, keys = TOKENS // 128 * 16, TOKENS // 64 * 8
    work = stage_works(call)["masses_kernel"]
    assert work.exponentials == HEADS * queries * keys
    assert work.flops == HEADS * queries * keys * 2 * WIDTH
    other = stage_works(Call(TOKENS, HEADS, WIDTH, 0.2, PSAConfig(sampled_queries=32)))["masses_kernel"]
    assert other.flops == 2 * work.flops


def test_centroids_take_queries_of_their_own_and_two_products(call):
    work = stage_works(call)["centroids_kernel"]
    assert work.exponentials == HEADS * (TOKENS // 128 * 16) * (TOKENS // 64)
    assert work.flops == work.exponentials * 2 * 2 * WIDTH


def test_covariance_multiplies_as_many_rows_as_there_are_tokens(call):
    """Merges of levels 1, 2, 3 are a half, a quarter and an eighth of the tokens; the coarsest rows another eighth."""
    merges = sum(TOKENS >> level for level in (1, 2, 3)) + (TOKENS >> 3)
    assert stage_works(call)["covariance_kernel"].flops == 2 * HEADS * merges * WIDTH**2


def test_stages_are_named_after_kernels_that_are_there(call):
    sources = "".join(path.read_text() for path in (ROOT / "psa_diffusers").rglob("triton/*.py"))
    assert [name for name in stage_works(call) if f"def {name}(" not in sources] == []


def test_dense_attention_of_wan_14b():
    call = Call(75600, 40, 128, 0.15)
    assert dense_work(call).flops == pytest.approx(117.05e12, rel=1e-3)
    assert stage_works(call)["hopper_attention_kernel"].flops == pytest.approx(0.15 * 117.05e12, rel=1e-3)


def test_the_slowest_limit_bounds():
    gpu = Gpu(matrix_flops=100.0, bytes=10.0, exponentials=1.0)
    assert Work(100.0, 20.0, 1.5).seconds(gpu) == {"matrix products": 1.0, "memory": 2.0, "exponentials": 1.5}


def test_rows_hold_limits_and_measurements(call):
    rows = {row["stage"]: row for row in roofline_rows(call, "NVIDIA H200", {"dense": {"median": 0.01}, "other": 0.5})}
    assert rows["dense"]["measured_ms"] == 10.0
    assert rows["dense"]["share_of_limit"] == pytest.approx(rows["dense"]["least_ms"] / 10.0)
    assert rows["other"] == {"stage": "other", "measured_ms": 500.0}
    assert rows["pyramid_kernel"]["bound_by"] == "memory" and rows["pyramid_kernel"]["share_of_limit"] is None


def test_a_kernel_for_hopper_has_its_stages_limits(call):
    plain, hopper = (
        {row["stage"]: row for row in roofline_rows(call, "NVIDIA H200", {name: 0.002})}
        for name in ("masses_kernel", "hopper_masses_kernel")
    )
    assert "masses_kernel" not in hopper and len(hopper) == len(plain)
    assert hopper["hopper_masses_kernel"] == plain["masses_kernel"] | {"stage": "hopper_masses_kernel"}


def test_unknown_gpu_is_an_error(call):
    with pytest.raises(ValueError, match="no limits are known of 'a toaster'"):
        roofline_rows(call, "a toaster", {})


def test_h200_differs_in_memory_alone():
    h100, h200 = GPUS["NVIDIA H100 80GB HBM3"], GPUS["NVIDIA H200"]
    assert h200.bytes > h100.bytes and h200.matrix_flops == h100.matrix_flops


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("roofline_script", ROOT / "scripts" / "roofline.py")
    module, before = importlib.util.module_from_spec(spec), list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def rows_file(path, **changes):
    row = {
        "device_name": "NVIDIA H100 80GB HBM3",
        **{"tokens": 75600, "heads": 40, "head_dim": 128, "batch": 1, "achieved_budget": 0.15, "commit": "abc"},
        **{"query_block_size": 128, "kv_block_size": 64, "num_levels": 4, "gpu_dense": 0.2},
        "stages": json.dumps({"dense": {"median": 0.2}, "pyramid_kernel": {"median": 0.0016}, "rest": {"median": 0.1}}),
        **changes,
    }
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    return path


def test_script_writes_a_line_a_stage(script, tmp_path, capsys):
    table = tmp_path / "roofline.csv"
    assert script.main(["--rows", str(rows_file(tmp_path / "rows.csv")), "--csv", str(table)]) == 0
    capsys.readouterr()
    lines = {line["stage"]: line for line in csv.DictReader(table.open(newline=""))}
    assert float(lines["pyramid_kernel"]["least_ms"]) == pytest.approx(1.336, rel=1e-3)
    assert float(lines["pyramid_kernel"]["share_of_limit"]) == pytest.approx(1.336 / 1.6, rel=1e-3)
    assert (lines["rest"]["measured_ms"], lines["rest"]["least_ms"], lines["rest"]["commit"]) == ("100.0", "", "abc")


def test_script_needs_stages(script, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--rows", str(rows_file(tmp_path / "rows.csv", gpu_dense=""))])
    assert stop.value.code == 2
    assert "no row of one sample with stages" in capsys.readouterr().err
