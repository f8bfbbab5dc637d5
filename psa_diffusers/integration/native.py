"""The native attention processors: kept beside their modules, rerouted through another attention function, put back."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.utils import logging
from torch import nn

from .compiled import leave_graph
from .models import ModelRow, find_row
from .schedule import CallContext

logger = logging.get_logger(__name__)

PATCH = "_psa_patch"  # on a root transformer
SLOT = "_psa_slot"  # on an attention module
OUTSIDE = "outside the transformer's forward"


class SparseProcessor:
    """What the hooks on a transformer ask of the processor on its attention modules."""

    def begin_forward(self, model: nn.Module, patch: ModelPatch, arguments: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def end_forward(self, patch: ModelPatch) -> None:
        raise NotImplementedError


@dataclass(eq=False)
class AttentionSlot:
    """An attention module's native processor, what the model's row says of the two, and whether it runs sparse now.

    A compiled block reads ``sparse`` and ``native`` alone; the rest differs between layers, and would compile it anew
    for each. ``position`` (0-d int64) is among the tensors of a block, which may differ.
    """

    native: Any
    name: str
    layer: int
    self_attention: bool
    known: bool  # the native is one that may be rerouted
    position: torch.Tensor  # in ModelPatch.attention
    left_out: str = ""  # argument of the native by which it leaves its attention out
    sparse: bool = False  # or watched
    dense_reason: str = OUTSIDE
    in_use: bool = False  # a sparse processor is to be on the module
    calls: int = 0  # sparse ones in this forward

    def decide(self, dense_reason: str | None, watched: bool = False) -> None:
        """Run sparse, or dense for this reason, from now on; dense ones that are watched take the sparse way to it."""
        self.in_use, self.calls = True, 0
        self.sparse, self.dense_reason = dense_reason is None or watched, dense_reason or ""


@dataclass(eq=False)
class ModelPatch:
    """All that is attached to one transformer; :func:`detach` removes it."""

    row: ModelRow
    attention: list[tuple[nn.Module, AttentionSlot]]
    signature: inspect.Signature
    handles: list[Any] = field(default_factory=list)
    context: CallContext | None = None
    parents: dict[str, nn.Module] = field(default_factory=dict)  # all modules around attention, by name and a dot
    expert: str = "transformer"  # the model's name in its pipeline

    def compiled(self) -> tuple[str, ...]:
        """Name prefixes of the blocks that were compiled (``compile_repeated_blocks``)."""
        return tuple(name for name, part in self.parents.items() if getattr(part, "_compiled_call_impl", None))

    def slots_of(self, processor: SparseProcessor) -> list[AttentionSlot]:
        """Slots of the attention modules that this processor is now on."""
        return [slot for module, slot in self.attention if module.processor is processor]

    def processors(self) -> list[SparseProcessor]:
        """The sparse processors now on the attention modules, each once."""
        found = [module.processor for module, _ in self.attention if isinstance(module.processor, SparseProcessor)]
        return list({id(processor): processor for processor in found}.values())


# -- attaching to a transformer -----------------------------------------------------------------------------------


def attach(model: nn.Module) -> ModelPatch:
    """Remember the native processors of a transformer that has a row, and watch its forwards. Again = still."""
    patch = model.__dict__.get(PATCH)
    if patch is None:
        patch = model.__dict__[PATCH] = ModelPatch(find_row(model), [], inspect.signature(type(model).forward))
        patch.handles = [
            model.register_forward_pre_hook(_before_forward, with_kwargs=True),
            model.register_forward_hook(_after_forward, always_call=True),
        ]
        if hasattr(type(model), "cache_context"):
            model.__dict__["cache_context"] = cache_context.__get__(model)
    found = [(name, part) for name, part in model.named_modules() if callable(getattr(part, "processor", None))]
    patch.attention = [(part, _slot_of(model, patch.row, name, part, i)) for i, (name, part) in enumerate(found)]
    around = {name[:dot] for name, _ in found for dot in range(len(name)) if name[dot] == "."}
    patch.parents = {f"{name}.": model.get_submodule(name) for name in sorted(around)}
    return patch


def _slot_of(model: nn.Module, row: ModelRow, name: str, module: nn.Module, position: int) -> AttentionSlot:
    native, slot = _native_of(model, row, name, module), getattr(module, SLOT, None)
    if slot is None or slot.native is not native:
        slot = module.__dict__[SLOT] = AttentionSlot(
            native,
            name,
            layer=row.layer(model, name),
            self_attention=row.is_self_attention(name),
            known=type(native).__name__ in row.natives,
            left_out=row.left_out,
            position=torch.tensor(position, device="cpu"),
        )
    return slot


def detach(model: nn.Module) -> None:
    """Put back every native processor that a sparse one displaced, and leave nothing behind."""
    _remove_hooks(model)
    row = find_row(model)
    for name, module in model.named_modules():
        if isinstance(getattr(module, "processor", None), SparseProcessor):
            set_processor(module, _native_of(model, row, name, module))
        module.__dict__.pop(SLOT, None)


def set_processor(module: nn.Module, processor: Any) -> None:
    """Set an attention module's processor, also where the module has no method for it."""
    setter = getattr(module, "set_processor", None)
    if setter is not None:
        setter(processor)
    else:
        module.processor = processor


