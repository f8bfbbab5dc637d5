"""What PSA would do in a transformer at a size: by one forward on the meta device, without weights or data."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..budget_schedule import mean_budget
from ..config import PSAConfig
from .example_inputs import EXAMPLES
from .meta_forward import meta_forward
from .native import PATCH, set_processor
from .processor import PSAProcessor
from .schedule import Step, dense_reason

REPEATS = 3


@dataclass(frozen=True)
class Forecast:
    """One forward of a transformer in a sparse step.

    Attributes:
        grid: (frames, height, width) of the video tokens; None if nothing is sparse.
        tokens: Length of the sequence that the sparse calls attend over; None if nothing is sparse.
        heads, head_dim: Of the sparse calls.
        sparse_calls: Self-attention calls that would be sparse.
        dense_reasons: Self-attention calls that would stay dense, by reason.
        attention_flops: Floating-point operations of the sparse calls, were they dense.
        other_flops: Of everything else in the forward.
    """

    grid: tuple[int, int, int] | None
    tokens: int | None
    heads: int | None
    head_dim: int | None
    sparse_calls: int
    dense_reasons: Mapping[str, int]
    attention_flops: int
    other_flops: int

    @property
    def attention_share(self) -> float:
        """Share of the forward's operations that PSA can reduce."""
        return self.attention_flops / (self.attention_flops + self.other_flops)

    def least_budget(self, config: PSAConfig) -> float:
        """What the tokens beside the video's cost by themselves, being at full resolution as rows and as columns."""
        if self.grid is None:
            return 0.0
        video, cheapest = math.prod(self.grid), 1 / config.kv_block_size if config.rule == "budget" else 0.0
        free = 1.0  # share of the block pairs that hold none of them
        for block in (config.query_block_size, config.kv_block_size):
            blocks = -(-self.tokens // block)
            free *= (video // block if video < self.tokens else blocks) / blocks
        return 1 - free + free * cheapest


class _Recorder(PSAProcessor):
    """Notes what would be computed sparsely, and computes nothing there."""

    def __init__(self, model: nn.Module, config: PSAConfig) -> None:
        super().__init__(model, config)
        self.shapes: list[torch.Size] = []  # [batch, seq, heads, head_dim]
        self.grid: tuple[int, int, int] | None = None

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *details: Any) -> Tensor:
        self.shapes.append(query.shape)
        self.grid = self._call.layout.grid
        return query.new_empty((*query.shape[:-1], value.shape[-1]))


def forecast(name: str, settings: Mapping[str, Any], latents: tuple[int, int, int], config: PSAConfig) -> Forecast:
    """What a sparse step would do in a transformer of this class.

    Args:
        name: Class name in diffusers.
        settings: Content of its ``config.json``.
        latents: (frames, height, width) of the latents.
        config: PSA's settings.

    Raises:
        ValueError: nothing is known of the class's inputs (``EXAMPLES`` holds those of which there is).
    """
    if name not in EXAMPLES:
        raise ValueError(f"no forecast for {name}; there is one for {', '.join(EXAMPLES)}.")
    example = EXAMPLES[name]
    model = random_model(name, example.settings(dict(settings)))
    recorder = _Recorder(model, _one_step(config))
    _install(model, recorder)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), meta_forward(), counter, recorder.step(0, 1):
        model(**example.inputs(model, latents))
    shapes = recorder.shapes
    _, tokens, heads, head_dim = shapes[0] if shapes else (None,) * 4
    return Forecast(
        grid=recorder.grid,
        tokens=tokens,
        heads=heads,
        head_dim=head_dim,
        sparse_calls=len(shapes),
        dense_reasons=recorder.statistics.dense_reasons,
        # Two matrix products of seq x seq x head_dim, a multiplication and an addition each.
        attention_flops=sum(4 * batch * seq**2 * heads * dim for batch, seq, heads, dim in shapes),
        other_flops=counter.get_total_flops(),
    )


def random_model(name: str, settings: Mapping[str, Any], device: str = "meta") -> nn.Module:
    """A transformer of this class with random weights; on the meta device with none.

    Raises:
        ValueError: this diffusers has no such class.
    """
    cls = getattr(diffusers, name, None)
    if cls is None:
        raise ValueError(f"diffusers {diffusers.__version__} has no class {name}; a newer one may.")
    with torch.device(device):
        return cls.from_config(dict(settings)).eval()


def sparse_layers(model: nn.Module, config: PSAConfig | None = None) -> int:
    """How many attention modules of a transformer could be sparse.

    Raises:
        ValueError: none, with the reason.
    """
    PSAProcessor(model, config)
    return sum(slot.self_attention and slot.known for _, slot in getattr(model, PATCH).attention)


