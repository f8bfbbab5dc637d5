"""Find a model, see what sizes it takes, and load it, with errors that say what is wrong with it."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import demo
from .errors import CommandError, WrongUsageError, first_line
from .model_files import INDEX_FILES, compression, read_index

BUNDLED = "bundled"
WAN = "WanPipeline"
HASHED_MODEL_BYTES = 200 * 2**20  # folders up to this size are identified by the hash of their weights


@dataclass(frozen=True)
class ModelSource:
    """A model in the diffusers layout: on disk, or on the Hugging Face Hub.

    Attributes:
        name: ``"bundled"``, or what the user gave.
        location: Folder, or Hub id: what ``from_pretrained`` takes.
        index: Content of its ``model_index.json``.
    """

    name: str
    location: str
    index: dict[str, Any]

    @property
    def folder(self) -> Path | None:
        """The folder of a model on disk; None for one on the Hub."""
        path = Path(self.location)
        return path if path.is_dir() else None

    def read_config(self, component: str) -> dict[str, Any]:
        """The ``config.json`` of a component, without loading its weights."""
        path = self.folder / component / "config.json" if self.folder else None
        try:
            if path is None:
                path = Path(_download(self.location, f"{component}/config.json"))
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise broken_model(self.name, f"{component}/config.json is missing or cannot be read", error) from error
        if not isinstance(values, dict):
            raise broken_model(self.name, f"{component}/config.json holds no settings")
        return values

    def defaults(self) -> dict[str, Any]:
        """How the model is meant to be run, where it says so itself."""
        return self._read_extra(demo.model_defaults) or {}

    def vocabulary(self) -> demo.Vocabulary | None:
        """The words it knows, where it has a small vocabulary of its own."""
        return self._read_extra(demo.model_vocabulary)

    def _read_extra(self, read: Callable[[Path], Any]) -> Any:
        try:
            return read(self.folder) if self.folder else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise broken_model(
                self.name, f"{getattr(error, 'filename', None) or 'a file'} cannot be read", error
            ) from error

    def identity(self) -> dict[str, str]:
        """What tells this model's weights from others: the Hub's commit, or a hash of the weights on disk."""
        values = {"name": self.name}
        if self.folder is None:
            snapshot = Path(_download(self.location, "model_index.json")).parent
            return {**values, "revision": snapshot.name}
        try:
            weights = sorted(self.folder.rglob("*.safetensors"))
            if sum(file.stat().st_size for file in weights) <= HASHED_MODEL_BYTES:
                values["weights_sha256"] = _digest_of(weights, self.folder)
        except OSError as error:
            raise broken_model(self.name, "its weights cannot be read", error) from error
        return values


def _digest_of(files: list[Path], folder: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def broken_model(name: str, what: str, error: BaseException | None = None) -> WrongUsageError:
    """The error for a model of which something is missing or damaged: what, and how it was found out."""
    detail = f" ({first_line(error, 120)})" if error is not None else ""
    return WrongUsageError(
        f"the model {name} is not complete or is corrupt: {what}{detail}.\nDownload or copy it again, or name another."
    )


def _download(model: str, file: str) -> str:
    from huggingface_hub import hf_hub_download

    return hf_hub_download(model, file)


def find_model(name: str | None, any_pipeline: bool = False) -> ModelSource:
    """The model that the user named: a folder, a Hub id, or None for the bundled one.

    Raises:
        WrongUsageError: there is no such model, or its folder is broken, or (unless ``any_pipeline``) it is not a
            text-to-video Wan model.
    """
    source = _find(name)
    return source if any_pipeline else _checked(source)


def _find(name: str | None) -> ModelSource:
    if name is None or name == BUNDLED:
        try:
            folder = demo.model_folder()
        except FileNotFoundError as error:
            raise CommandError(str(error)) from error
        return _local_model(BUNDLED, folder)
    path = Path(name).expanduser()
    if path.is_dir():
        return _local_model(name, path)
    if path.exists():
        raise WrongUsageError(f"{name} is a file; --model takes a folder in the diffusers layout, or a Hub id.")
    if name.startswith((".", "~", "/")) or name.count("/") != 1:
        raise WrongUsageError(
            f"there is no model folder {name}. Give a folder, or a Hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    return _hub_model(name)


def _local_model(name: str, folder: Path) -> ModelSource:
    file = next((folder / index for index in INDEX_FILES if (folder / index).is_file()), None)
    if file is None:
        raise WrongUsageError(f"{folder} is not a diffusers model folder: it has no model_index.json.")
    try:
        index = read_index(file)
        components = [key for key, value in index.items() if isinstance(value, list) and value[0] is not None]
    except (OSError, ValueError, AttributeError, IndexError) as error:
        raise broken_model(name, f"{file.name} cannot be read", error) from error
    missing = [component for component in components if not (folder / component).is_dir()]
    if missing and file.name == INDEX_FILES[0]:  # a modular pipeline may have its parts elsewhere
        raise broken_model(name, f"{folder} has no folder {', '.join(missing)}")
    return ModelSource(name, str(folder), index)


def _hub_index(name: str) -> Path:
    from huggingface_hub import errors

    regular, modular = INDEX_FILES
    try:
        return Path(_download(name, regular))
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise
        try:
            return Path(_download(name, modular))
        except errors.EntryNotFoundError:
            raise error from None


def _hub_model(name: str) -> ModelSource:
    try:
        index = read_index(_hub_index(name))
    except Exception as error:  # no such model, no connection, offline mode, a server's failure
        advice = "Check the spelling (a known one: Wan-AI/Wan2.1-T2V-1.3B-Diffusers), or give a folder."
        raise WrongUsageError(f"{_hub_failure(name, error)} {advice}") from error
    return ModelSource(name, name, index)


def _hub_failure(name: str, error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return f"there is no model {name} on the Hugging Face Hub, and no such folder here."
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return f"{name} on the Hugging Face Hub is not a diffusers model: it has no model_index.json."
    reason = type(error).__name__
    return f"there is no folder {name} here, and the Hugging Face Hub cannot be asked for it ({reason})."


def _checked(source: ModelSource) -> ModelSource:
    kind = source.index.get("_class_name")
    if kind != WAN:
        raise WrongUsageError(
            f"psa-generate makes videos from text by Wan models ({WAN}), but {source.name} is a {kind}. "
            "Other pipelines: see 'In your own code' in the README."
        )
    return source


def size_rules(source: ModelSource) -> tuple[int, tuple[int, int]]:
    """``frame_step`` (the model makes ``frame_step * k + 1`` frames) and the multiples of height and width."""
    vae = source.read_config("vae")
    has_first = source.index.get("transformer", [None])[0] is not None
    patch = source.read_config("transformer" if has_first else "transformer_2").get("patch_size", (1, 2, 2))
    patch = patch if isinstance(patch, list | tuple) else (1, patch, patch)
    try:
        frame_step, spatial = compression(vae)
        # Pipelines ask for multiples of 16 whatever the model's own step is.
        return frame_step, (math.lcm(16, spatial * patch[1]), math.lcm(16, spatial * patch[2]))
    except (TypeError, IndexError, KeyError) as error:
        raise broken_model(source.name, "the config.json of its VAE or transformer names no sizes", error) from error


def load_pipeline(source: ModelSource, dtype: str, device: str, offload: str = "none"):
    """The pipeline, ready to run on the device; Wan's VAE in float32, as its authors advise.

    Raises:
        WrongUsageError: the model's files are incomplete or corrupt.
        CommandError: it does not fit in memory.
    """
    import diffusers
    import torch
    from packaging.version import Version

    dtypes = {"default": getattr(torch, dtype)}
    if source.index.get("_class_name") == WAN:  # others hand it latents of the dtype that everything has
        dtypes["vae"] = torch.float32
    name = "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"
    try:
        with quiet_loading():
            pipe = diffusers.DiffusionPipeline.from_pretrained(source.location, **{name: dtypes})
    except torch.OutOfMemoryError as error:
        raise CommandError(f"{source.name} does not fit in memory; try --offload or --dtype.") from error
    except ImportError as error:
        raise CommandError(f"loading {source.name} needs a package that is missing: {first_line(error)}") from error
    except Exception as error:  # every library below has its own kinds for a bad file
        raise broken_model(source.name, "loading failed", error) from error
    _check_all_weights(pipe, source)
    pipe.set_progress_bar_config(disable=True)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        with quiet_loading():  # it warns of float16 on a CPU, which was tried out before
            pipe.to(device)
    return pipe


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No bars and no remarks of the libraries while loading: psa-generate has its own bar, and its own errors."""
    import diffusers
    import transformers

    loggers = [library.utils.logging for library in (diffusers, transformers)]
    levels, disabled = [logger.get_verbosity() for logger in loggers], logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # what these two import has loggers of its own
    for logger in loggers:
        logger.disable_progress_bar()
        logger.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        for logger, level in zip(loggers, levels, strict=True):
            logger.enable_progress_bar()
            logger.set_verbosity(level)


def _check_all_weights(pipe: Any, source: ModelSource) -> None:
    """Refuse a model with weights missing from its files: the libraries leave those empty, or random without a word."""
    import torch

    for name, module in pipe.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        missing = [key for key, value in module.named_parameters() if value.is_meta]
        missing = missing or _absent_from_files(module, source.folder / name if source.folder else None)
        if missing:
            raise broken_model(source.name, f"{len(missing)} weights of {name} are missing, e.g. {missing[0]}")


def _absent_from_files(module: Any, folder: Path | None) -> list[str]:
    """Parameters that no file in the folder has under any of their names (tied ones have several)."""
    from safetensors import safe_open

    stored: set[str] = set()
    for file in folder.glob("*.safetensors") if folder else ():
        with safe_open(file, framework="pt") as weights:
            stored.update(weights.keys())
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    absent = [aliases[0] for aliases in names.values() if stored.isdisjoint(aliases)]
    # Files whose names follow another scheme (converted while loading) cannot be judged by names.
    return absent if len(absent) < len(names) / 2 else []
