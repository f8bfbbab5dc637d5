"""Which transformers a pipeline has that can be sparse, and what to say where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .models import ModelRow, find_row, known_transformers


def transformers_of(pipe_or_model: Any) -> list[nn.Module]:
    """The transformers of a pipeline (or the model itself) that can be sparse, each once.

    Raises:
        TypeError: it is neither a pipeline nor a model.
    """
    return [model for model, row in _known_models(pipe_or_model) if not row.dense]


def component_names(pipe: Any) -> dict[int, str]:
    """By ``id`` of each known transformer its name in the pipeline; empty where there is no pipeline."""
    parts = getattr(pipe, "components", {}).items()
    found = ((name, known_in(part)) for name, part in parts if isinstance(part, nn.Module))
    return {id(pair[0]): name for name, pair in found if pair is not None}


def no_transformer(pipe_or_model: Any) -> str:
    """What to say of a pipeline or model in which there is nothing to make sparse."""
    dense = [f"{type(model).__name__} stays dense: {row.dense}." for model, row in _known_models(pipe_or_model)]
    if dense:
        return " ".join(dense)
    parts = [pipe_or_model] if isinstance(pipe_or_model, nn.Module) else pipe_or_model.components.values()
    models = ", ".join(type(part).__name__ for part in parts if isinstance(part, nn.Module))
    return (
        f"pipe must have a video transformer that PSA knows, but {type(pipe_or_model).__name__} has "
        f"{models or 'no model'}. Use it as it is, without PSA. Known: {', '.join(known_transformers())}."
    )


def why_dense(part: nn.Module) -> str:
    """Why a transformer stays dense."""
    row = known_in(part)[1] if known_in(part) else None
    return row.dense if row else f"PSA does not know this model. It knows {', '.join(known_transformers())}"


def known_in(module: nn.Module) -> tuple[nn.Module, ModelRow] | None:
    """The module, or what it wraps (torch.compile, PEFT, DDP), if it has a row; with the row."""
    return next(((part, row) for part in module.modules() if (row := find_row(part)) is not None), None)


def _known_models(pipe_or_model: Any) -> list[tuple[nn.Module, ModelRow]]:
    """The models that have a row, each once, with it."""
    if isinstance(pipe_or_model, nn.Module):
        components = [pipe_or_model]
    elif isinstance(getattr(pipe_or_model, "components", None), Mapping):
        components = list(pipe_or_model.components.values())
    else:
        raise TypeError(f"PSA needs a diffusers pipeline or a transformer, but got a {type(pipe_or_model).__name__}.")
    found = [known_in(module) for module in components if isinstance(module, nn.Module)]
    return list({id(pair[0]): pair for pair in found if pair is not None}.values())
