"""Real attention calls to look at: records the queries, keys and values of a pipeline while it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import PSAConfig
from ..planning.plan import Plan
from . import operations
from .install import disable_psa, enable_psa
from .native import SLOT
from .processor import PSAProcessor, installed_processors, transformers_of
from .schedule import Step


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One video self-attention call of a denoising run.

    Attributes:
        query, key, value: [batch, seq, heads, head_dim], copies.
        options: What else :func:`~psa_diffusers.build_plan` got: grid, full_tokens, key_lengths, scale.
        step: The denoising step that it was part of.
        layer: Index of the transformer block, as ``PSAConfig.dense_layers`` counts.
        branch: Which of the step's forwards it was part of, as the pipeline names it ("cond", "uncond"), or its number.
        module: The attention module's name in its transformer.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    options: dict[str, Any]
    step: Step
    layer: int
    branch: str | int
    module: str

    def plan(self, config: PSAConfig | None = None) -> Plan:
        """The plan of this call by a config; default ``PSAConfig()``."""
        return operations.build_plan(self.query, self.key, self.value, config or PSAConfig(), **self.options)

    def attend(self, config: PSAConfig | None = None, plan: Plan | None = None) -> Tensor:
        """The sparse output [batch, seq, heads, head_dim], by a plan made before if one is given."""
        config = config or PSAConfig()
        plan = plan or self.plan(config)
        return operations.attend(self.query, self.key, self.value, config, plan, self.options.get("scale"))

    def dense(self) -> Tensor:
        """The output of dense attention, [batch, seq, heads, head_dim]. Padding is not masked."""
        return _dense_attention(self.query, self.key, self.value, self.options.get("scale"))

    def __repr__(self) -> str:
        return f"AttentionCall(step={self.step.index}, layer={self.layer}, branch={self.branch!r})"


@contextmanager
def capture_attention(
    pipe: Any,
    *,
    steps: Collection[int] | None = None,
    layers: Collection[int] | None = None,
    branches: Collection[str | int] | None = None,
    every: int = 1,
    device: torch.device | str | None = None,
) -> Iterator[list[AttentionCall]]:
    """Record the video self-attention calls of what the pipeline runs in this context.

    ::

        with capture_attention(pipe, steps=[4], branches=["cond"]) as calls:
            pipe("a red fox runs through fresh snow", output_type="latent")

    Where PSA is enabled (before, or in the context) these are its sparse calls. Otherwise they are all calls of a dense
    run, whose output is the same to the bit where the pipeline uses torch's own attention.

    Args:
        pipe: A diffusers pipeline with a transformer that PSA knows; not compiled.
        steps, layers, branches: Which calls to keep; None = all.
        every: Of these, keep one in so many: the ``every``-th, and so on.
        device: Where to keep them; None = where they are. A call takes three tensors of the size of the queries.

    Yields:
        The list of :class:`AttentionCall` that fills while the pipeline runs.

    Raises:
        ValueError: ``every`` is below 1, no transformer is known, or one is compiled.
        TypeError: ``pipe`` is not a pipeline.
    """
    if every < 1:
        raise ValueError(f"capture_attention: every must be at least 1, but is {every!r}.")
    if isinstance(pipe, nn.Module):
        raise TypeError(f"capture_attention: pipe must be a pipeline, but is a {type(pipe).__name__}.")
    models = transformers_of(pipe)
    refuse_compiled(pipe, models, "capture_attention", "capture")
    chosen = {"steps": steps, "layers": layers, "branches": branches}
    recorder = _Recorder({name: None if kept is None else frozenset(kept) for name, kept in chosen.items()})
    recorder.every, recorder.device = every, device
    handles = [handle for model in models for handle in watch_attention(model, recorder)]
    before = operations.build_plan, operations.attend
    operations.build_plan, operations.attend = recorder.build_plan, recorder.attend
    try:
        if not installed_processors(models):
            enable_psa(pipe, recorder.dense_run)
        yield recorder.calls
    finally:
        operations.build_plan, operations.attend = before
        for handle in handles:
            handle.remove()
        if any(processor.config is recorder.dense_run for processor in installed_processors(models)):
            disable_psa(pipe)


class _Recorder:
    """Stands in for planning and attention: notes the call, and lets a dense run stay dense."""

    def __init__(self, chosen: dict[str, frozenset | None]) -> None:
        self.calls: list[AttentionCall] = []
        self.module: nn.Module | None = None  # the attention module that is being called
        self.dense_run = PSAConfig(dense_warmup=0.0)  # on a pipeline without PSA; known again by its identity
        self.every, self.device = 1, None
        self._chosen, self._fitting = chosen, 0
        self._build_plan: Callable[..., Plan] = operations.build_plan
        self._attend: Callable[..., Tensor] = operations.attend

    def build_plan(self, query: Tensor, key: Tensor, value: Tensor, config: PSAConfig, **options: Any) -> Plan:
        if self.module is not None:
            self._note(query, key, value, options)
        if config is self.dense_run:
            return _dense_plan(query, key)
        return self._build_plan(query, key, value, config, **options)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, config: PSAConfig, plan: Plan, scale: float | None
    ) -> Tensor:
        if config is self.dense_run:
            return _dense_attention(query, key, value, scale)
        return self._attend(query, key, value, config, plan, scale)

    def _note(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> None:
        slot, forward = getattr(self.module, SLOT), self.module.processor._call
        facts = {"steps": forward.step.index, "layers": slot.layer, "branches": forward.branch}
        if any(kept is not None and facts[name] not in kept for name, kept in self._chosen.items()):
            return
        self._fitting += 1
        if self._fitting % self.every == 0:
            tensors = (tensor.detach().to(self.device, copy=True) for tensor in (query, key, value))
            self.calls.append(AttentionCall(*tensors, options, forward.step, slot.layer, forward.branch, slot.name))


def watch_attention(model: nn.Module, recorder: Any) -> Iterator[Any]:
    """Hooks that set ``recorder.module`` to the attention module that is being called, if it is PSA's."""

    def begin(module: nn.Module, args: tuple) -> None:
        recorder.module = module if isinstance(module.processor, PSAProcessor) else None

    def end(module: nn.Module, args: tuple, output: Any) -> None:
        recorder.module = None

    for module in model.modules():
        if callable(getattr(module, "processor", None)):
            yield module.register_forward_pre_hook(begin)
            yield module.register_forward_hook(end, always_call=True)


def refuse_compiled(pipe: Any, models: list[nn.Module], function: str, verb: str) -> None:
    """Raise ValueError, in the name of the function, where calls cannot be seen."""
    wrapped = any(hasattr(part, "_orig_mod") for part in pipe.components.values())
    blocks = [part for model in models for part in model.modules()]
    if wrapped or any(getattr(block, "_compiled_call_impl", None) is not None for block in blocks):
        raise ValueError(f"{function}: the transformer is compiled; {verb} before it is.")


def _dense_plan(query: Tensor, key: Tensor) -> Plan:
    """One block that is read in full."""
    mask = torch.ones(query.shape[0], query.shape[2], 1, 1, dtype=torch.int8, device=query.device)
    return Plan(mask, query.shape[1], key.shape[1], query.shape[1], key.shape[1], num_levels=1)


def _dense_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)
