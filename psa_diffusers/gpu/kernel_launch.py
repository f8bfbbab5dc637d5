"""A kernel with all that it is launched with: to run it, or to compile it for a target that is not there."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

# Compiled kernels by all that Triton chooses them by. Its own look-up takes longer than small kernels run.
_COMPILED: dict[tuple, Any] = {}
_PLAIN = (torch.Tensor, int, float, bool, str, tuple, type(None))
_MOST_COMPILED = 4096  # by then shapes change at every call, and keeping them is of no use


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

        Called as ``compiled[grid](*arguments)``, a grid of three and arguments in the kernel's order, that runs again.
        """
        device = next(value.device for value in self.arguments.values() if isinstance(value, torch.Tensor))
        if device.type != "cuda":
            return self.kernel[self.grid](**self.arguments, **self.options)
        # Triton launches on the current device, which need not be the tensors'.
        is_elsewhere = device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if is_elsewhere else nullcontext():
            return self._launch(device)

    def _launch(self, device: torch.device) -> Any:
        values = [self.arguments[name] for name in self.kernel.arg_names]
        if not all(isinstance(value, _PLAIN) for value in values):  # descriptors of tensors, which cannot be a key
            self.kernel[self.grid](**self.arguments, **self.options)
            return
        key = (self.kernel, device.index, self.num_warps, self.num_stages, *map(_traits, values))
        compiled = _COMPILED.get(key)
        if compiled is not None:
            compiled[(*self.grid, 1, 1)[:3]](*values)
            return compiled
        compiled = self.kernel[self.grid](**self.arguments, **self.options)
        if len(_COMPILED) >= _MOST_COMPILED:
            _COMPILED.clear()
        _COMPILED[key] = compiled
        return compiled


def _traits(value: Any) -> Any:
    """What of an argument decides which compiled kernel is right: all of it, or a tensor's dtype and alignment."""
    return (value.dtype, value.data_ptr() % 16) if isinstance(value, torch.Tensor) else value
