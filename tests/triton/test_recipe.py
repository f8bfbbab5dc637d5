"""Launches replayed over other tensors: they go where the tensors of the call lie, and nowhere else."""

import ctypes
import itertools
import random

import pytest
import torch

from psa_diffusers.gpu import recipe
from psa_diffusers.gpu.arena import ALIGNMENT, Use, lay_out
from psa_diffusers.gpu.kernel_launch import KernelLaunch
from psa_diffusers.gpu.recipe import Recipes, Recording


class AddKernel:
    """Stands in for a compiled kernel: target = source + amount, for ``count`` float32 numbers one after the other."""

    arg_names = ("source", "target", "count", "amount")
    function, packed_metadata = "function", "metadata"

    def __init__(self, compiles: bool) -> None:
        self.compiles = compiles

    def __getitem__(self, grid):
        def launch(source, target, count, amount, **options):
            target.copy_(source + amount)
            return self if self.compiles else None

        return launch

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, source, target, count, amount):
        assert (x, y, z, stream, function, metadata) == (3, 1, 1, "stream", "function", "metadata")
        assert (launch_metadata, enter, leave) == (None, None, None)
        address = source if isinstance(source, int) else source.base.data_ptr()
        values = (ctypes.c_float * count).from_address(address)
        (ctypes.c_float * count).from_address(target)[:] = [value + amount for value in values]


class Descriptor:
    """Stands in for what describes a tensor to the copy engine."""

    def __init__(self, base: torch.Tensor) -> None:
        self.base = base

    def __add__(self, amount: float) -> torch.Tensor:
        return self.base + amount


def launch_by_addresses(monkeypatch):
    """On the CPU too."""

    def launch(steps, slots, inputs):
        starts = [0 if tensor is None else tensor.data_ptr() for tensor in slots]
        recipe._launch_all(steps, starts, None, (None, None))

    monkeypatch.setattr(recipe, "_current_stream", lambda device: "stream")
    monkeypatch.setattr(recipe, "_interpret_all", launch)


@pytest.fixture(params=["addresses", "tensors"])
def kernel(request, monkeypatch):
    """As on a GPU, where replays pass addresses; and as under the interpreter, where they pass tensors."""
    compiles = request.param == "addresses"
    if compiles:
        launch_by_addresses(monkeypatch)
    return AddKernel(compiles)


class Steps:
    """source + 1111, other + 0.5 and source + 1, by buffers of its own; and how often that was recorded."""

    def __init__(self, kernel: AddKernel, described: bool = False) -> None:
        self.kernel, self.described = kernel, described
        self.recipes, self.recorded = Recipes(), 0

    def __call__(self, source: torch.Tensor, other: torch.Tensor, settings: tuple = ()) -> list[torch.Tensor]:
        return self.recipes.run(settings, (source, None, other), self.record)

    def record(self, inputs) -> Recording:
        self.recorded += 1
        source, nothing, other = inputs
        assert nothing is None
        buffers = source.new_empty(3, *source.shape)
        first, second, third = (torch.empty_like(source) for _ in range(3))
        results = [torch.empty_like(source) for _ in range(3)]
        links = [
            (source, first, 1.0),
            (first, second, 10.0),
            (second, third, 100.0),
            (third, buffers[2], 1000.0),  # a part of a buffer
            (Descriptor(buffers[2]) if self.described else buffers[2], results[0], 0.0),
            (other, results[1], 0.5),
            (first, results[2], 0.0),  # needed again after the others were written
        ]
        names = AddKernel.arg_names
        launches = [
            KernelLaunch(self.kernel, (3,), dict(zip(names, (a, b, source.numel(), amount), strict=True)))
            for a, b, amount in links
        ]
        return Recording([(launch, launch.run()) for launch in launches], results)


