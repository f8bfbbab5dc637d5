"""A kernel with all that it is launched with: to run it, or to compile it for a target that is not there."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class KernelLaunch:
    """One launch. What is inspected (``backends/triton/inspection.py``) is built by the same code as what runs."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1

    @property
    def options(self) -> dict[str, Any]:
        """The compiler's options. Fused multiply-adds are asked for by name, since Triton's default changes in 3.10."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Enqueues the kernel on the current stream of its tensors' device."""
        device = next(value.device for value in self.arguments.values() if isinstance(value, torch.Tensor))
        # Triton launches on the current device, which need not be the tensors'.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.kernel[self.grid](**self.arguments, **self.options)
