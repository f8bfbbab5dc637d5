"""What psa-compare is asked to do: options turned into a checked job, before anything heavy is loaded."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import PSAConfig
from ..prompt_sets import prompt_set
from . import pipeline, run_record, settings
from .errors import WrongUsageError, as_wrong_usage
from .generation import resolve_settings
from .output import check_writable
from .processes import Processes, own_device
from .settings import GenerationSettings
from .text_to_video import check_text_to_video
from .vbench import check_names

DENSE = "dense"


@dataclass(frozen=True)
class Clip:
    """One prompt with one seed: a dense video, and a sparse one for each setting."""

    number: int
    prompt: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.number:03d}-seed{self.seed}"


@dataclass(frozen=True)
class Job:
    """A checked request.

    Attributes:
        settings: Of the video; its config is not read.
        configs: PSA configs by name, in the order of the tables.
        identity: What tells the model's weights from others.
        dropped: Names left out, as they say the same as another.
    """

    source: pipeline.ModelSource
    clips: list[Clip]
    settings: GenerationSettings
    configs: dict[str, PSAConfig]
    identity: dict[str, str]
    output: Path
    cache: Path
    vbench: Path | None
    lpips_weights: Path | None
    confidence: float
    overwrite: bool
    command: str
    unknown_words: list[str]
    dropped: list[str]
    remarks: list[str]  # on the settings
    processes: int

    def settings_of(self, clip: Clip, name: str | None = None) -> GenerationSettings:
        """Of a clip, by the setting of this name (None = dense)."""
        settings = replace(self.settings, seed=clip.seed)
        return settings if name is None else replace(settings, config=self.configs[name])

    def folder_of(self, clip: Clip) -> Path:
        return self.output / "videos" / clip.name


def prepare(
    *,
    prompts: tuple[str | None, Path | None, str | None, int | None],
    seeds: str,
    attention: tuple[str | None, list[Path], str | None],
    model: str | None,
    video: dict[str, Any],
    machine: tuple[str | None, str | None, str],
    lpips_weights: Path | None,
    folders: tuple[Path, Path | None, Path | None],
    confidence: float,
    overwrite: bool,
    command: str,
    processes: Processes,
) -> Job:
    """Check every option, cheapest first, before any weights are read.

    Raises:
        WrongUsageError: an option cannot be met; the message says what to do.
    """
    if processes.count > 1:
        machine = own_device(processes, machine)
        words = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(processes.count)]
        command = shlex.join([*words, "-m", "psa_diffusers.cli.compare", *shlex.split(command)[1:]])
    texts = read_prompts(*prompts, bundled=model in (None, pipeline.BUNDLED))
    numbers = read_seeds(seeds)
    configs, dropped = read_configs(*attention)
    settings.check_lpips_weights(lpips_weights, compare=True)
    if not 0.5 <= confidence < 1:
        raise WrongUsageError(f"--confidence must be at least 0.5 and below 1, but is {confidence}.")
    if folders[2] is not None:
        check_names(texts, len(numbers))
    source = pipeline.find_model(model, any_pipeline=True)
    check_text_to_video(source)
    unknown_words = settings.check_words(texts, source.vocabulary())
    resolved = [resolve_settings(source, config, video, machine, numbers[0]) for config in configs.values()]
    for seed in numbers:
        settings.check_numbers(resolved[0].steps, resolved[0].guidance_scale, resolved[0].fps, seed)
    _check_measurable(resolved[0])
    output, cache, vbench = folders
    return Job(
        source=source,
        clips=[Clip(number, text, seed) for number, text in enumerate(texts, start=1) for seed in numbers],
        settings=resolved[0],
        configs=configs,
        identity=identify(source),
        output=output,
        cache=cache or output.parent / "dense-cache",
        vbench=vbench,
        lpips_weights=lpips_weights,
        confidence=confidence,
        overwrite=overwrite,
        command=command,
        unknown_words=unknown_words,
        dropped=dropped,
        remarks=[text for file in attention[1] if (text := settings.remark_on_calibration(file, resolved[0]))],
        processes=processes.count,
    )


def read_prompts(
    prompt: str | None, file: Path | None, name: str | None, limit: int | None, *, bundled: bool
) -> list[str]:
    """The prompts: the one given, a file's or a set's (default: the set for this kind of model), cut to ``limit``."""
    if sum(given is not None for given in (prompt, file, name)) > 1:
        raise WrongUsageError("give one of --prompt, --prompts-file and --prompt-set.")
    if prompt is None and file is None:
        with as_wrong_usage(ValueError):
            file = prompt_set(name or ("shapes" if bundled else "scenes"))
    if limit is not None and limit < 1:
        raise WrongUsageError(f"--limit must be at least 1, but is {limit}.")
    texts = settings.read_prompts(prompt, file)
    twice = sorted({text for text in texts if texts.count(text) > 1})
    if twice:
        raise WrongUsageError(f'the prompt "{twice[0]}" is there more than once; it would count more than once.')
    return texts[:limit]


def read_seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise WrongUsageError(f"--seeds must be whole numbers separated by commas, but is {text!r}.") from error
    if len(set(seeds)) < len(seeds):
        raise WrongUsageError(f"--seeds must differ, but are {text}.")
    return seeds


def read_configs(presets: str | None, files: list[Path], budgets: str | None) -> tuple[dict[str, PSAConfig], list[str]]:
    """The settings to compare, by name: presets, files, and the default at some budgets; else the default.

    Returns:
        The configs, and the names of those left out because they say the same as one before.
    """
    asked: list[tuple[str, PSAConfig]] = []
    for name in presets.split(",") if presets else []:
        asked.append((name.strip(), settings.read_config(name.strip(), None, None)))
    for file in files:
        asked.append((re.sub(r"[^\w.+-]+", "-", file.stem), settings.read_config(None, file, None)))
    for budget in _budgets(budgets) if budgets else []:
        asked.append((f"budget-{budget:g}", settings.read_config(None, None, budget)))
    configs: dict[str, PSAConfig] = {}
    dropped = []
    for name, config in asked or [("default", settings.read_config(None, None, None))]:
        if (name in configs and configs[name] != config) or name == DENSE:
            raise WrongUsageError(f"two settings would be called {name}: rename the config file.")
        if config in configs.values():
            dropped.append(name)
        else:
            configs[name] = config
    return configs, dropped


def _budgets(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise WrongUsageError(f"--compute-budget must be numbers separated by commas, but is {text!r}.") from error


def _check_measurable(resolved: GenerationSettings) -> None:
    if min(resolved.height, resolved.width) < 11:
        raise WrongUsageError("SSIM needs at least 11 x 11 pixels: raise --height and --width.")


def identify(source: pipeline.ModelSource) -> dict[str, str]:
    """The model's identity; of a folder too large to be hashed by its files' names, sizes and dates."""
    identity = source.identity()
    if source.folder is not None and "weights_sha256" not in identity:
        files = sorted(source.folder.rglob("*.safetensors"))
        facts = [f"{file.relative_to(source.folder)} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
        identity["files"] = run_record.digest("\n".join(facts))
    return identity


def check_folders(job: Job) -> None:
    """Prove that everything can be written where it belongs."""
    for folder in (job.output, job.cache, *([job.vbench] if job.vbench else [])):
        check_writable(folder)