def check(steps: Steps, source: torch.Tensor, other: torch.Tensor) -> list[torch.Tensor]:
    kept = source.clone(), other.clone()
    found = steps(source, other)
    assert torch.equal(found[0], kept[0] + 1111)
    assert torch.equal(found[1], kept[1] + 0.5)
    assert torch.equal(found[2], kept[0] + 1)
    assert torch.equal(source, kept[0]) and torch.equal(other, kept[1])
    return found


def test_replays_take_the_tensors_of_the_call(kernel):
    steps = Steps(kernel)
    earlier = [check(steps, torch.randint(99, (5, 7)).float(), torch.randint(99, (5, 7)).float()) for _ in range(4)]
    assert steps.recorded == 1
    places = {tensor.data_ptr() for results in earlier for tensor in results}
    assert len(places) == 12, "results of earlier calls are not written again"


def test_one_tensor_twice_need_not_be_one_the_next_time(kernel):
    steps = Steps(kernel)
    tensor = torch.arange(12.0)
    check(steps, tensor, tensor)
    check(steps, torch.ones(12), torch.zeros(12))
    assert steps.recorded == 1


def test_parts_of_one_storage_may_lie_otherwise_the_next_time(kernel):
    """As the parts of a fused projection do: recorded as neighbours, replayed far apart and the other way round."""
    steps = Steps(kernel)
    near, far = torch.arange(64.0).view(2, 32), torch.arange(640.0).view(20, 32)
    check(steps, near[0], near[1])
    check(steps, far[17], far[3])
    assert steps.recorded == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.reshape(8, 4).contiguous(),
        lambda tensor: tensor.t().contiguous().t(),
        lambda tensor: tensor.double(),
        lambda tensor: torch.empty(33)[1:].view(4, 8).copy_(tensor),
    ],
    ids=["shape", "strides", "dtype", "alignment"],
)
def test_other_kinds_of_tensors_are_recorded_anew(change):
    steps = Steps(AddKernel(compiles=False))
    tensor = torch.arange(32.0).view(4, 8)
    check(steps, tensor, tensor)
    check(steps, change(tensor), change(tensor))
    assert steps.recorded == 2


def test_other_settings_are_recorded_anew(kernel):
    steps = Steps(kernel)
    for settings in (("a",), ("b",), ("a",)):
        steps(torch.ones(4), torch.ones(4), settings)
    assert steps.recorded == 2


def test_descriptors_follow_their_tensors(monkeypatch):
    launch_by_addresses(monkeypatch)
    steps = Steps(AddKernel(compiles=True), described=True)
    for _ in range(3):
        check(steps, torch.randint(99, (6,)).float(), torch.randint(99, (6,)).float())
    assert steps.recorded == 1


def test_recipes_are_bounded(kernel, monkeypatch):
    monkeypatch.setattr(recipe, "_MOST_RECIPES", 3)
    steps = Steps(kernel)
    for length in range(1, 10):
        check(steps, torch.ones(length), torch.ones(length))
    assert len(steps.recipes._known) <= 3


@pytest.mark.parametrize("seed", range(20))
def test_buffers_in_use_at_once_do_not_share_memory(seed):
    draw = random.Random(seed)
    uses = {}
    for name in range(draw.randint(1, 12)):
        first = draw.randint(0, 9)
        uses[name] = Use(first, draw.randint(first, 9), draw.choice([1, 500, 512, 513, 4096, 10_000]))
    starts, size = lay_out(uses)
    at_once = [[name for name, use in uses.items() if use.first <= step <= use.last] for step in range(10)]
    for names in at_once:
        pieces = sorted((starts[name], starts[name] + uses[name].size) for name in names)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(pieces))
    assert all(start % ALIGNMENT == 0 for start in starts.values())
    assert size == max(starts[name] + use.size for name, use in uses.items())


def test_memory_is_used_again():
    """A chain of equal buffers, each needed with the next alone, takes the room of two."""
    _, size = lay_out({name: Use(name, name + 1, 1024) for name in range(10)})
    assert size == 2048
