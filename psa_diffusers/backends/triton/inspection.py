"""Compiles the kernels for GPUs that are not there; reads off registers, spills, shared memory and matrix units."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ...gpu.kernel_launch import KernelLaunch
from ...planning.triton.inspected import (
    HOPPER_PLANNING_KERNELS,
    PLANNING_KERNELS,
    ROW_KERNELS,
    RULE_KERNELS,
    planning_launch,
)
from .attention import attention_launch
from .covariance import covariance_finish_launch, covariance_launch, covariance_sum_launch, empty_covariance
from .hopper import HEAD_DIMS, hopper_attention_launch, hopper_layout
from .layout import PyramidLayout
from .logit_variance import empty_corrected_bias, logit_variance_launch, query_power_launch
from .pyramid import CorrectedBias, Pyramid, empty_pyramid, pyramid_launch
from .read_lists import empty_read_lists, launch_order_launch, read_lists_launch

# Shared memory (LDS on AMD) that one block can be launched with, in bytes: CUDA programming guide, table of technical
# specifications per compute capability (opt-in maximum); CDNA3 ISA guide.
SHARED_MEMORY_LIMITS = {
    "sm_80": 166912,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
}
TARGETS = tuple(SHARED_MEMORY_LIMITS)
KERNELS = (
    "attention",
    "attention+covariance",
    "attention+covariance+variance",
    "hopper",
    "hopper+covariance",
    "hopper+covariance+variance",
    "pyramid",
    "pyramid+variance",
    "query_power",
    "logit_variance",
    "covariance",
    "covariance_sum",
    "covariance_finish",
    "read_lists",
    "launch_order",
    *PLANNING_KERNELS,
    *RULE_KERNELS,
    *ROW_KERNELS,
    *HOPPER_PLANNING_KERNELS,
)
HOPPER_KERNELS = ("hopper", "hopper+covariance", "hopper+covariance+variance")  # sm_90 alone
# A stack that is no problem, in bytes a thread: the Hopper kernel's producers, with few registers, keep there what they
# need once a query block. Its loops over tiles have no local memory, which the tests check.
PRODUCER_STACK = 256
CORE_KERNELS = (
    "attention",
    "attention+covariance",
    "attention+covariance+variance",
    "pyramid",
    "pyramid+variance",
    "query_power",
    "logit_variance",
    "covariance",
    "covariance_finish",
    *PLANNING_KERNELS[:5],
    *RULE_KERNELS,
)
LIST_KERNELS = (
    "read_lists",
    "launch_order",
    "covariance_sum",
    *PLANNING_KERNELS[5:],
    *ROW_KERNELS,
)  # alike for all dtypes and head dims
REQUIRED_DTYPES = (torch.float16, torch.bfloat16)
REQUIRED_HEAD_DIMS = (64, 96, 128)
MATRIX_INSTRUCTIONS = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma.sync", "v_mfma": "mfma"}
TYPE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.bool: "i1",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Case:
    """A kernel as the backend launches it, for one target, dtype and head dim."""

    kernel: str  # one of KERNELS
    target: str  # one of TARGETS
    dtype: str  # "fp16", "bf16", "fp32"
    head_dim: int
    query_block_size: int = 128
    kv_block_size: int = 64
    num_levels: int = 4
    length: int = 4680  # queries and keys
    heads: int = 12
    is_plain: bool = False  # raster order, no padding, no lse

    @property
    def is_required(self) -> bool:
        """Part of the set in which a problem is a failure, rather than something to know."""
        if self != Case(self.kernel, self.target, self.dtype, self.head_dim):
            return False
        dtypes = [TYPE_NAMES[dtype] for dtype in REQUIRED_DTYPES]
        if self.kernel in (*HOPPER_KERNELS, *HOPPER_PLANNING_KERNELS):
            return self.target == "sm_90" and self.dtype in dtypes and self.head_dim in HEAD_DIMS
        return self.kernel in LIST_KERNELS or (
            self.kernel in CORE_KERNELS and self.dtype in dtypes and self.head_dim in REQUIRED_HEAD_DIMS
        )


@dataclass(frozen=True)
class Resources:
    """What the compiler made of a case."""

    registers: int  # a thread
    spilled: int  # bytes a thread (NVIDIA), registers (AMD)
    shared_memory: int  # bytes
    matrix_unit: str  # "wgmma", "tcgen05", "mma.sync", "mfma"; "none"
    num_warps: int
    num_stages: int
    tile: str  # "128x64": queries x rows (attention), tokens x channels (pyramid), entries (read_lists)

    def problem(self, case: Case) -> str:
        """Why this cannot run well, or at all, on the case's target; empty if it can."""
        limit = SHARED_MEMORY_LIMITS[case.target]
        if self.shared_memory > limit:
            return f"needs {self.shared_memory} bytes of shared memory, above the {limit} of {case.target}"
        if self.spilled > (PRODUCER_STACK if case.kernel in HOPPER_KERNELS else 0):
            return f"spills {self.spilled} {'registers' if case.target.startswith('gfx') else 'bytes a thread'}"
        is_half = (
            case.kernel.startswith(("attention", "hopper", "centroids", "masses", "strided")) and case.dtype != "fp32"
        )
        if is_half and case.target == "sm_90" and case.query_block_size >= 64 and self.matrix_unit != "wgmma":
            return f"uses {self.matrix_unit}, not wgmma"
        return "uses no matrix unit" if is_half and self.matrix_unit == "none" else ""


