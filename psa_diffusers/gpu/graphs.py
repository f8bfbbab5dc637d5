"""Launches that come again with the same addresses, as one CUDA graph: one call of the driver in place of many.

A model that runs eagerly asks for its memory in the same order at each layer and step, and so gets the same addresses
again and again. Up to some 20,000 tokens the host then enqueues kernels more slowly than a GPU runs them.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

ENABLED = os.environ.get("PSA_CUDA_GRAPHS", "1") != "0"
_MOST_KEYS = 128  # of one recipe: layers times branches of a large model. A graph takes about 120 kB of the GPU
_PATIENCE = 4  # how many graphs may be made for each that was of use, before no more are made


class Graphs:
    """The graphs of one sequence of launches, by the addresses that it runs over."""

    def __init__(self) -> None:
        self._known: OrderedDict[Hashable, Any] = OrderedDict()  # None = has come once
        self._made = self._used = 0

    def run(self, addresses: Hashable, device: torch.device, enqueue: Callable[[], None]) -> None:
        """Enqueues the launches on the device's current stream, from the second time on as a graph.

        Args:
            addresses: all that the launches depend on and that may change from call to call.
            enqueue: launches them on the current stream, and does nothing else.
        """
        graph = self._known.get(addresses, self)
        if graph is self:
            self._remember(addresses, None)
            enqueue()
            return
        if graph is None:
            if self._made >= _PATIENCE * (self._used + 1):
                enqueue()
                return
            graph = _capture(device, enqueue)
            self._made += 1
            self._remember(addresses, graph)
        else:
            self._used += 1
        self._known.move_to_end(addresses)
        graph.replay()

    def _remember(self, addresses: Hashable, graph: Any) -> None:
        self._known[addresses] = graph
        if len(self._known) > _MOST_KEYS:
            self._known.popitem(last=False)


def may_capture() -> bool:
    """Whether launches may be caught in a graph: not while someone else catches them, who would miss what they do."""
    return ENABLED and torch.version.hip is None and not torch.cuda.is_current_stream_capturing()


def _capture(device: torch.device, enqueue: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The launches as a graph; none of them runs. Other threads and streams go on meanwhile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(_side_stream(device)):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            enqueue()
        finally:
            graph.capture_end()
    return graph


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream to capture on, as the default one cannot be."""
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]
