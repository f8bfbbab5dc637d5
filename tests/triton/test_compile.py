"""Every kernel compiles for every target without a GPU, spills nothing, and fits in what the target can launch."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from psa_diffusers.backends.triton.inspection import (
    CORE_KERNELS,
    HOPPER_KERNELS,
    KERNELS,
    LIST_KERNELS,
    SHARED_MEMORY_LIMITS,
    TARGETS,
    Case,
    Report,
    Resources,
    compile_case,
    local_memory_in_matrix_loops,
    report_cases,
)
from psa_diffusers.planning.triton.inspected import HOPPER_PLANNING_KERNELS

ROOT = Path(__file__).resolve().parents[2]
# One tile a target and dtype; every kernel somewhere.
LEAN = [
    case
    for target in TARGETS
    for case in (
        Case("attention", target, "fp16", 64),
        Case("attention", target, "bf16", 128),
        Case("masses", target, "bf16", 128),
        *(Case(kernel, target, "bf16", 64) for kernel in LIST_KERNELS),
    )
] + [
    Case(kernel, target, "bf16", 128)
    for kernel in (
        "attention+covariance+variance",
        "pyramid",
        "query_power",
        "logit_variance",
        "covariance",
        "covariance_finish",
        "statistics",
        "centroids",
        "prices",
        "masses+max",
        "similarity",
        "strided_masses",
    )
    for target in ("sm_90", "gfx942")
]
MATRIX_UNITS = {
    "sm_80": "mma.sync",
    "sm_89": "mma.sync",
    "sm_90": "wgmma",
    "sm_100": "tcgen05",
    "sm_120": "mma.sync",
    "gfx942": "mfma",
}


def case_id(case: Case) -> str:
    return f"{case.kernel}-{case.target}-{case.dtype}-{case.head_dim}-{case.query_block_size}x{case.kv_block_size}"


@pytest.fixture(autouse=True)
def compiled_here():
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels imported under TRITON_INTERPRET=1 cannot be compiled")


@pytest.mark.parametrize("case", LEAN, ids=case_id)
def test_compiles_without_spills(case):
    check_required(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in report_cases() if case.is_required], ids=case_id)
def test_required_cases(case):
    check_required(case)


def check_required(case: Case) -> None:
    assert case.is_required
    resources = compile_case(case)
    assert resources.problem(case) == ""
    assert resources.spilled == 0 or case.kernel in HOPPER_KERNELS
    assert 0 <= resources.shared_memory <= SHARED_MEMORY_LIMITS[case.target]
    assert 0 < resources.registers <= (512 if case.target == "gfx942" else 255)
    if case.kernel == "attention":
        assert resources.matrix_unit == MATRIX_UNITS[case.target]
        assert resources.shared_memory > 0


@pytest.mark.parametrize("head_dim", [64, 128])
def test_hopper_kernel(head_dim):
    """Runs on the asynchronous matrix units, fits, and keeps to registers where it multiplies."""
    case = Case("hopper+covariance+variance", "sm_90", "bf16", head_dim)
    check_required(case)
    assert compile_case(case).matrix_unit == "wgmma"
    assert local_memory_in_matrix_loops(case) == 0


@pytest.mark.parametrize("kernel", HOPPER_PLANNING_KERNELS)
def test_hopper_planning_kernel(kernel):
    case = Case(kernel, "sm_90", "bf16", 128)
    check_required(case)
    assert compile_case(case).matrix_unit == "wgmma"


@pytest.mark.parametrize("kernel", KERNELS)
def test_compiles_for_one_token_of_one_head(kernel):
    """Triton makes a constant of every argument that is 1: sizes, block counts, strides."""
    case = Case(kernel, "sm_90", "bf16", 64, num_levels=1, length=1, heads=1, is_plain=True)
    assert compile_case(case).problem(case) == ""


def test_required_set_is_complete():
    required = {(case.kernel, case.target, case.dtype, case.head_dim) for case in report_cases() if case.is_required}
    assert required == {
        *(
            (kernel, target, dtype, head_dim)
            for kernel in CORE_KERNELS
            for target in TARGETS
            for dtype in ("fp16", "bf16")
            for head_dim in (64, 96, 128)
        ),
        *((kernel, target, "bf16", 64) for kernel in LIST_KERNELS for target in TARGETS),
        *(
            (kernel, "sm_90", dtype, head_dim)
            for kernel in (*HOPPER_KERNELS, *HOPPER_PLANNING_KERNELS)
            for dtype in ("fp16", "bf16")
            for head_dim in (64, 128)
        ),
    }


GOOD = {"registers": 200, "spilled": 0, "shared_memory": 90000, "matrix_unit": "wgmma"}


@pytest.mark.parametrize(
    "target, change, problem",
    [
        ("sm_90", {}, ""),
        ("sm_90", {"spilled": 8}, "spills 8 bytes a thread"),
        ("sm_90", {"matrix_unit": "mma.sync"}, "uses mma.sync, not wgmma"),
        ("sm_89", {"shared_memory": 101377}, "needs 101377 bytes of shared memory, above the 101376 of sm_89"),
        ("sm_80", {"matrix_unit": "none"}, "uses no matrix unit"),
        ("gfx942", {"shared_memory": 65536, "spilled": 3}, "spills 3 registers"),
    ],
)
def test_problems_are_named(target, change, problem):
    resources = Resources(**{**GOOD, **change}, num_warps=8, num_stages=3, tile="128x64")
    assert resources.problem(Case("attention", target, "bf16", 128)) == problem


def test_spills_are_found():
    """The planner's second estimate with exact float32 products: known not to fit in registers."""
    case = Case("centroids", "sm_90", "fp32", 128)
    assert not case.is_required
    assert compile_case(case).problem(case).startswith("spills ")


def test_report_script(tmp_path):
    """Prints JSON, writes the CSV, exits with 0."""
    table = tmp_path / "report.csv"
    arguments = [
        "--targets",
        "sm_80",
        "sm_90",
        "--kernels",
        "read_lists",
        "--required-only",
        "--json",
        "--csv",
        str(table),
    ]
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "compile_report.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    reports = json.loads(run.stdout)
    assert [report["target"] for report in reports] == ["sm_80", "sm_90"]
    assert all(report["problem"] == "" and report["registers"] > 0 for report in reports)
    assert len(table.read_text().splitlines()) == 3


@pytest.mark.parametrize("required, code", [(True, 1), (False, 0)])
def test_report_script_fails_on_required_problems_alone(monkeypatch, capsys, required, code):
    path = ROOT / "scripts" / "compile_report.py"
    spec = importlib.util.spec_from_file_location("compile_report", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    report = Report("attention", "sm_90", "bf16", 128, "128x64x4", required, problem="spills 8 bytes a thread")
    monkeypatch.setattr(script, "compile_all", lambda cases, jobs: [report])
    assert script.main(["--targets", "sm_90"]) == code
    assert ("FAILED attention sm_90 bf16" in capsys.readouterr().err) == required
