"""GPU kernels in Triton (3.3 and newer), for CUDA and ROCm devices; on CPUs under ``TRITON_INTERPRET=1``."""

from .launch import attend_triton, kernel_note, why_unsupported

__all__ = ["attend_triton", "kernel_note", "why_unsupported"]
