"""A sequence of launches that is run again and again over other tensors: put together once, then replayed.

Putting launches together (sizes, tiles, arguments, descriptors, the look-up of compiled kernels) takes the host longer
than short sequences take a GPU. A recipe remembers all of it but where the tensors lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arena import Use, lay_out
from .graphs import Graphs, may_capture
from .kernel_launch import KernelLaunch, on_device

_MOST_RECIPES = 256  # by then shapes change at every call, and keeping them is of no use
GRAPH_BYTES = 2**28  # of inputs; what takes more keeps the GPU so busy that the host is ahead of it


class Recording(NamedTuple):
    """Launches that have run, and the tensors that have a meaning beyond them."""

    launches: Sequence[tuple[KernelLaunch, Any]]  # each with what its ``run`` returned
    results: Sequence[Tensor]  # whole buffers, made anew at each replay; what is written to an input is none
    constants: Sequence[Tensor | None] = ()  # used again as they are


class Recipes:
    """The recipes of one kind of call, by all that decides them.

    A recipe fits every call with the same settings whose inputs have the same shapes, strides, dtypes, devices and
    alignments: what is in its launches depends on nothing else.
    """

    def __init__(self) -> None:
        self._known: dict[tuple, tuple[Recipe, Any]] = {}

    def run(
        self,
        settings: tuple,
        inputs: Sequence[Tensor | None],
        record: Callable[[Sequence[Tensor | None]], Recording],
        keep: Any = None,
    ) -> list[Tensor]:
        """The results of these launches over ``inputs``.

        Args:
            settings: all that the launches depend on beside the inputs, hashable.
            inputs: the tensors that may lie elsewhere at the next call.
            record: runs the launches over tensors like ``inputs``; called at the first such call.
            keep: what must live as long as the recipe (an object whose id is among the settings).
        """
        call = (settings, *map(_traits, inputs))
        known = self._known.get(call)
        if known is not None:
            return known[0].run(inputs)
        # Each input is an object of its own here, so that two inputs that are one tensor now need not be one later.
        aliases = [tensor if tensor is None else tensor.detach() for tensor in inputs]
        recording = record(aliases)
        if len(self._known) >= _MOST_RECIPES:
            self._known.clear()
        self._known[call] = (Recipe(recording, aliases), keep)
        return list(recording.results)


def _traits(tensor: Tensor | None) -> tuple | None:
    """What of an input decides which launches are right: all but where it lies, and of that the alignment."""
    if tensor is None:
        return None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16, tensor.device


class _Place(NamedTuple):
    """A tensor of a launch: the argument that it is, and where it lies."""

    argument: int
    slot: int  # of an input, a result, or the arena
    offset: int  # from there, in bytes
    tensor: Tensor  # on the meta device: dtype, shape and strides
    descriptor: Any = None  # what describes the tensor to the copy engine, if it is passed so


class _Address:
    """In place of a descriptor's tensor, of which a launch asks where it lies."""

    def __init__(self, address: int) -> None:
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class _Step(NamedTuple):
    """One launch, without its tensors."""

    launch: KernelLaunch
    compiled: Any  # the compiled kernel; None under the interpreter
    values: list  # arguments in the kernel's order, None in place of tensors
    places: list[_Place]