@dataclass(frozen=True)
class Report:
    """One line of ``scripts/compile_report.py``: a case, its resources, and what is wrong with them."""

    kernel: str
    target: str
    dtype: str
    head_dim: int
    blocks: str
    required: bool
    tile: str = ""
    num_warps: int = 0
    num_stages: int = 0
    registers: int = 0
    spilled: int = 0
    shared_memory: int = 0
    matrix_unit: str = ""
    triton: str = triton.__version__
    problem: str = ""


def report_cases() -> list[Case]:
    """Every kernel for every target: the required cases, and the ends of what else is supported."""
    cases = []
    for target in TARGETS:
        cases += [Case(kernel, target, "bf16", 64) for kernel in LIST_KERNELS]
        for kernel in ("attention", "pyramid"):
            cases += [Case(kernel, target, "fp16", head_dim) for head_dim in (64, 96, 128)]
            cases += [Case(kernel, target, "bf16", head_dim) for head_dim in (32, 64, 80, 96, 128, 256)]
            cases += [Case(kernel, target, "fp32", head_dim) for head_dim in (64, 128, 256)]
        for kernel in CORE_KERNELS[CORE_KERNELS.index("attention+covariance") :]:
            if kernel == "pyramid":
                continue
            cases += [Case(kernel, target, dtype, head_dim) for dtype in ("fp16", "bf16") for head_dim in (64, 96, 128)]
            cases += [Case(kernel, target, "bf16", 256), Case(kernel, target, "fp32", 128)]
        if target == "sm_90":
            for kernel in HOPPER_PLANNING_KERNELS:
                cases += [Case(kernel, target, dtype, head_dim) for dtype in ("fp16", "bf16") for head_dim in HEAD_DIMS]
            for kernel in HOPPER_KERNELS:
                cases += [Case(kernel, target, dtype, head_dim) for dtype in ("fp16", "bf16") for head_dim in HEAD_DIMS]
                cases += [Case(kernel, target, "bf16", 128, query_block_size=256)]
                cases += [Case(kernel, target, "bf16", 64, kv_block_size=size, num_levels=3) for size in (32, 128)]
        for head_dim in (64, 128):
            cases += [Case("attention", target, "bf16", head_dim, query_block_size=size) for size in (16, 32, 64, 256)]
            cases += [Case("pyramid", target, "bf16", head_dim, kv_block_size=size) for size in (16, 128, 1024)]
    return cases


def report_case(case: Case) -> Report:
    """Compiles a case and describes the outcome; a compiler's error becomes the problem."""
    blocks = f"{case.query_block_size}x{case.kv_block_size}x{case.num_levels}"
    known = (case.kernel, case.target, case.dtype, case.head_dim, blocks, case.is_required)
    try:
        resources = compile_case(case)
    except Exception as error:
        return Report(*known, problem=f"does not compile: {type(error).__name__}: {error}".splitlines()[0])
    return Report(*known, **dataclasses.asdict(resources), problem=resources.problem(case))


def compile_case(case: Case) -> Resources:
    """Compiles one case (seconds to a minute; Triton's cache makes a second time fast). Needs no GPU.

    Raises:
        RuntimeError: the kernels were imported under ``TRITON_INTERPRET=1``, which does not compile.
    """
    launch = launch_of(case)
    if not hasattr(launch.kernel, "cache_key"):
        raise RuntimeError("compile_case: kernels imported under TRITON_INTERPRET=1 cannot be compiled; unset it.")
    compiled = triton.compile(source_of(launch), target=gpu_target(case.target), options=launch.options)
    registers, spilled = _amd_registers(compiled) if "amdgcn" in compiled.asm else _nvidia_registers(compiled)
    return Resources(
        registers=registers,
        spilled=spilled,
        shared_memory=compiled.metadata.shared,
        matrix_unit=_matrix_unit(compiled.asm.get("ptx") or compiled.asm["amdgcn"]),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        tile=_tile_of(launch),
    )