def _remove_hooks(model: nn.Module) -> None:
    patch = model.__dict__.pop(PATCH, None)
    for handle in patch.handles if patch else ():
        handle.remove()
    if getattr(model.__dict__.get("cache_context"), "__func__", None) is cache_context:
        del model.__dict__["cache_context"]


def _native_of(model: nn.Module, row: ModelRow, name: str, module: nn.Module) -> Any:
    if not isinstance(module.processor, SparseProcessor):
        return module.processor
    slot = getattr(module, SLOT, None)
    return slot.native if slot is not None else _default_native(model, row, name, module)


def _default_native(model: nn.Module, row: ModelRow, name: str, module: nn.Module) -> Any:
    """What the model sets itself: the native is gone where a PSAProcessor that was made without the model was set."""
    if row.default_native is None and not row.is_self_attention(name):
        return getattr(module, "_default_processor_cls", AttnProcessor2_0)()  # newer modules know it
    native = row.natives[0] if row.default_native is None else row.default_native(model)
    homes = {sys.modules[type(part).__module__] for part in model.modules()}
    return next(getattr(home, native) for home in homes if hasattr(home, native))()


def _before_forward(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        leave_graph()
    patch = getattr(model, PATCH)
    bound = patch.signature.bind(model, *args, **kwargs)
    bound.apply_defaults()
    for processor in patch.processors():
        processor.begin_forward(model, patch, bound.arguments)
    _report_replaced(patch)


def _after_forward(model: nn.Module, args: tuple, output: Any) -> None:
    if torch.compiler.is_compiling():
        leave_graph()
    patch = getattr(model, PATCH)
    for processor in patch.processors():
        processor.end_forward(patch)


def _report_replaced(patch: ModelPatch) -> None:
    """Fused projections and the like set processors of their own: say that PSA is gone from there."""
    pairs = patch.attention
    replaced = [slot for module, slot in pairs if slot.in_use and not isinstance(module.processor, SparseProcessor)]
    if replaced:
        logger.warning(
            f"PSA no longer runs in {len(replaced)} attention modules ({replaced[0].name}, ...), whose processors were "
            "replaced. Call enable_psa(pipe) again to use it there, or disable_psa(pipe)."
        )
    for slot in replaced:
        slot.in_use = False


@contextmanager
def cache_context(model: nn.Module, name: str, **details: Any) -> Iterator[None]:
    """``model.cache_context``, remembering what the pipeline said."""
    patch = getattr(model, PATCH)
    outer = patch.context
    patch.context = CallContext(name, details.get("step_index"), details.get("num_inference_steps"))
    try:
        with type(model).cache_context(model, name, **details):
            yield
    finally:
        patch.context = outer


# -- rerouting ----------------------------------------------------------------------------------------------------


def reroute(native: type, attention: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor] | None:
    """The native processor's ``__call__`` with ``attention`` in place of the attention function that it calls.

    Natives reach attention by two module-level names alone: ``dispatch_attention_fn`` and ``F``. The same code runs,
    with a copy of its globals in which these are replaced.

    Args:
        native: A native processor's class.
        attention: Called as ``attention(dense, query, key, value, **options)`` with tensors [batch, seq, heads,
            head_dim]; ``dense`` is the attention function that it replaces, taking the rest.

    Returns:
        The function, to be called with a native processor as ``self``; None where the code has neither name.
    """
    function = native.__call__
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    scope, names = dict(function.__globals__), code.co_names
    # Without its name the scope is its own: the compiler would look names up in the module of that name.
    scope.pop("__name__", None)
    if "dispatch_attention_fn" in names:
        scope["dispatch_attention_fn"] = _through(attention, function.__globals__["dispatch_attention_fn"])
    elif "F" in names and "scaled_dot_product_attention" in names:
        sdpa = _heads_first(_through(attention, _heads_first(F.scaled_dot_product_attention)))
        scope["F"] = SimpleNamespace(**{**vars(F), "scaled_dot_product_attention": sdpa})
    else:
        return None
    rerouted = FunctionType(code, scope, function.__name__, function.__defaults__, function.__closure__)
    rerouted.__kwdefaults__ = function.__kwdefaults__
    return rerouted


def widen_signature(function: Callable[..., Any], natives: set[type]) -> None:
    """Let a processor's ``__call__`` name the parameters of these natives beside those that it names already.

    ``Attention.forward`` passes on only arguments that ``inspect.signature(processor.__call__)`` names: a bare
    ``**kwargs`` loses the rotary embedding without a word. Dynamo does not trace a ``__call__`` of the object's own,
    so that the names are the class's, and only ever added to.
    """
    named = dict(inspect.signature(function).parameters)
    positional = [named.pop(name) for name in ("self", "attn")]
    others = {name: p for name, p in named.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    for native in natives:
        for name, parameter in list(inspect.signature(native.__call__).parameters.items())[2:]:
            if parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                others[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY)
    function.__signature__ = inspect.Signature([*positional, *others.values()])


def _through(attention: Callable[..., torch.Tensor], dense: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options):
        return attention(
            dense, query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, **options
        )

    return attend


def _heads_first(attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same function with [batch, heads, seq, head_dim] and [batch, seq, heads, head_dim] exchanged."""

    def exchanged(query, key, value, *args, **options):
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return attend(query, key, value, *args, **options).transpose(1, 2)

    return exchanged