def speedup_ceiling(share: float, compute_budget: float, dense_steps: int = 0, steps: int = 1) -> float:
    """Amdahl's law: this much faster, where ``share`` of the time shrinks to ``compute_budget`` of itself.

    With ``dense_steps`` of ``steps`` left as they are it is the speedup of a whole run. A share of operations is one of
    time where all operations are equally fast.
    """
    sparse_step = 1 - share + share * compute_budget
    return steps / (dense_steps + (steps - dense_steps) * sparse_step)


def expected_budget(config: PSAConfig, steps: int = 50) -> float | None:
    """The compute budget that a config asks for, of a schedule the mean over the sparse ones of so many steps; None
    where it follows from the content."""
    if config.budget_schedule is not None:
        sparse = [index / steps for index in range(steps) if dense_reason(Step(index, steps), config) is None]
        return mean_budget(config.budget_schedule, sparse)
    if config.rule == "topk":
        return sum(share * 2.0**-level for level, share in enumerate(config.level_fractions))
    return config.compute_budget


def _one_step(config: PSAConfig) -> PSAConfig:
    """The settings of a sparse step by itself, at the mean budget of a schedule."""
    budget = expected_budget(config) or config.compute_budget if config.rule == "budget" else None
    schedule = dict(compute_budget=budget, budget_schedule=None)
    return replace(config, **schedule, dense_warmup=0.0, dense_last=0.0, refresh_every=1)


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of a forward of the transformer cut down to one layer, with random weights: the fastest of some.

    Attributes:
        dense: By dense attention.
        dense_attention: Of those, the self-attention.
        sparse: In a sparse step.
        planning, attention: Of those, planning and sparse attention.
    """

    dense: float
    dense_attention: float
    sparse: float
    planning: float
    attention: float

    @property
    def attention_share(self) -> float:
        return self.dense_attention / self.dense

    @property
    def speedup(self) -> float:
        """Of a sparse step, planning included."""
        return self.dense / self.sparse


class _DenseTimer(PSAProcessor):
    """Computes densely what would be sparse, and times it."""

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *details: Any) -> Tensor:
        with self.statistics.timed("attention", query.device):
            heads_first = (tensor.transpose(1, 2) for tensor in (query, key, value))
            return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)


def measure_layer(
    name: str,
    settings: Mapping[str, Any],
    latents: tuple[int, int, int],
    config: PSAConfig,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LayerTimes:
    """Time one layer of such a transformer on this machine. Arguments as in :func:`forecast`.

    Weights and latents are random: what is measured is the work, which a budget fixes, not the closeness.
    """
    one = {"num_layers": 1, "num_single_layers": 0, "vace_layers": [0], "num_visual_blocks": 1, "num_decoder_layers": 0}
    fewer = {key: value for key, value in one.items() if key in settings or key == "num_layers"}
    example = EXAMPLES[name]
    model = random_model(name, example.settings({**settings, **fewer}), device)
    model = nn.Module.to(model, dtype)  # all of it; a model's own method would remark on that
    inputs = example.inputs(model, latents)
    config = replace(_one_step(config), dense_layers=())
    dense, dense_parts = _timed_forward(model, _DenseTimer(model, config), inputs)
    sparse, sparse_parts = _timed_forward(model, PSAProcessor(model, config), inputs)
    return LayerTimes(
        dense, dense_parts.attention_seconds, sparse, sparse_parts.planning_seconds, sparse_parts.attention_seconds
    )


def _timed_forward(model: nn.Module, processor: PSAProcessor, inputs: Mapping[str, Tensor]) -> tuple[float, Any]:
    """Seconds of the fastest of some forwards after a first one (others may use the machine), and its statistics."""
    _install(model, processor)
    on_gpu, runs = inputs["hidden_states"].device.type == "cuda", []
    for _ in range(1 + REPEATS):
        processor.statistics.reset()
        if on_gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        with torch.no_grad(), processor.step(0, 1):
            model(**inputs)
        if on_gpu:
            torch.cuda.synchronize()
        runs.append((time.perf_counter() - started, copy.copy(processor.statistics)))
    return min(runs[1:], key=lambda run: run[0])


def _install(model: nn.Module, processor: PSAProcessor) -> None:
    """Also on transformers that have no ``set_attn_processor``."""
    for module, slot in getattr(model, PATCH).attention:
        set_processor(module, processor if slot.self_attention else slot.native)
