"""Forwards on the meta device that may read masks and positions: small tensors made of nothing unknown keep values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten
LARGEST = 2**22  # elements of a tensor whose values are kept
READING = {aten._local_scalar_dense.default, aten.equal.default}  # these give Python's values


@contextmanager
def meta_forward() -> Iterator[None]:
    """Inside, models that read masks and positions or switch autocasting off can be called on the meta device."""
    autocast = torch.autocast

    def unless_meta(device_type: str, *args: Any, **kwargs: Any) -> Any:
        # torch knows no autocasting there, and refuses even to switch it off.
        return nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)

    torch.autocast = unless_meta
    try:
        with KnownValues():
            yield
    finally:
        torch.autocast = autocast


class KnownValues(TorchDispatchMode):
    """Keeps the values of small meta tensors that are made in it by ones, arange and the like, and what follows of it.

    Models count the real tokens of a mask, cut padding off, read positions: all that fails on the meta device, where
    nothing is computed. Weights and noise stay unknown, and reading what follows of them fails as ever.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: WeakIdKeyDictionary = WeakIdKeyDictionary()  # meta tensor -> its twin on the CPU

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        inputs = [item for item in tree_iter((args, kwargs)) if isinstance(item, Tensor)]
        on_meta = [tensor for tensor in inputs if tensor.is_meta]
        if not on_meta and torch.device(kwargs.get("device") or "cpu").type != "meta":
            return func(*args, **kwargs)
        if func is aten.index.Tensor:
            args = (args[0], [self._places(index) for index in args[1]])
        if _without_values(func) or not all(tensor in self._values for tensor in on_meta):
            output = func(*args, **kwargs)
            self._forget_changed(func, args)
            return output
        return self._on_both(func, args, kwargs)

    def _on_both(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The operation on meta tensors, and on their values where those are small."""
        if func in READING or _to_cpu(func, kwargs):
            return func(*self._twins(args), **self._twins(kwargs))
        if func is aten.nonzero.default:
            places = self._twins(args)[0].nonzero()
            return self._kept(torch.empty_like(places, device="meta"), places)
        output = func(*args, **kwargs)
        tensors = [item for item in tree_iter(output) if isinstance(item, Tensor)]
        if all(tensor.numel() <= LARGEST for tensor in tensors):
            values = func(*self._twins(args), **self._twins(kwargs))
            twins = [item for item in tree_iter(values) if isinstance(item, Tensor)]
            for tensor, twin in zip(tensors, twins, strict=True):
                self._kept(tensor, twin)
        return output

    def _places(self, index: Tensor | None) -> Tensor | None:
        """A bool mask as the places that it picks, so that their number is known."""
        if (
            index is None
            or not index.is_meta
            or index.dtype != torch.bool
            or index not in self._values
            or index.ndim > 1
        ):
            return index
        places = self._values[index].nonzero()[:, 0]
        return self._kept(torch.empty_like(places, device="meta"), places)

    def _kept(self, tensor: Tensor, value: Tensor) -> Tensor:
        if tensor.is_meta:
            self._values[tensor] = value
        return tensor

    def _twins(self, values: Any) -> Any:
        def twin(item: Any) -> Any:
            if isinstance(item, Tensor) and item.is_meta:
                return self._values[item]
            return torch.device("cpu") if isinstance(item, torch.device) else item

        return tree_map(twin, values)

    def _forget_changed(self, func: Callable[..., Any], args: Any) -> None:
        """What an operation wrote something unknown into is unknown itself, and so are its views."""
        if not func._schema.is_mutable or not isinstance(args[0], Tensor):
            return
        storage = args[0].untyped_storage()._cdata
        for tensor in [one for one in self._values if one.untyped_storage()._cdata == storage]:
            del self._values[tensor]


def _without_values(func: Any) -> bool:
    """Noise and memory that is not yet written: nothing can be known of them."""
    return torch.Tag.nondeterministic_seeded in func.tags or "empty" in func._schema.name


def _to_cpu(func: Any, kwargs: Mapping[str, Any]) -> bool:
    device = kwargs.get("device")
    return func is aten._to_copy.default and device is not None and torch.device(device).type == "cpu"
