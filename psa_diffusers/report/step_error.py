"""The error of one denoising step: how far sparse attention moves the model's output.

Unlike the PSNR of a whole video it does not depend on what later steps make of an error, and it takes seconds: the
measure to compare settings with.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import PSAConfig
from ..integration import disable_psa, enable_psa, psa_statistics
from ..integration.processor import installed_processors
from ..metrics import relative_error
from .equal_budget import scaled_config

PSA3_BUDGET = 0.25  # of the paper's PSA-3 shares, unscaled


@dataclass(frozen=True, eq=False)
class RecordedStep:
    """The transformer calls of one denoising step of a dense run, and what came out.

    Attributes:
        calls: The arguments of each call: with the prompt, and, with guidance, without it.
        guidance_scale: As the run had it.
        output: The guided output of the step, dense.
    """

    calls: tuple[dict[str, Any], ...]
    guidance_scale: float
    output: Tensor


@dataclass(frozen=True)
class StepError:
    """What a config does to one step.

    Attributes:
        error: Relative error of the guided output (Euclidean norm); 0 = dense.
        compute_budget: Achieved, mean over the step's sparse calls; dense = 1.
    """

    error: float
    compute_budget: float


def settings_at(budget: float) -> dict[str, PSAConfig]:
    """What is worth comparing at one compute budget. The shares are the paper's PSA-3, scaled."""
    default = PSAConfig(compute_budget=budget)
    return {
        "budget rule (the default)": replace(default, value_correction="covariance"),
        "the same, logit_correction=none": replace(default, logit_correction="none"),
        "the same, value_correction=none": replace(default, value_correction="none"),
        "PSA-3 shares": scaled_config("psa-3 shares", budget / PSA3_BUDGET, default),
        "binary": scaled_config("binary, top-k", budget, default),
    }


def record_steps(pipe: Any, prompt: str, *, guidance_scale: float, seed: int = 0, **run: Any) -> list[RecordedStep]:
    """The transformer's calls in each step of a dense run.

    Args:
        pipe: A pipeline that calls ``pipe.transformer`` once a step, or twice with guidance (as Wan 2.1's does).
        prompt: What it draws.
        guidance_scale: Above 1 = with guidance.
        seed: Of the noise, drawn on the CPU.
        run: The other arguments of the pipeline: sizes, ``num_inference_steps``, ...

    Raises:
        ValueError: the pipeline called its transformer another number of times.
    """
    disable_psa(pipe)
    calls, outputs = [], []
    hooks = (
        pipe.transformer.register_forward_pre_hook(lambda *call: calls.append(call[2]), with_kwargs=True),
        pipe.transformer.register_forward_hook(lambda *call: outputs.append(call[2][0])),
    )
    noise = torch.Generator().manual_seed(seed)
    try:
        pipe(prompt, guidance_scale=guidance_scale, generator=noise, output_type="latent", **run)
    finally:
        for hook in hooks:
            hook.remove()
    a_step = 2 if guidance_scale > 1 else 1
    if not calls or len(calls) % a_step:
        raise ValueError(f"record_steps: expected {a_step} transformer calls a step, but there were {len(calls)}.")
    starts = range(0, len(calls), a_step)
    steps = [(tuple(calls[i : i + a_step]), outputs[i : i + a_step]) for i in starts]
    return [RecordedStep(step, guidance_scale, _guided(parts, guidance_scale)) for step, parts in steps]


@torch.no_grad()
def step_error(pipe: Any, step: RecordedStep, config: PSAConfig) -> StepError:
    """Compute a recorded step again, sparse by this config in all layers, and compare. PSA is disabled afterwards."""
    enable_psa(pipe, replace(config, dense_warmup=0.0, dense_last=0.0, dense_layers=()))
    try:
        with installed_processors([pipe.transformer])[0].step(0, 1):
            parts = [pipe.transformer(**call)[0] for call in step.calls]
        budget = psa_statistics(pipe).compute_budget_sparse
    finally:
        disable_psa(pipe)
    if budget is None:
        raise ValueError("step_error: no call of this step could be sparse; there are too few tokens.")
    return StepError(relative_error(step.output, _guided(parts, step.guidance_scale)), budget)


def _guided(parts: list[Tensor], guidance_scale: float) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    prompted, free = parts
    return free + guidance_scale * (prompted - free)
