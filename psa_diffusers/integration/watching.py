"""How much the sparse calls of a run err, measured while it runs on some of their queries."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.probe import SomeRows
from ..config import PSAConfig
from ..planning.plan import Plan
from . import operations
from .capture import refuse_compiled, watch_attention
from .native import SLOT
from .processor import transformers_of

Place = tuple[str, int, int]  # expert, step, layer


class ErrorWatch:
    """The errors of sparse calls, by place in the run: (transformer's name in its pipeline, step, layer).

    A call's relative error is the length of (sparse output - dense output) over that of the dense output, over all of
    its heads, on at most an eighth of its blocks of queries. The calls of a step's guidance branches count as one.
    """

    def __init__(self) -> None:
        self.module: nn.Module | None = None  # the attention module that is being called
        self._found: dict[Place, list[Tensor]] = {}
        self._attend = operations.attend

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, config: PSAConfig, plan: Plan, scale: float | None
    ) -> Tensor:
        """Stands in for the plugin's attention."""
        output = self._attend(query, key, value, config, plan, scale)
        if self.module is not None:
            forward = self.module.processor._call
            place = (forward.expert, forward.step.index, getattr(self.module, SLOT).layer)
            with torch.no_grad():
                rows = SomeRows(query, key, value, plan, scale)
                lost = (rows.take(output).double() - rows.dense).square().sum()
                self._found.setdefault(place, []).append(torch.stack([lost, rows.dense.square().sum()]))
        return output

    def squared_errors(self) -> dict[Place, float]:
        """The squared relative error at each place. Waits for the device."""
        if not self._found:
            return {}
        sums = torch.stack([sum(found) for found in self._found.values()]).cpu()
        errors = sums[:, 0] / sums[:, 1].clamp(min=torch.finfo(torch.float64).tiny)
        return dict(zip(self._found, errors.tolist(), strict=True))

    def total(self, weights: Sequence[float] | None = None, places: Collection[Place] | None = None) -> float:
        """The root of the weighted mean of the squared errors: what a calibrated target error is about.

        Args:
            weights: Of each of the run's steps, as ``step_weights`` has them; None = all alike.
            places: Over which; None = where a sparse call was seen. Those without one were dense, and count as exact.
        """
        errors = self.squared_errors()
        places = errors if places is None else places
        shares = {place: 1.0 if weights is None else weights[place[1]] for place in places}
        if not shares:
            raise ValueError("ErrorWatch.total: no sparse call was seen; run the pipeline in the context, with PSA on.")
        return math.sqrt(sum(share * errors.get(place, 0.0) for place, share in shares.items()) / sum(shares.values()))


@contextmanager
def watch_errors(pipe: Any) -> Iterator[ErrorWatch]:
    """Measure the errors of the sparse calls of what the pipeline runs in this context, which stays what it was.

    ::

        enable_psa(pipe, PSAConfig(compute_budget=0.15))
        with watch_errors(pipe) as errors:
            pipe("a red fox runs through fresh snow")
        print(errors.total())

    Costs up to an eighth of a dense call for each sparse one.

    Args:
        pipe: A diffusers pipeline with a transformer that PSA knows; not compiled.

    Yields:
        The :class:`ErrorWatch` that fills while the pipeline runs.

    Raises:
        ValueError: no transformer is known, or one is compiled.
    """
    models, watch = transformers_of(pipe), ErrorWatch()
    refuse_compiled(pipe, models, "watch_errors", "watch")
    handles = [handle for model in models for handle in watch_attention(model, watch)]
    before = operations.attend
    operations.attend = watch.attend
    try:
        yield watch
    finally:
        operations.attend = before
        for handle in handles:
            handle.remove()