def launch_of(case: Case) -> KernelLaunch:
    """The launch that the backend makes for a case, over tensors without memory."""
    dtype = next(dtype for dtype, name in TYPE_NAMES.items() if name == case.dtype)
    query = torch.empty(2, case.length, case.heads, case.head_dim, dtype=dtype, device="meta")
    layout = PyramidLayout(triton.cdiv(case.length, case.kv_block_size), case.kv_block_size, case.num_levels)
    if case.kernel in HOPPER_KERNELS:
        layout = hopper_layout(layout)
    pyramid = empty_pyramid(query, layout, case.kernel in HOPPER_KERNELS)
    order = None if case.is_plain else torch.empty(case.length, dtype=torch.int64, device="meta")
    if case.kernel.startswith("pyramid"):
        key_lengths = None if case.is_plain else torch.empty(2, dtype=torch.int64, device="meta")
        corrected = _corrected_bias(case, pyramid) if case.kernel.endswith("+variance") else None
        return pyramid_launch(query, query, pyramid, layout, order, key_lengths, None, corrected)
    if case.kernel in (*PLANNING_KERNELS, *RULE_KERNELS, *ROW_KERNELS, *HOPPER_PLANNING_KERNELS):
        return planning_launch(case, query, order)
    if case.kernel == "query_power":
        lengths = None if case.is_plain else torch.empty(2, dtype=torch.int64, device="meta")
        return query_power_launch(query, lengths, _corrected_bias(case, pyramid).power)
    if case.kernel == "logit_variance":
        return logit_variance_launch(pyramid, layout, _corrected_bias(case, pyramid))
    if case.kernel.startswith("covariance"):
        return _covariance_launch_of(case, pyramid, layout)
    query_blocks = triton.cdiv(case.length, case.query_block_size)
    level_mask = torch.empty(2, case.heads, query_blocks, layout.kv_blocks, dtype=torch.int8, device="meta")
    lists, lengths = empty_read_lists(level_mask, case.num_levels)
    if case.kernel == "read_lists":
        return read_lists_launch(level_mask, lists, lengths, case.kv_block_size)
    if case.kernel == "launch_order":
        return launch_order_launch(level_mask, lists, lengths)
    lse = None if case.is_plain else torch.empty(2, case.heads, case.length, device="meta")
    covariance = empty_covariance(pyramid, layout)[0] if "+covariance" in case.kernel else None
    head_bias = pyramid.bias.new_empty(pyramid.key.shape[:-1]) if case.kernel.endswith("+variance") else None
    named = {"query_block_size": case.query_block_size, "order": order, "scale": case.head_dim**-0.5}
    tensors = (query, torch.empty_like(query), lse, pyramid, lists)
    if case.kernel in HOPPER_KERNELS:
        return hopper_attention_launch(*tensors, level_mask, layout, covariance, head_bias, is_padded=False, **named)
    return attention_launch(*tensors, layout, covariance, head_bias, target=case.target, **named)


def _corrected_bias(case: Case, pyramid: Pyramid) -> CorrectedBias:
    return empty_corrected_bias(pyramid, case.head_dim**-0.5)


def _covariance_launch_of(case: Case, pyramid: Pyramid, layout: PyramidLayout) -> KernelLaunch:
    covariance, partial, totals = empty_covariance(pyramid, layout)
    counted = torch.empty(*pyramid.key.shape[:2], layout.kv_blocks, dtype=torch.uint8, device="meta")
    if case.kernel == "covariance":
        return covariance_launch(pyramid, layout, counted, partial)
    if case.kernel == "covariance_sum":
        return covariance_sum_launch(partial, totals, layout)
    return covariance_finish_launch(totals, pyramid, layout, counted, covariance)


