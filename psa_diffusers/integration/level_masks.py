"""Level masks of a few calls of a run, to look at: kept on their device while the pipeline runs, read afterwards."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config import PSAConfig
from ..planning.plan import Plan
from . import operations
from .capture import watch_attention
from .native import SLOT
from .processor import transformers_of


@dataclass(frozen=True, eq=False)
class LevelMask:
    """What one head of one call read, and how finely.

    Attributes:
        step, layer, head: Which one; of a batch the first sample.
        num_levels: Of the plan.
        levels: int8 [query_blocks, kv_blocks], as in :class:`~psa_diffusers.planning.Plan`.
    """

    step: int
    layer: int
    head: int
    num_levels: int
    levels: np.ndarray


class MaskRecorder:
    """Collects the masks of a run; :meth:`read` after it."""

    def __init__(self, models: list[nn.Module], steps: Collection[int], layers: int, heads: int) -> None:
        self.module: nn.Module | None = None  # set by the hooks while an attention module is being called
        self._models, self._steps, self._layers, self._heads = models, frozenset(steps), layers, heads
        self._found: dict[tuple[int, int], tuple[list[int], int, Tensor]] = {}
        self._chosen: frozenset[int] | None = None

    def note(self, plan: Plan) -> None:
        """The plan of the call that is running. Copies a few heads; nothing waits."""
        slot, step = getattr(self.module, SLOT), self.module.processor._call.step
        if step is None or step.index not in self._steps or (step.index, slot.layer) in self._found:
            return
        if self._chosen is None:
            slots = [getattr(part, SLOT, None) for model in self._models for part in model.modules()]
            count = 1 + max(slot.layer for slot in slots if slot is not None)
            self._chosen = frozenset(spread(count, self._layers))
        if slot.layer in self._chosen:
            heads = spread(plan.level_mask.shape[1], self._heads)
            masks = torch.stack([plan.level_mask[0, head] for head in heads])
            self._found[step.index, slot.layer] = (heads, plan.num_levels, masks)

    def read(self) -> list[LevelMask]:
        """Ordered by step, layer and head."""
        return [
            LevelMask(step, layer, head, num_levels, levels)
            for (step, layer), (heads, num_levels, masks) in sorted(self._found.items(), key=lambda item: item[0])
            for head, levels in zip(heads, masks.cpu().numpy(), strict=True)
        ]


@contextmanager
def capture_level_masks(
    pipe: Any, *, steps: Collection[int], layers: int = 4, heads: int = 4
) -> Iterator[MaskRecorder]:
    """Note level masks of what the pipeline runs in this context, with PSA enabled in it or before.

    Args:
        pipe: A diffusers pipeline with a transformer that PSA knows; not compiled.
        steps: Denoising steps to look at.
        layers, heads: How many of each, evenly spread. Of a step's calls of a layer only the first is kept.
    """
    models = transformers_of(pipe)
    recorder = MaskRecorder(models, steps, layers, heads)
    handles = [handle for model in models for handle in watch_attention(model, recorder)]
    before = operations.build_plan

    def build_plan(query: Tensor, key: Tensor, value: Tensor, config: PSAConfig, **options: Any) -> Plan:
        plan = before(query, key, value, config, **options)
        if recorder.module is not None:
            recorder.note(plan)
        return plan

    operations.build_plan = build_plan
    try:
        yield recorder
    finally:
        operations.build_plan = before
        for handle in handles:
            handle.remove()


def spread(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` of the indices below ``count``, evenly spread, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, count - 1, min(count, wanted))})
