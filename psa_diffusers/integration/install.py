"""enable_psa, disable_psa, psa_statistics: for all the transformers of a pipeline at once."""

from __future__ import annotations

from typing import Any

from diffusers.utils import logging
from torch import nn

from ..config import PSAConfig
from .calibrating import Calibration
from .discovery import no_transformer, transformers_of, why_dense
from .native import PATCH, detach, set_processor
from .processor import PSAProcessor, installed_processors
from .statistics import PSAStatistics

logger = logging.get_logger(__name__)


def enable_psa(
    pipe: Any, config: PSAConfig | None = None, preset: str | None = None, *, calibrate: bool = False
) -> Any:
    """Run the video self-attention of every transformer of a pipeline by Pyramid Sparse Attention.

    Enabling again replaces the settings. A transformer that is not known here, or has nothing to make
    sparse, stays as it is, with a warning that says why.

    Args:
        pipe: A diffusers video pipeline (or a transformer; see :class:`PSAProcessor` for what that needs).
        config: Settings; default ``PSAConfig()``.
        preset: Name of a preset instead (``PSAConfig.presets()`` lists them).
        calibrate: Measure the layers' errors in the last dense step of each run, and spend the compute budget where
            they tell, from layer to layer and from step to step.
            :func:`psa_diffusers.integration.psa_calibration` has what came of it.

    Returns:
        The same pipeline.

    Raises:
        ValueError: both config and preset are given, the preset is unknown, or there is no transformer.
        TypeError: an argument is of another type.
    """
    if config is not None and preset is not None:
        raise ValueError(f"enable_psa: give config or preset, not both (preset is {preset!r}).")
    config = PSAConfig.preset(preset) if preset is not None else config
    models = transformers_of(pipe)
    _report_unknown(pipe, models)
    if models:
        processor = PSAProcessor(pipe, config, calibrate=calibrate)
        for model in models:
            for module, slot in getattr(model, PATCH).attention:
                set_processor(module, processor if slot.self_attention else slot.native)
                slot.in_use = slot.self_attention  # what is taken off later is reported, and nothing that is here
    return pipe


def disable_psa(pipe: Any) -> Any:
    """Undo :func:`enable_psa` and ``set_attn_processor(PSAProcessor(...))``: the pipeline is as it was before.

    Returns:
        The same pipeline.
    """
    for model in transformers_of(pipe):
        detach(model)
    return pipe


def psa_statistics(pipe: Any) -> PSAStatistics:
    """What the pipeline's last run did: see :class:`PSAStatistics`.

    Raises:
        ValueError: PSA is not enabled on this pipeline.
    """
    processors = installed_processors(transformers_of(pipe))
    if not processors:
        raise ValueError(
            f"psa_statistics: PSA is not enabled on this {type(pipe).__name__}; call enable_psa(pipe) before a run, "
            "and disable_psa(pipe) only after this."
        )
    return processors[0].statistics


def psa_calibration(pipe: Any) -> Calibration:
    """What the last run of ``enable_psa(pipe, calibrate=True)`` measured, and the budgets that came of it.

    Raises:
        ValueError: PSA is not enabled on this pipeline, or without ``calibrate=True``.
    """
    found = [processor.calibration for processor in installed_processors(transformers_of(pipe))]
    if not found or found[0] is None:
        raise ValueError(
            f"psa_calibration: PSA is not calibrating on this {type(pipe).__name__}; call enable_psa(pipe, "
            "calibrate=True), and run it."
        )
    return found[0]


def _report_unknown(pipe: Any, models: list[nn.Module]) -> None:
    """Say which transformers stay dense, and why."""
    parts = {"model": pipe} if isinstance(pipe, nn.Module) else pipe.components
    sparse = {id(model) for model in models}
    strangers = {
        name: part
        for name, part in parts.items()
        if isinstance(part, nn.Module)
        and sparse.isdisjoint(map(id, part.modules()))
        and ("transformer" in name or "Transformer" in type(part).__name__)
    }
    for name, part in strangers.items():
        logger.warning(f"PSA leaves {name} ({type(part).__name__}) dense: {why_dense(part)}.")
    if not strangers and not models:
        raise ValueError(f"enable_psa: {no_transformer(pipe)}")
