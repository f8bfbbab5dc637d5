"""A sequence of launches that is run again and again over other tensors: put together once, then replayed.

Putting launches together (sizes, tiles, arguments, the look-up of compiled kernels) takes the host longer than short
sequences take a GPU. A recipe remembers all of it but the tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .kernel_launch import KernelLaunch


@dataclass(frozen=True)
class _Step:
    """One launch, its tensors by slot."""

    launch: KernelLaunch  # of the recording; its buffers are not there any more
    compiled: Any  # the compiled kernel; None under the interpreter
    values: tuple  # arguments in the kernel's order, None in place of tensors by slot
    places: tuple[tuple[int, int], ...]  # (argument, slot)
    opened: tuple[tuple[int, torch.Size, torch.dtype], ...]  # buffers that are first used here
    closed: tuple[int, ...]  # buffers that are last used here

    def run(self, slots: list[Tensor | None]) -> None:
        values = list(self.values)
        for argument, slot in self.places:
            values[argument] = slots[slot]
        if self.compiled is not None:
            self.compiled[self.launch.grid](*values)
        else:
            named = dict(zip(self.launch.kernel.arg_names, values, strict=True))
            self.launch.kernel[self.launch.grid](**named, **self.launch.options)


class Recipe:
    """Launches that fit every call with inputs of the same shapes, strides, dtypes, alignments and device.

    Buffers live from the first launch that uses them to the last.
    """

    def __init__(
        self,
        launches: Sequence[tuple[KernelLaunch, Any]],
        inputs: Sequence[Tensor | None],
        constants: Sequence[Tensor | None],
        result: Tensor,
    ) -> None:
        """Take the tensors out of launches that have run.

        Args:
            launches: each with what its ``run`` returned.
            inputs: tensors that a replay gets anew, in its order. constants: tensors that it uses again as they are.
            result: the buffer that a replay returns.
        """
        slots = {id(tensor): slot for slot, tensor in reversed(list(enumerate(inputs)))}
        kept = {*slots, *map(id, constants)}
        uses: dict[int, list[int]] = {}  # of buffers: the launches, in order
        buffers = {}
        for index, (launch, _) in enumerate(launches):
            for tensor in _values(launch):
                if isinstance(tensor, Tensor) and id(tensor) not in kept:
                    slots.setdefault(id(tensor), len(inputs) + len(buffers))
                    buffers[id(tensor)] = tensor
                    uses.setdefault(id(tensor), []).append(index)
        self._buffers, self._result = len(buffers), slots[id(result)]
        self._steps = []
        for index, (launch, compiled) in enumerate(launches):
            opened = [
                (slots[key], tensor.shape, tensor.dtype) for key, tensor in buffers.items() if uses[key][0] == index
            ]
            closed = [slots[key] for key in buffers if uses[key][-1] == index and slots[key] != self._result]
            self._steps.append(_step(launch, compiled, slots, tuple(opened), tuple(closed)))

    def run(self, *inputs: Tensor | None) -> Tensor:
        """Allocates the buffers, enqueues every launch, and returns the result."""
        slots: list[Tensor | None] = [*inputs, *[None] * self._buffers]
        model = inputs[0]
        is_elsewhere = model.device.type == "cuda" and model.device.index != torch.cuda.current_device()
        with torch.cuda.device(model.device) if is_elsewhere else nullcontext():
            for step in self._steps:
                for slot, shape, dtype in step.opened:
                    slots[slot] = model.new_empty(shape, dtype=dtype)
                step.run(slots)
                for slot in step.closed:
                    slots[slot] = None
        return slots[self._result]


def _values(launch: KernelLaunch) -> list[Any]:
    return [launch.arguments[name] for name in launch.kernel.arg_names]


def _step(launch: KernelLaunch, compiled: Any, slots: dict[int, int], opened: tuple, closed: tuple) -> _Step:
    values = _values(launch)
    places = tuple((place, slots[id(value)]) for place, value in enumerate(values) if id(value) in slots)
    for place, _ in places:
        values[place] = None
    bare = KernelLaunch(launch.kernel, (*launch.grid, 1, 1)[:3], {}, launch.num_warps, launch.num_stages)
    return _Step(bare, compiled, tuple(values), places, opened, closed)
