"""PSAProcessor: the attention processor that runs a video transformer's self-attention sparsely."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.utils import logging
from torch import Tensor, nn

from ..autocasting import autocast_inputs
from ..config import PSAConfig
from ..planning.plan import Plan
from . import operations, parallel
from .budgets import RunBudgets, name_experts
from .caches import cache_config, extrapolation_note
from .calibrating import Calibration, step_weights
from .compiled import intercepted, register_processor
from .discovery import no_transformer, transformers_of
from .guards import early_warning
from .native import OUTSIDE, PATCH, SLOT, AttentionSlot, ModelPatch, SparseProcessor, attach, reroute, widen_signature
from .schedule import STEP_UNKNOWN, Step, StepClock, dense_reason, dense_steps, rounding_note
from .statistics import PSAStatistics
from .tokens import TokenLayout

logger = logging.get_logger(__name__)

NO_NATIVES = (
    "PSAProcessor: it does not know the native processors of this model. Make it with the pipeline or model that it is "
    "set on, before it is set: pipe.transformer.set_attn_processor(PSAProcessor(pipe, config)), or enable_psa(pipe, "
    "config)."
)
OTHER_TOKENS = "other tokens than the grid's"


@dataclass(frozen=True)
class ForwardCall:
    """What one forward of a transformer has in common: read once, by the hook, before it."""

    step: Step | None
    layout: TokenLayout | None
    branch: str | int
    slots: tuple[AttentionSlot, ...]
    calls: int = 1  # of the attention function by each attention module
    in_order: bool = True  # context parallel leaves the tokens in their order
    expert: str = "transformer"  # the transformer's name in its pipeline
    measuring: bool = False  # for a calibration


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
        calibrate: Measure the layers' errors in the last dense step, and spend the compute budget in each run where
            they tell (``psa_diffusers.integration.calibrating``). Not under context parallel.

    Raises:
        ValueError: no transformer of the pipeline can be sparse (the message says why, or lists those that can).
        TypeError: an argument is of another type.
    """

    def __init__(self, pipe_or_model: Any = None, config: PSAConfig | None = None, *, calibrate: bool = False) -> None:
        if isinstance(pipe_or_model, PSAConfig) and config is None:
            pipe_or_model, config = None, pipe_or_model  # says what is missing when it is called
        if config is not None and not isinstance(config, PSAConfig):
            raise TypeError(f"PSAProcessor: config must be a PSAConfig, but is {_meant(config)}.")
        self.config = config or PSAConfig()
        self.calibration = Calibration(self.config) if calibrate else None
        models = transformers_of(pipe_or_model) if pipe_or_model is not None else []
        if pipe_or_model is not None and not models:
            raise ValueError(f"PSAProcessor: {no_transformer(pipe_or_model)}")
        is_pipe = bool(models) and not isinstance(pipe_or_model, nn.Module)
        self._pipe = weakref.ref(pipe_or_model) if is_pipe else _no_pipe
        siblings = [other for other in installed_processors(models) if is_pipe and other._pipe() is pipe_or_model]
        self._begin(siblings[0] if siblings else None)
        self._slots = [slot for model in models for _, slot in attach(model).attention]
        name_experts(self._pipe(), models, self.config)
        self._build_routes()

    def _begin(self, sibling: PSAProcessor | None = None) -> None:
        """Start without a run. Processors of one pipeline share its clock and statistics."""
        self.statistics = sibling.statistics if sibling else PSAStatistics()
        self._clock = sibling._clock if sibling else StepClock()
        self._budgets = RunBudgets(self.config)
        self._explicit: Step | None = None
        self._call = ForwardCall(None, None, 0, ())
        self._slot: AttentionSlot | None = None  # the attention module that is being called
        self._counted: tuple[Step | None, int, int] = (None, 0, 0)  # step, transformer, forwards of it in the step
        self._plans: dict[tuple[AttentionSlot, str | int, int], tuple[int, tuple, TokenLayout, Plan]] = {}
        self._warned = False
        self._warned_of: set[str] = set()

    def _build_routes(self) -> None:
        self._id, self._prepared = register_processor(self), bool(self._slots)
        # Now, and one a class, so that a compiled block finds one and the same function at every call.
        widen_signature(PSAProcessor.__call__, {type(slot.native) for slot in self._slots})
        natives = {type(slot.native) for slot in self._slots if slot.self_attention}
        known = {type(slot.native) for slot in self._slots if slot.self_attention and slot.known}
        routes = {native: reroute(native, self._attention) for native in known}
        self._routes = {native: route for native, route in routes.items() if route is not None}
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
        parallel.ulysses_of(config)
        # Two experts may share this processor, and only one of them be made parallel: it knows this config by now.
        models = transformers_of(self._pipe()) if self._pipe() is not None else []
        owners = [getattr(model, PATCH, None) for model in models if getattr(model, "_parallel_config", None) is config]
        owned = [slot for patch in owners if patch is not None for _, slot in patch.attention]
        self._set_on_natives("_parallel_config", config, owned or self._slots)

    def _of_natives(self, name: str) -> Any:
        return _first_of(self._slots, name)

    def _set_on_natives(self, name: str, value: Any, slots: Sequence[AttentionSlot] | None = None) -> None:
        for slot in self._slots if slots is None else slots:
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
        step, new_run = self._clock.locate(self._pipe(), arguments.get("timestep"), patch.context, self._explicit)
        if new_run:
            self.statistics.reset()
        if new_run or self._counted[1] != id(model):
            self._plans.clear()
        if step is not None:
            self._begin_step(model, step, new_run)
        measuring = step is not None and self._begin_calibration(patch, step, new_run)
        layout, reason = None, dense_reason(step, self.config)
        if reason == STEP_UNKNOWN:
            self._warn_of_unknown_step()
        if reason is None or measuring or self._context_of(patch) is not None:
            layout = patch.row.layout(model, arguments)
            if isinstance(layout, str):
                layout, reason = None, reason or layout
        self._check_parallel(patch, layout)
        branch = self._branch(model, patch, step, new_run)
        calls = len(arguments["hidden_states"]) if patch.row.one_sample_a_call else 1
        # Where video and text are split one by one, a process holds a part of both: their order is another one.
        in_order = patch.row.one_sequence or not (layout and layout.has_others)
        own = tuple(slot for _, slot in patch.attention)
        measuring = measuring and layout is not None
        self._call = ForwardCall(step, layout, branch, own, calls, in_order, patch.expert, measuring)
        for slot in slots:
            of_layer = self._dense_reason_of_layer(slot)
            slot.decide(reason or of_layer, watched=measuring and of_layer is None)
        self._count_compiled(patch, slots)

    def _begin_calibration(self, patch: ModelPatch, step: Step, new_run: bool) -> bool:
        """Whether this forward's calls are to be measured."""
        if self.calibration is None:
            return False
        if self._context_of(patch) is not None:
            raise ValueError(parallel.NO_CALIBRATION)
        self.statistics.calibration = self.calibration
        weights = partial(step_weights, getattr(self._pipe(), "scheduler", None), step.total)
        return self.calibration.begin_step(step, patch, weights, self._budgets, new_run)

    def _context_of(self, patch: ModelPatch) -> Any | None:
        """The context-parallel settings of this transformer's self-attention, if it has some."""
        own = [slot for _, slot in patch.attention if slot.self_attention]
        return parallel.ulysses_of(_first_of(own, "_parallel_config"))

    def _check_parallel(self, patch: ModelPatch, layout: TokenLayout | None) -> None:
        own = [module for module, slot in patch.attention if slot.self_attention]
        parallel.check_sizes(self._context_of(patch), own, None if layout is None else layout.length)

    def _begin_step(self, model: nn.Module, step: Step, new_run: bool) -> None:
        """Count the step, and at a run's begin say what the user may want to change."""
        self.statistics.count_step(step, cached=cache_config(model) is not None)
        notes = (rounding_note(self.config, step.total), extrapolation_note(model, self.config, step.total))
        for note in notes if new_run else ():
            if note is not None:
                self.statistics.note(note)
        warning = early_warning(self.config, step.total) if new_run else None
        if warning is not None and warning not in self._warned_of:
            self._warned_of.add(warning)
            logger.warning(warning)
        # Where a cache skips calls, a plan's last use may not come.
        kept = self._plans.items()
        self._plans = {owner: plan for owner, plan in kept if self._plan_ends(plan[0], step) > step.index}

    def end_forward(self, patch: ModelPatch) -> None:
        """The transformer call is over, by its end or by an error (called by its hook)."""
        for slot in patch.slots_of(self):
            slot.decide(OUTSIDE)

    def _dense_reason_of_layer(self, slot: AttentionSlot) -> str | None:
        if slot.layer in self.config.dense_layers:
            return "dense layer"
        if type(slot.native) not in self._routes:
            return "unknown attention processor"
        return self._budgets.dense_reason(self._call.step, slot.layer, self._call.expert)

    def _count_compiled(self, patch: ModelPatch, slots: list[AttentionSlot]) -> None:
        """Dense calls inside compiled blocks, which cannot count: every one of their layers will be called."""
        blocks = patch.compiled()
        for slot in slots if blocks else ():
            if slot.self_attention and not slot.sparse and slot.name.startswith(blocks):
                self.statistics.count_dense(slot.dense_reason, self._call.calls, layer=slot.layer)

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
        if slot.self_attention and not torch.compiler.is_compiling() and not kwargs.get(slot.left_out):
            self.statistics.count_dense(slot.dense_reason, self._call.calls, layer=slot.layer)
        return slot.native(attn, *args, **kwargs)

    def _attention(self, dense: Any, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Stands in for the attention function of a native processor; [batch, seq, heads, head_dim]."""
        reason, scale = self._dense_reason_of(query, key, value, options), options.get("scale")
        padded, shared = options.get("attn_mask") is not None, options.get("parallel_config")
        inputs = autocast_inputs(query, key, value)
        if torch.compiler.is_compiling():
            if reason is not None:
                return dense(query, key, value, **options)
            place, share = self._slot.position, shared is not None
            return torch.ops.psa_diffusers.self_attention(*inputs, place, self._id, scale, padded, share)
        if reason is None and self._slot.dense_reason:
            self._measure(inputs, self._slot, scale, padded)
            reason = self._slot.dense_reason
        if reason is None:
            try:
                return self._attend(*inputs, self._slot, scale, padded, shared)
            except parallel.OtherTokensError:
                reason = OTHER_TOKENS
        self.statistics.count_dense(reason, layer=self._slot.layer)
        return dense(query, key, value, **options)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slot: AttentionSlot,
        scale: float | None,
        padded: bool,
        shared: Any = None,
    ) -> Tensor:
        """One sparse call; ``shared`` is the parallel config that spreads its tokens over processes, if one does."""
        attend = partial(self._attend_sequence, slot=slot, scale=scale, padded=padded)
        if shared is None:
            return attend(query, key, value)
        attend = partial(attend, group=parallel.heads_group(shared))
        return parallel.attend_full_sequence(attend, query, key, value, shared)

    def _attend_sequence(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slot: AttentionSlot,
        scale: float | None,
        padded: bool,
        group: Any = None,
    ) -> Tensor:
        """Plan, compute and count; full sequences, and all heads but those that other processes of the group hold."""
        statistics, call = self.statistics, self._call
        config = self._budgets.config(call.step, slot.layer, call.expert)
        if call.layout.of_length(key.shape[1]) is None:
            raise parallel.OtherTokensError(key.shape[1], call.layout.length)
        if call.measuring:
            self._measure((query, key, value), slot, scale, padded)
        with statistics.timed("planning", query.device):
            plan = self._plan(query, key, value, config, slot, scale, padded, group)
        slot.calls += 1
        if statistics.backend is None:
            statistics.backend, statistics.backend_reason = operations.choose_backend(config.backend, query, plan)
        with statistics.timed("attention", query.device, after="planning"):
            output = operations.attend(query, key, value, config, plan, scale)
        statistics.count_sparse(plan, group, layer=slot.layer, branch=call.branch)
        return output

    def _measure(self, inputs: Sequence[Tensor], slot: AttentionSlot, scale: float | None, padded: bool) -> None:
        where = self._where(inputs[0].shape[1], padded)
        self.calibration.measure(inputs, scale, where, self._call.expert, slot.layer, self.statistics)

    def attend_at(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        position: int,
        scale: float | None,
        padded: bool,
        shared: bool,
    ) -> Tensor:
        """One sparse call, for the attention module at this position of the transformer that is running."""
        slot = self._call.slots[position]
        return self._attend(query, key, value, slot, scale, padded, slot.native._parallel_config if shared else None)

    def _dense_reason_of(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> str | None:
        """Why this call cannot be sparse, by what the native processor asks for; None where it can."""
        mask, context = options.get("attn_mask"), parallel.ulysses_of(options.get("parallel_config"))
        expected = self._call.layout.length
        length, key_length = (parallel.full_length(context, x.shape[1], expected) for x in (query, key))
        layout = self._call.layout.of_length(length)
        reasons = {
            "attention mask": mask is not None and not (layout and layout.explains(mask, len(query), length)),
            "causal attention": options.get("is_causal", False),
            "dropout": options.get("dropout_p", 0.0) > 0,
            "grouped queries": options.get("enable_gqa", False) or key.shape[2] != query.shape[2],
            "context parallel": context is None and options.get("parallel_config") is not None,
            "context parallel with text tokens": context is not None and not self._call.in_order,
            "attention intercepted": intercepted(),
            "gradients needed": torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)),
            OTHER_TOKENS: layout is None or length != key_length,
            "one block of keys": key_length <= self.config.kv_block_size,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _plan(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        config: PSAConfig,
        slot: AttentionSlot,
        scale: float | None,
        padded: bool,
        group: Any = None,
    ) -> Plan:
        """A new plan, or the one of an earlier step while ``refresh_every`` allows."""
        call, layout = self._call, self._call.layout.of_length(query.shape[1])
        owner, facts = (slot, call.branch, slot.calls), (query.shape, key.shape, query.device, padded)
        made, made_for, made_in, plan = self._plans.pop(owner, (-1, None, layout, None))
        kept = made_for == facts and layout.same_as(made_in)
        if not kept or not 0 < call.step.index - made < config.refresh_every:
            made = call.step.index
            where = self._where(query.shape[1], padded)
            if group is not None:
                where["heads_group"] = group
            plan = operations.build_plan(query, key, value, config, scale=scale, **where)
        if call.step.index + 1 < self._plan_ends(made, call.step):
            self._plans[owner] = (made, facts, layout, plan)
        return plan

    def _where(self, length: int, padded: bool) -> dict[str, Any]:
        """What planning must know of the tokens."""
        layout = self._call.layout.of_length(length)
        lengths = layout.key_lengths if padded else None
        return {"grid": layout.grid, "full_tokens": layout.full_tokens(length), "key_lengths": lengths}

    def _plan_ends(self, made: int, step: Step) -> int:
        """The first step that may no longer use a plan made in step ``made``."""
        return min(made + self.config.refresh_every, step.total - dense_steps(self.config.dense_last, step.total))

    # -- copies -----------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "_slots": self._slots, "_calibrate": self.calibration is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.config, self._slots, self._pipe = state["config"], state["_slots"], _no_pipe
        self.calibration = Calibration(self.config) if state["_calibrate"] else None
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


def installed_processors(models: list[nn.Module]) -> list[PSAProcessor]:
    """The PSA processors now set on these transformers, each once."""
    modules = [module for model in models for module in model.modules()]
    found = [getattr(module, "processor", None) for module in modules]
    return list({id(item): item for item in found if isinstance(item, PSAProcessor)}.values())


def _meant(config: Any) -> str:
    """What was given for a config, and what may have been wanted."""
    wanted = ""
    if isinstance(config, str):
        wanted = f"; a preset is given by name: enable_psa(pipe, preset={config!r}), or PSAConfig.preset({config!r})"
    elif isinstance(config, dict):
        wanted = "; make one of these settings: PSAConfig.from_dict(settings)"
    return f"a {type(config).__name__}{wanted}"


def _no_pipe() -> None:
    return None


def _first_of(slots: Sequence[AttentionSlot], name: str) -> Any:
    return next((getattr(slot.native, name) for slot in slots if hasattr(slot.native, name)), None)
