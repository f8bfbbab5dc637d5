"""What psa-generate is asked to do: options turned into checked settings, before anything heavy is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..config import PSAConfig
from ..demo import Vocabulary
from .errors import WrongUsageError, as_wrong_usage

# What diffusers' WanPipeline is meant for, where a model does not say otherwise.
WAN_DEFAULTS = {
    "num_frames": 81,
    "height": 480,
    "width": 832,
    "num_inference_steps": 50,
    "guidance_scale": 5.0,
    "fps": 16,
    "negative_prompt": "",
}
OFFLOADS = ("none", "model", "sequential")


@dataclass(frozen=True)
class GenerationSettings:
    """Everything that decides what a run computes. Two runs with equal settings give the same video."""

    model: str
    negative_prompt: str
    steps: int
    guidance_scale: float | None  # None = the pipeline takes none
    height: int
    width: int
    num_frames: int
    fps: float
    seed: int
    dtype: str
    device: str
    offload: str
    config: PSAConfig
    preset: str | None = None

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        values["config"] = self.config.to_dict()
        return values


def read_prompts(prompt: str | None, prompts_file: Path | None) -> list[str]:
    """The prompts: the one given, or one a line of the file (blank lines and lines that start with # are left out)."""
    if (prompt is None) == (prompts_file is None):
        raise WrongUsageError('give either --prompt "..." or --prompts-file FILE.')
    if prompt is not None:
        if not prompt.strip():
            raise WrongUsageError('the prompt is empty; say what to draw, e.g. --prompt "a red circle".')
        return [prompt.strip()]
    try:
        lines = prompts_file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise WrongUsageError(f"there is no prompts file {prompts_file}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise WrongUsageError(f"cannot read prompts from {prompts_file}: it must be a text file in UTF-8.") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not prompts:
        raise WrongUsageError(f"{prompts_file} holds no prompt; write one a line.")
    return prompts


def read_config(preset: str | None, config_file: Path | None, compute_budget: float | None) -> PSAConfig:
    """The PSA settings: a preset or a file (else the default), with the compute budget on top."""
    if preset is not None and config_file is not None:
        raise WrongUsageError("give --preset or --config, not both.")
    if compute_budget is not None and not 0 < compute_budget <= 1:
        raise WrongUsageError(f"--compute-budget must be in (0, 1], dense attention being 1, but is {compute_budget}.")
    with as_wrong_usage(ValueError):
        if config_file is not None:
            try:
                config = PSAConfig.load(config_file)
            except OSError as error:
                raise WrongUsageError(f"cannot read the config file {config_file}: {error.strerror}.") from error
        else:
            config = PSAConfig.preset(preset or "default")
    if compute_budget is None:
        return config
    if config.rule != "budget":
        source = f"preset {preset}" if preset else f"{config_file}"
        raise WrongUsageError(
            f"--compute-budget needs rule: budget, but {source} has rule: {config.rule}, whose budget follows from "
            "its own settings. Leave one of the two out."
        )
    if config.budget_schedule is not None:
        raise WrongUsageError(
            f"--compute-budget is one budget for all steps, but {f'preset {preset}' if preset else config_file} has a "
            "budget_schedule. Leave one of the two out."
        )
    with as_wrong_usage(ValueError):
        return replace(config, compute_budget=compute_budget)


def remark_on_calibration(config_file: Path | None, settings: GenerationSettings) -> str | None:
    """What to say where settings were calibrated for another size or number of steps than this run's."""
    values = yaml.safe_load(config_file.read_text(encoding="utf-8")) if config_file is not None else None
    made_for = values.get("calibrated") if isinstance(values, dict) else None
    if not isinstance(made_for, dict):
        return None
    names = ("num_frames", "height", "width", "steps")
    other = [name for name in names if made_for.get(name) not in (None, getattr(settings, name))]
    if not other:
        return None
    given, own = (", ".join(f"{name} {of(name)}" for name in other) for of in (made_for.get, settings.__getattribute__))
    return f"{config_file} was calibrated for {given}; this run has {own}."


def check_words(prompts: list[str], vocabulary: Vocabulary | None) -> list[str]:
    """Refuse prompts of which the model knows no word; return the other unknown words, to warn about."""
    if vocabulary is None:
        return []
    ignored: list[str] = []
    for prompt in prompts:
        known, unknown = vocabulary.split(prompt)
        if not known:
            listed = f"unknown: {', '.join(unknown)}" if unknown else "none of its words says what to draw"
            raise WrongUsageError(
                f'this model knows no word of "{prompt}" ({listed}). It draws {vocabulary.describe()}.\n'
                "For anything else use a full model: --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
            )
        ignored += [word for word in unknown if word not in ignored]
    return ignored


def check_lpips_weights(path: Path | None, compare: bool) -> None:
    """Refuse weights that are not there, or that nothing would use."""
    if path is not None and not compare:
        raise WrongUsageError("--lpips-weights is for --compare; add it, or leave both out.")
    if path is not None and not path.is_file():
        raise WrongUsageError(f"there is no weights file {path}.")


def check_numbers(steps: int, guidance_scale: float | None, fps: float, seed: int) -> None:
    """Refuse values that no model takes."""
    rules = [
        ("--steps", steps, "at least 1", steps >= 1),
        ("--guidance-scale", guidance_scale, "0 or more", guidance_scale is None or 0 <= guidance_scale < float("inf")),
        ("--fps", fps, "above 0 and at most 240", 0 < fps <= 240),
        ("--seed", seed, "between 0 and 2^63 - 1", 0 <= seed < 2**63),
    ]
    for name, value, rule, holds in rules:
        if not holds:
            raise WrongUsageError(f"{name} must be {rule}, but is {value}.")


def check_size(num_frames: int, height: int, width: int, frame_step: int, multiple: tuple[int, int]) -> None:
    """Refuse sizes that the model would round by itself, and say the nearest that it takes.

    Args:
        num_frames, height, width: The size asked for.
        frame_step: The model makes ``frame_step * k + 1`` frames.
        multiple: Height and width must be multiples of these.
    """
    if num_frames < 1 or (num_frames - 1) % frame_step:
        nearest = _nearest(num_frames - 1, frame_step, least=0)
        options = " or ".join(str(value + 1) for value in nearest)
        raise WrongUsageError(
            f"--num-frames must be {frame_step} k + 1 for this model, but is {num_frames}; the nearest: {options}."
        )
    for name, value, step in (("--height", height, multiple[0]), ("--width", width, multiple[1])):
        if value < step or value % step:
            options = " or ".join(str(number) for number in _nearest(value, step, least=step))
            raise WrongUsageError(
                f"{name} must be a multiple of {step} for this model, but is {value}; the nearest: {options}."
            )


def _nearest(value: int, step: int, least: int) -> list[int]:
    below = value // step * step
    return sorted({max(below, least), max(below + step, least)}) if value >= least else [least]
