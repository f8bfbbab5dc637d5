"""PSAProcessor: the attention processor that runs a video transformer's self-attention sparsely."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn

from ..config import PSAConfig
from ..planning.plan import Plan
from . import operations
from .compiled import register_processor
from .native import OUTSIDE, SLOT, AttentionSlot, ModelPatch, SparseProcessor, attach, reroute, widen_signature
from .schedule import STEP_UNKNOWN, Step, StepClock, dense_reason, dense_steps
from .statistics import PSAStatistics
from .tokens import TokenLayout, find_row, known_transformers

logger = logging.get_logger(__name__)

NO_NATIVES = (
    "PSAProcessor: it does not know the native processors of this model. Make it with the pipeline or model that it is "
    "set on, before it is set: pipe.transformer.set_attn_processor(PSAProcessor(pipe, config)), or enable_psa(pipe, "
    "config)."
)


@dataclass(frozen=True)
class ForwardCall:
    """What one forward of a transformer has in common: read once, by the hook, before it."""

    step: Step | None
    layout: TokenLayout | None
    branch: str | int
    slots: tuple[AttentionSlot, ...]


class PSAProcessor(SparseProcessor):
    """Runs the video self-attention of a pipeline's transformers by Pyramid Sparse Attention; the rest stays native.

    The native processors keep doing the projections, norms and rotary embedding; only the attention function that
    they call is another one, and only in sparse steps. Made before it is set, since it reads the natives first::

        pipe.transformer.set_attn_processor(PSAProcessor(pipe, PSAConfig(compute_budget=0.15)))

    (:func:`enable_psa` does this for every transformer of the pipeline, :func:`disable_psa` undoes it.)

    A call that cannot be sparse runs dense by the pipeline's own attention backend, and ``statistics`` counts it with
    its reason. With ``refresh_every > 1`` one plan a layer and guidance branch is kept (int8, one byte a block pair and
    head, and what the backend derives from it), until the last step that uses it, the next expert, or the next run.

    Args:
        pipe_or_model: The pipeline; or a transformer, where the pipeline does not tell the step otherwise: then wrap
            each denoising step in ``with processor.step(index, total)``.
        config: Settings; default ``PSAConfig()``.

    Raises:
        ValueError: no transformer of the pipeline is known here (the message lists those that are).
        TypeError: an argument is of another type.
    """

    def __init__(self, pipe_or_model: Any = None, config: PSAConfig | None = None) -> None:
        if isinstance(pipe_or_model, PSAConfig) and config is None:
            pipe_or_model, config = None, pipe_or_model  # says what is missing when it is called
        if config is not None and not isinstance(config, PSAConfig):
            raise TypeError(f"PSAProcessor: config must be a PSAConfig, but is a {type(config).__name__}.")
        self.config = config or PSAConfig()
        models = transformers_of(pipe_or_model) if pipe_or_model is not None else []
        if pipe_or_model is not None and not models:
            raise ValueError(
                f"PSAProcessor: {type(pipe_or_model).__name__} has no transformer that PSA knows; known are "
                f"{', '.join(known_transformers())}."
            )
        is_pipe = bool(models) and not isinstance(pipe_or_model, nn.Module)
        self._pipe = weakref.ref(pipe_or_model) if is_pipe else _no_pipe
        siblings = [other for other in installed_processors(models) if is_pipe and other._pipe() is pipe_or_model]
        self._begin(siblings[0] if siblings else None)
        self._slots = [slot for model in models for _, slot in attach(model).attention]
        self._build_routes()

    def _begin(self, sibling: PSAProcessor | None = None) -> None:
        """Start without a run. Processors of one pipeline share its clock and statistics."""
        self.statistics = sibling.statistics if sibling else PSAStatistics()
        self._clock = sibling._clock if sibling else StepClock()
        self._explicit: Step | None = None
        self._call = ForwardCall(None, None, 0, ())
        self._slot: AttentionSlot | None = None  # the attention module that is being called
        self._counted: tuple[Step | None, int, int] = (None, 0, 0)  # step, transformer, forwards of it in the step
        self._plans: dict[tuple[AttentionSlot, str | int], tuple[int, tuple, Plan]] = {}
        self._warned = False

    def _build_routes(self) -> None:
        self._id, self._prepared = register_processor(self), bool(self._slots)
        # Now, and one a class, so that a compiled block finds one and the same function at every call.
        natives = {type(slot.native) for slot in self._slots if slot.self_attention}
        known = {type(slot.native) for slot in self._slots if slot.self_attention and slot.known}
        routes = {native: reroute(native, self._attention) for native in known}
        self._routes = {native: route for native, route in routes.items() if route is not None}
        widen_signature(PSAProcessor.__call__, natives)
        for native in natives - set(self._routes):
            logger.warning(f"PSA cannot reroute {native.__name__}: the attention that it computes stays dense.")

    # -- what diffusers sets on a processor belongs to the natives --------------------------------------------------

    @property
    def _attention_backend(self) -> Any:
        return self._of_natives("_attention_backend")

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self._set_on_natives("_attention_backend", backend)

    @property
    def _parallel_config(self) -> Any:
        return self._of_natives("_parallel_config")

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        _refuse_ring(config)
        self._set_on_natives("_parallel_config", config)

    def _of_natives(self, name: str) -> Any:
        return next((getattr(slot.native, name) for slot in self._slots if hasattr(slot.native, name)), None)

    def _set_on_natives(self, name: str, value: Any) -> None:
        for slot in self._slots:
            if hasattr(slot.native, name):
                setattr(slot.native, name, value)

    # -- the step ---------------------------------------------------------------------------------------------------

    @contextmanager
    def step(self, index: int, total: int) -> Iterator[None]:
        """Say that transformer calls in this context are of step ``index`` (from 0) of ``total``.

        Raises:
            ValueError: ``index`` is not in [0, total).
        """
        if not 0 <= index < total:
            raise ValueError(f"PSAProcessor.step: index must be in [0, total), but is {index} with total {total}.")
        outer, self._explicit = self._explicit, Step(index, total)
        try:
            yield
        finally:
            self._explicit = outer

    def begin_forward(self, model: nn.Module, patch: ModelPatch, arguments: Mapping[str, Any]) -> None:
        """Find step, tokens and guidance branch of the transformer call that begins (called by its hook)."""
        slots = patch.slots_of(self)
        if not any(slot in self._slots for slot in slots):
            raise ValueError(NO_NATIVES)
        _refuse_ring(self._parallel_config)
        step, new_run = self._clock.locate(self._pipe(), arguments.get("timestep"), patch.context, self._explicit)
        if new_run:
            self.statistics.reset()
        if new_run or self._counted[1] != id(model):
            self._plans.clear()
        if step is not None:
            self.statistics.count_step(step)
        layout, reason = patch.row.layout(model, arguments), dense_reason(step, self.config)
        if reason == STEP_UNKNOWN:
            self._warn_of_unknown_step()
        elif reason is None and layout is None:
            reason = "token grid unknown"
        branch = self._branch(model, patch, step, new_run)
        self._call = ForwardCall(step, layout, branch, tuple(slot for _, slot in patch.attention))
        for slot in slots:
            slot.decide(reason or self._dense_reason_of_layer(slot))
        self._count_compiled(patch, slots)

    def end_forward(self, patch: ModelPatch) -> None:
        """The transformer call is over, by its end or by an error (called by its hook)."""
        for slot in patch.slots_of(self):
            slot.decide(OUTSIDE)

    def _dense_reason_of_layer(self, slot: AttentionSlot) -> str | None:
        if slot.layer in self.config.dense_layers:
            return "dense layer"
        return None if type(slot.native) in self._routes else "unknown attention processor"

    def _count_compiled(self, patch: ModelPatch, slots: list[AttentionSlot]) -> None:
        """Dense calls inside compiled blocks, which cannot count: every one of their layers will be called."""
        blocks = patch.compiled()
        for slot in slots if blocks else ():
            if slot.self_attention and not slot.sparse and slot.name.startswith(blocks):
                self.statistics.count_dense(slot.dense_reason, layer=slot.layer)

    def _branch(self, model: nn.Module, patch: ModelPatch, step: Step | None, new_run: bool) -> str | int:
        """Which of a step's forwards this is: as the pipeline names it, else by its number in the step."""
        last_step, last_model, number = self._counted
        again = not new_run and (last_step, last_model) == (step, id(model))
        number = number + 1 if again else 0
        self._counted = (step, id(model), number)
        return patch.context.name if patch.context is not None else number

    def _warn_of_unknown_step(self) -> None:
        if not self._warned:
            logger.warning(
                "PSA stays dense: it cannot tell which denoising step is running. Make the processor with the pipeline "
                "(PSAProcessor(pipe, config) or enable_psa(pipe)), or wrap the step in `with processor.step(i, n):`."
            )
        self._warned = True

    # -- attention --------------------------------------------------------------------------------------------------

    def __call__(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        slot = getattr(attn, SLOT, None)
        if slot is None or not self._prepared:
            raise ValueError(NO_NATIVES)
        if slot.self_attention and slot.sparse:
            self._slot = slot
            return self._routes[type(slot.native)](slot.native, attn, *args, **kwargs)
        if slot.self_attention and not torch.compiler.is_compiling():
            self.statistics.count_dense(slot.dense_reason, layer=slot.layer)
        return slot.native(attn, *args, **kwargs)

    def _attention(self, dense: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Stands in for the attention function of a native processor; [batch, seq, heads, head_dim]."""
        reason, scale = self._dense_reason_of(query, key, value, options), options.get("scale")
        if torch.compiler.is_compiling():
            if reason is not None:
                return dense(query, key, value, **options)
            return torch.ops.psa_diffusers.self_attention(query, key, value, self._slot.position, self._id, scale)
        if reason is not None:
            self.statistics.count_dense(reason, layer=self._slot.layer)
            return dense(query, key, value, **options)
        return self._attend(query, key, value, self._slot, scale)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, slot: AttentionSlot, scale: float | None) -> Tensor:
        """Plan and compute one call of this attention module, and count it."""
        statistics, config = self.statistics, self.config
        with statistics.timed("planning", query.device):
            plan = self._plan(query, key, value, slot, scale)
        if statistics.backend is None:
            statistics.backend, statistics.backend_reason = operations.choose_backend(config.backend, query, plan)
        with statistics.timed("attention", query.device):
            output = operations.attend(query, key, value, config, plan, scale)
        statistics.count_sparse(plan, layer=slot.layer, branch=self._call.branch)
        return output

    def attend_at(self, query: Tensor, key: Tensor, value: Tensor, position: int, scale: float | None) -> Tensor:
        """One sparse call, for the attention module at this position of the transformer that is running."""
        return self._attend(query, key, value, self._call.slots[position], scale)

    def _dense_reason_of(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> str | None:
        """Why this call cannot be sparse, by what the native processor asks for; None where it can."""
        reasons = {
            "attention mask": options.get("attn_mask") is not None,
            "causal attention": options.get("is_causal", False),
            "dropout": options.get("dropout_p", 0.0) > 0,
            "grouped queries": options.get("enable_gqa", False) or key.shape[2] != query.shape[2],
            "context parallel": options.get("parallel_config") is not None,
            "gradients needed": torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)),
            "other tokens than the grid's": not query.shape[1] == key.shape[1] == self._call.layout.length,
            "one block of keys": key.shape[1] <= self.config.kv_block_size,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _plan(self, query: Tensor, key: Tensor, value: Tensor, slot: AttentionSlot, scale: float | None) -> Plan:
        """A new plan, or the one of an earlier step while ``refresh_every`` allows."""
        call, config = self._call, self.config
        owner = (slot, call.branch)
        facts = (query.shape, key.shape, query.device, call.layout.grid)
        made, made_for, plan = self._plans.pop(owner, (-1, None, None))
        if plan is None or made_for != facts or not 0 < call.step.index - made < config.refresh_every:
            layout, made = call.layout, call.step.index
            where = {"grid": layout.grid, "full_tokens": layout.full_tokens, "key_lengths": layout.key_lengths}
            plan = operations.build_plan(query, key, value, config, scale=scale, **where)
        ahead = call.step.index + 1
        sparse_until = call.step.total - dense_steps(config.dense_last, call.step.total)
        if ahead < min(made + config.refresh_every, sparse_until):
            self._plans[owner] = (made, facts, plan)
        return plan

    # -- copies -----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "_slots": self._slots}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pipe = _no_pipe
        self._begin()
        self._build_routes()

    def __deepcopy__(self, memo: dict[int, Any]) -> PSAProcessor:
        # A copied model has no pipeline yet, unless its pipeline is what is being copied.
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        pipe = memo.get(id(self._pipe()))
        if pipe is not None:
            twin._pipe = weakref.ref(pipe)
        return twin

    def __repr__(self) -> str:
        return f"PSAProcessor({self.config})"


def transformers_of(pipe_or_model: Any) -> list[nn.Module]:
    """The transformers of a pipeline (or the model itself) that have a row, each once.

    Raises:
        TypeError: it is neither a pipeline nor a model.
    """
    if isinstance(pipe_or_model, nn.Module):
        components = [pipe_or_model]
    elif isinstance(getattr(pipe_or_model, "components", None), Mapping):
        components = list(pipe_or_model.components.values())
    else:
        raise TypeError(f"PSA needs a diffusers pipeline or a transformer, but got a {type(pipe_or_model).__name__}.")
    # A compiled model keeps its original as _orig_mod.
    models = [getattr(module, "_orig_mod", module) for module in components if isinstance(module, nn.Module)]
    return list({id(model): model for model in models if find_row(model) is not None}.values())


def installed_processors(models: list[nn.Module]) -> list[PSAProcessor]:
    """The PSA processors now set on these transformers, each once."""
    modules = [module for model in models for module in model.modules()]
    found = [getattr(module, "processor", None) for module in modules]
    return list({id(item): item for item in found if isinstance(item, PSAProcessor)}.values())


def _no_pipe() -> None:
    return None


def _refuse_ring(parallel_config: Any) -> None:
    context_parallel = getattr(parallel_config, "context_parallel_config", None)
    if (getattr(context_parallel, "ring_degree", None) or 1) > 1:
        raise ValueError(
            f"PSA does not run under ring attention (ring_degree={context_parallel.ring_degree}): a rank never holds "
            "all keys. Use ulysses_degree instead, or disable_psa(pipe)."
        )