def _tile_of(launch: KernelLaunch) -> str:
    shapes = (
        ("BLOCK_M", "BLOCK_N"),
        ("BLOCK_M",),
        ("BLOCK_N", "D"),
        ("TILE_D", "TILE_ROWS"),
        ("SLAB", "BLOCK_D"),
        ("ROWS", "CHUNK"),
        ("CHUNK",),
        ("TILE",),
        ("KV_BLOCK", "BLOCK_D"),
        ("BLOCK_N",),
    )
    names = next(names for names in shapes if set(names) <= set(launch.arguments))
    return "x".join(str(launch.arguments[name]) for name in names)


def gpu_target(name: str) -> GPUTarget:
    """Triton's target for "sm_90", "gfx942", ..."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    return GPUTarget("hip", name, 64)


# -- a launch as source: the types and hints that Triton's own launcher would find -------------------------------------


def source_of(launch: KernelLaunch) -> ASTSource:
    """The launch's kernel with argument types, constants and alignments, ready for ``triton.compile``."""
    signature, constants, alignments = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        signature[parameter.name] = _argument_type(value)
        for path, leaf in _leaves((index,), value):
            if _is_constant(leaf):
                constants[path] = leaf
            elif isinstance(leaf, Tensor) or (isinstance(leaf, int) and leaf % 16 == 0):
                alignments[path] = [["tt.divisibility", 16]]
    if launch.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        return GluonASTSource(launch.kernel, signature, constants, alignments)
    return ASTSource(launch.kernel, signature, constants, alignments)


def _leaves(path: tuple[int, ...], value: object) -> Iterator[tuple[tuple[int, ...], object]]:
    if not isinstance(value, tuple):
        yield path, value
        return
    for index, item in enumerate(value):
        yield from _leaves((*path, index), item)


def _is_constant(value: object) -> bool:
    return value is None or (isinstance(value, int) and value == 1)


def _argument_type(value: object) -> str | tuple:
    if isinstance(value, tuple):
        return tuple(_argument_type(item) for item in value)
    if hasattr(value, "block_shape"):
        return f"tensordesc<{TYPE_NAMES[value.base.dtype]}{list(value.block_shape)},{value.layout!r}>"
    if _is_constant(value):
        return "constexpr"
    if isinstance(value, Tensor):
        return "*" + TYPE_NAMES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


# -- reading a compiled kernel ----------------------------------------------------------------------------------------


def _matrix_unit(assembly: str) -> str:
    return next((name for instruction, name in MATRIX_INSTRUCTIONS.items() if instruction in assembly), "none")


def _nvidia_registers(compiled) -> tuple[int, int]:
    """(registers, bytes of stack) a thread. The kernels have no local arrays: any stack is spilled registers."""
    usage = _cuobjdump("--dump-resource-usage", compiled.asm["cubin"])
    return int(re.search(r"REG:(\d+)", usage)[1]), int(re.search(r"STACK:(\d+)", usage)[1])


def _cuobjdump(option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([tool, option, path], capture_output=True, text=True, check=True, timeout=60).stdout


def local_memory_in_matrix_loops(case: Case) -> int:
    """Loads from and stores to local memory inside the Hopper kernel's two loops that multiply."""
    launch = launch_of(case)
    compiled = triton.compile(source_of(launch), target=gpu_target(case.target), options=launch.options)
    pattern = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)([^;]*);")
    lines = (pattern.search(line) for line in _cuobjdump("-sass", compiled.asm["cubin"]).splitlines())
    code = [(int(match[1], 16), match[2], match[3]) for match in lines if match]
    jumps = [(place, re.search(r"0x([0-9a-f]+)", target)) for place, name, target in code if name == "BRA"]
    loops = {(int(target[1], 16), place) for place, target in jumps if target and int(target[1], 16) < place}
    # Waiting is done in cold code behind the loops, whose jumps back look like long loops: the shortest are real.
    products = case.head_dim // 16 + launch.arguments["BLOCK_N"] // 16
    whole = [loop for loop in loops if _count(code, loop, "HGMMA") >= products]
    inner = sorted(whole, key=lambda loop: loop[1] - loop[0])[:2]  # each consumer's
    if len(inner) < 2:
        raise ValueError(f"local_memory_in_matrix_loops: no loops of {case} hold the two products.")
    return sum(_count(code, loop, "LDL") + _count(code, loop, "STL") for loop in inner)


def _count(code: list[tuple[int, str, str]], loop: tuple[int, int], name: str) -> int:
    return sum(name == instruction for place, instruction, _ in code if loop[0] <= place <= loop[1])


def _amd_registers(compiled) -> tuple[int, int]:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", compiled.asm["amdgcn"])[1])

    return field("vgpr_count"), field("vgpr_spill_count") + field("sgpr_spill_count")