class Recipe:
    """Launches with their tensors taken out.

    Buffers that no one sees outside lie in one piece of memory, the arena, those of different times in the same place.
    """

    def __init__(self, recording: Recording, inputs: Sequence[Tensor | None]) -> None:
        """Takes the tensors out. ``inputs`` are different objects; every buffer is still there."""
        results = recording.results
        self._made = [(tensor.shape, tensor.dtype) for tensor in results]
        self._constants = recording.constants  # alive as long as their addresses are used
        self._device = next(tensor.device for tensor in inputs if tensor is not None)
        self._graphs = Graphs() if sum(x.nbytes for x in inputs if x is not None) <= GRAPH_BYTES else None
        named = {id(tensor): slot for slot, tensor in enumerate(inputs) if tensor is not None}
        whole = {_storage(tensor): slot for slot, tensor in enumerate(results, start=len(inputs))}
        fixed = {id(tensor) for tensor in recording.constants}
        arena = len(inputs) + len(results)
        uses: dict[int, Use] = {}
        for index, (launch, _) in enumerate(recording.launches):
            for _, tensor, _ in _tensors(launch):
                storage = _storage(tensor)
                if id(tensor) not in named and id(tensor) not in fixed and storage not in whole:
                    first = uses[storage].first if storage in uses else index
                    uses[storage] = Use(first, index, tensor.untyped_storage().nbytes())
        offsets, self._bytes = lay_out(uses)
        self._steps = []
        for launch, compiled in recording.launches:
            values, places = _values(launch), []
            for argument, tensor, descriptor in _tensors(launch):
                if id(tensor) in fixed:
                    continue
                slot, offset = named.get(id(tensor)), 0
                if slot is None:
                    storage = _storage(tensor)
                    slot = whole.get(storage, arena)
                    offset = tensor.data_ptr() - storage + offsets.get(storage, 0)
                places.append(_Place(argument, slot, offset, tensor.to("meta"), descriptor and _bare(descriptor)))
                values[argument] = None
            if compiled is not None:
                values = [value.data_ptr() if isinstance(value, Tensor) else value for value in values]
            bare = KernelLaunch(launch.kernel, (*launch.grid, 1, 1)[:3], {}, launch.num_warps, launch.num_stages)
            self._steps.append(_Step(bare, compiled, values, places))

    def run(self, inputs: Sequence[Tensor | None]) -> list[Tensor]:
        """Makes the results and the arena, and enqueues every launch."""
        device = self._device
        with on_device(device):
            results = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self._made]
            arena = torch.empty(self._bytes, dtype=torch.uint8, device=device)
            slots = [*inputs, *results, arena]
            if device.type == "cuda":
                self._launch(slots)
            else:
                _interpret_all(self._steps, slots, len(inputs))
        return results

    def _launch(self, slots: Sequence[Tensor | None]) -> None:
        """Every launch on a GPU's current stream; as a graph where the addresses are those of an earlier call.

        Hooks of Triton that someone has set (profilers do, and the benchmark) hear of every launch, so that there is no
        graph then.
        """
        starts = tuple(0 if tensor is None else tensor.data_ptr() for tensor in slots)
        hooks = launch_hooks()
        if self._graphs is None or hooks != (None, None) or not may_capture():
            _launch_all(self._steps, starts, self._device, hooks)
            return
        self._graphs.run(starts, self._device, lambda: _launch_all(self._steps, starts, self._device, hooks))


def _launch_all(steps: Sequence[_Step], starts: Sequence[int], device: torch.device, hooks: tuple[Any, Any]) -> None:
    """Every launch on a GPU's current stream, with addresses for tensors: the least that a launch can be told."""
    stream, (entered, left) = _current_stream(device), hooks
    for launch, compiled, template, places in steps:
        values = template.copy()
        for argument, slot, offset, _, descriptor in places:
            address = starts[slot] + offset
            values[argument] = address if descriptor is None else _described(descriptor, address)
        facts = None if entered is None else compiled.launch_metadata(launch.grid, stream, *values)
        # What Triton itself calls once it has found the kernel.
        compiled.run(*launch.grid, stream, compiled.function, compiled.packed_metadata, facts, entered, left, *values)


def launch_hooks() -> tuple[Any, Any]:
    """Triton's hooks before and after a launch; (None, None) if nobody has set any, which saves calling them."""
    from triton import knobs

    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    # A chain of hooks is there even if it is empty; older releases have a single hook, or None.
    return hooks if any(getattr(hook, "calls", hook) for hook in hooks) else (None, None)


def _current_stream(device: torch.device) -> Any:
    from triton.runtime import driver

    return driver.active.get_current_stream(device.index)


def _interpret_all(steps: Sequence[_Step], slots: Sequence[Tensor | None], inputs: int) -> None:
    """Every launch under the interpreter, which takes tensors. The first slots are the inputs."""
    for launch, _, template, places in steps:
        values = template.copy()
        for argument, slot, offset, like, _ in places:
            values[argument] = slots[slot] if slot < inputs else _view(slots[slot], offset, like)
        named = dict(zip(launch.kernel.arg_names, values, strict=True))
        launch.kernel[launch.grid](**named, **launch.options)


def _view(buffer: Tensor, offset: int, like: Tensor) -> Tensor:
    """The part of a buffer that begins at an offset in bytes."""
    raw = buffer.flatten().view(torch.uint8)[offset : offset + like.nbytes]
    return raw.view(like.dtype).view(like.shape)


def _values(launch: KernelLaunch) -> list[Any]:
    return [launch.arguments[name] for name in launch.kernel.arg_names]


def _tensors(launch: KernelLaunch) -> list[tuple[int, Tensor, Any]]:
    """(argument, tensor, its descriptor or None) of every argument that is a tensor, or describes one."""
    found = []
    for argument, value in enumerate(_values(launch)):
        if isinstance(value, Tensor):
            found.append((argument, value, None))
        elif isinstance(getattr(value, "base", None), Tensor):
            found.append((argument, value.base, value))
    return found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bare(descriptor: Any) -> Any:
    """A copy without the tensor."""
    return _described(descriptor, 0)


def _described(descriptor: Any, address: int) -> Any:
    """The same description of what lies elsewhere."""
    other = object.__new__(type(descriptor))  # copy.copy takes the host longer than the rest of a launch
    other.__dict__.update(descriptor.__dict__, base=_Address(address))
    return other
