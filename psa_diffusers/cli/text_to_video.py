"""Text-to-video pipelines of any family: what a class takes and defaults to, read off it before its weights are."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .errors import WrongUsageError, first_line
from .pipeline import WAN, ModelSource, quiet_loading
from .settings import WAN_DEFAULTS, GenerationSettings

# Options by the names that pipelines have for them.
OPTIONS = {
    "negative_prompt": "--negative-prompt",
    "num_inference_steps": "--steps",
    "guidance_scale": "--guidance-scale",
    "height": "--height",
    "width": "--width",
    "num_frames": "--num-frames",
}
RATES = ("frame_rate", "fps")  # what pipelines call frames a second, where the model itself is told
STEP_END = "callback_on_step_end"


def is_wan(source: ModelSource) -> bool:
    """Whether sizes can be checked before the weights are read."""
    return source.index.get("_class_name") == WAN


def check_text_to_video(source: ModelSource) -> None:
    """Refuse what no video can be compared with: other inputs than text, and transformers that stay dense.

    Raises:
        WrongUsageError: the message says why.
    """
    taken = _taken(source)
    kind = source.index["_class_name"]
    first = next(iter(taken), None)
    if first != "prompt" or "num_frames" not in taken:
        raise WrongUsageError(
            f"psa-compare makes videos from text, but {source.name} is a {kind}, whose first input is {first!r}. "
            "Other pipelines: see 'In your own code' in the README."
        )
    _check_transformers(source)


def _taken(source: ModelSource) -> dict[str, inspect.Parameter]:
    """The arguments of a call of the pipeline, by name."""
    import diffusers

    kind = source.index.get("_class_name")
    with quiet_loading():  # it is imported now, and some remark on torchvision
        cls = getattr(diffusers, kind, None) if isinstance(kind, str) else None
    if cls is None:
        raise WrongUsageError(
            f"{source.name} is a {kind}, which diffusers {diffusers.__version__} does not have; a newer one may."
        )
    return arguments_of(cls.__call__)


def arguments_of(call: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Of a pipeline's ``__call__``."""
    return {name: value for name, value in inspect.signature(call).parameters.items() if name != "self"}


def _check_transformers(source: ModelSource) -> None:
    from ..integration.models import ROWS, known_transformers

    kinds = [part[1] for part in source.index.values() if isinstance(part, list) and len(part) == 2 and part[1]]
    if any(kind in known_transformers() for kind in kinds):
        return
    why = next((row.dense for row in ROWS if row.dense and any(kind in row.transformers for kind in kinds)), None)
    what = f"its transformer stays dense: {why}" if why else "it has none of the transformers that PSA knows"
    raise WrongUsageError(
        f"{source.name} ({source.index['_class_name']}) cannot be compared: {what}. The README lists the models."
    )


def video_defaults(source: ModelSource) -> dict[str, Any]:
    """Size, frames, steps, guidance and frame rate where the user names none: the model's, else the pipeline's own.

    None stands where neither has one.
    """
    if is_wan(source):
        return {**WAN_DEFAULTS, **source.defaults()}
    taken = _taken(source)
    own = {name: taken[name].default if name in taken else None for name in OPTIONS}
    rate = next((taken[name].default for name in RATES if name in taken), None)
    values = {**own, "fps": rate or WAN_DEFAULTS["fps"], **source.defaults()}
    return {**values, "negative_prompt": values["negative_prompt"] or ""}


def check_options(source: ModelSource, given: dict[str, Any], chosen: dict[str, Any]) -> None:
    """Refuse options that this pipeline does not take, and sizes that nobody named.

    Raises:
        WrongUsageError: the message names the options.
    """
    if is_wan(source):
        return  # takes all of them, and has a default for each
    taken, kind = _taken(source), source.index["_class_name"]
    extra = [OPTIONS[name] for name in given if name in OPTIONS and name not in taken]
    if extra:
        raise WrongUsageError(f"{kind} does not take {', '.join(extra)}; leave it out.")
    missing = [OPTIONS[name] for name in ("height", "width", "num_frames") if chosen[name] is None]
    if missing:
        raise WrongUsageError(
            f"{kind} has no default for {', '.join(missing)}: name it. The README's presets have the usual sizes."
        )


def call_arguments(pipe: Any, prompt: str, settings: GenerationSettings) -> dict[str, Any]:
    """Arguments of the pipeline's call for these settings: those that it takes, and no others."""
    taken = arguments_of(type(pipe).__call__)
    values = {
        "prompt": prompt,
        "negative_prompt": settings.negative_prompt or None,
        "height": settings.height,
        "width": settings.width,
        "num_frames": settings.num_frames,
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance_scale,
        **dict.fromkeys(RATES, settings.fps),
    }
    return {name: value for name, value in values.items() if name in taken and value is not None}


@contextmanager
def steps_watched(pipe: Any, on_step_end: Callable[..., dict]) -> Iterator[dict[str, Any]]:
    """What to add to the call's arguments so that ``on_step_end`` is called after each step.

    Pipelines without diffusers' callback are watched at their scheduler.
    """
    if STEP_END in arguments_of(type(pipe).__call__):
        yield {STEP_END: on_step_end}
        return
    native, made = pipe.scheduler.step, iter(range(10**9))

    def step(*given: Any, **named: Any) -> Any:
        result = native(*given, **named)
        on_step_end(pipe, next(made), given[1] if len(given) > 1 else named.get("timestep"), {})
        return result

    pipe.scheduler.step = step
    try:
        yield {}
    finally:
        del pipe.scheduler.step  # the class has it


@contextmanager
def pipeline_refusals(pipe: Any) -> Iterator[None]:
    """What the pipeline finds wrong with its arguments is wrong usage, in its own words."""
    try:
        yield
    except ValueError as error:
        if not any(frame.name == "check_inputs" for frame in traceback.extract_tb(error.__traceback__)):
            raise
        raise WrongUsageError(f"{type(pipe).__name__} refuses this: {first_line(error).rstrip('.')}.") from error
