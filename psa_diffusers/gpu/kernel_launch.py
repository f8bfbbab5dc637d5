"""A kernel with all that it is launched with: to run it, or to compile it for a target that is not there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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

    def run(self) -> Any:
        """Enqueues the kernel on the current stream of its tensors' device; gives the compiled kernel, if there is one.

        Triton's look-up of the compiled kernel takes longer than small kernels run: what runs again and again is a
        :class:`~.recipe.Recipe`.
        """
        device = next(value.device for value in self.arguments.values() if isinstance(value, torch.Tensor))
        with on_device(device):
            return self.kernel[self.grid](**self.arguments, **self.options)


def on_device(device: torch.device) -> AbstractContextManager:
    """Makes a device current, if it is not: Triton launches on the current one, which need not be the tensors'."""
    is_elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if is_elsewhere else nullcontext()
