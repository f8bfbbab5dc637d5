"""What psa-compare does: the dense videos, the sparse ones of every setting, measures, tables, the page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..integration import capture_level_masks
from ..integration.schedule import dense_steps
from ..metrics import write_video
from ..metrics.video_io import whole_file
from ..report.measures import difference_video, measure_clip
from ..report.run_report import report_of
from . import pipeline, plugin, run_record
from .comparison_files import finish  # noqa: F401  the last of the three parts of the work
from .comparison_job import Clip, Job, check_folders
from .denoise import Generated, generate
from .dense_store import DenseStore, dense_request, key_of
from .errors import CommandError, WrongUsageError
from .output import DENSE_VIDEO, answers
from .processes import Processes
from .settings import GenerationSettings

Say = Callable[[str], None]
MASKED_STEPS = 3  # of a run whose level masks are kept: the first, the middle and the last sparse step


@dataclass(frozen=True)
class Work:
    """What is missing of a clip.

    Attributes:
        key: Of its dense video in the store.
        settings: Names of the settings without a finished video.
    """

    clip: Clip
    key: str
    settings: list[str]


def plan(job: Job) -> list[Work]:
    """What is to be done, in the order of the clips; the last check of a job."""
    check_folders(job)
    work = []
    for clip in job.clips:
        key = key_of(dense_request(clip.prompt, job.settings_of(clip), job.identity))
        missing = [name for name in job.configs if _is_missing(job, clip, name, key)]
        if missing or not (job.folder_of(clip) / DENSE_VIDEO).is_file():
            work.append(Work(clip, key, missing))
    return work


def request_of(job: Job, clip: Clip, name: str, key: str) -> dict[str, Any]:
    """What a record must say to be the answer."""
    request = run_record.describe_request(clip.prompt, job.settings_of(clip, name), job.identity, compare=True)
    return {**request, "setting": name, "dense_key": key, "psa_diffusers": __version__}


def _is_missing(job: Job, clip: Clip, name: str, key: str) -> bool:
    folder = job.folder_of(clip)
    try:
        record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return True  # not written by this command, which writes whole files or none
    if not job.overwrite and not answers(record, request_of(job, clip, name, key)):
        raise WrongUsageError(
            f"{folder / name}.json is of another request, machine or version. Add --overwrite to replace it, or name "
            "another folder by --output."
        )
    if job.lpips_weights is not None and record.get("lpips") is None:
        return True  # a measure that could not be had then
    return job.overwrite or not (folder / f"{name}.mp4").is_file()


def run(job: Job, todo: list[Work], processes: Processes, *, say: Say, quiet: bool) -> None:
    """Make this process's share of what is missing; each video is on disk before the next one starts."""
    _announce(job, todo, processes, say)
    own = processes.share(todo)
    if not own:
        return
    maker = _Maker(job, DenseStore(job.cache), say, quiet)
    for number, work in enumerate(own, start=1):
        say(f'{number} of {len(own)}: {work.clip.name}, "{work.clip.prompt}"')
        maker.make(work)
    if processes.count > 1:
        say("Waiting for the other processes.")


def _announce(job: Job, todo: list[Work], processes: Processes, say: Say) -> None:
    if job.unknown_words:
        say(f"The model does not know these words and ignores them: {', '.join(job.unknown_words)}.")
    if job.dropped:
        say(f"Left out, as they say the same as another setting: {', '.join(job.dropped)}.")
    for remark in job.remarks:
        say(remark)
    wanted, missing = len(job.clips) * len(job.configs), sum(len(work.settings) for work in todo)
    if missing < wanted:
        say(f"{wanted - missing} of {wanted} sparse videos are there already.")
    if processes.count > 1 and todo:
        say(f"{processes.count} processes make {missing} videos; the first one shows its progress.")


class _Maker:
    """Makes clips with one pipeline, loaded when the first video is to be made."""

    def __init__(self, job: Job, store: DenseStore, say: Say, quiet: bool):
        self.job, self.store, self.say, self.quiet = job, store, say, quiet
        self._pipe: Any = None
        self._environment = run_record.describe_environment(job.settings, job.command)

    @property
    def pipe(self) -> Any:
        if self._pipe is None:
            settings = self.job.settings
            self._pipe = pipeline.load_pipeline(self.job.source, settings.dtype, settings.device, settings.offload)
            self._check_configs()
            self._warm_up()
        return self._pipe

    def _check_configs(self) -> None:
        """That every setting fits the model, before the first video is made."""
        for config in self.job.configs.values():
            plugin.switch_on(self._pipe, config)
        plugin.switch_off(self._pipe)

    def _warm_up(self) -> None:
        """One dense and one sparse step of every setting on a GPU: compiling kernels is no part of a latency."""
        import torch

        settings = self.job.settings
        if torch.device(settings.device).type != "cuda":
            return
        self.say("Warming up: two steps of every setting, which are not measured.")
        for config in self.job.configs.values():
            short = replace(settings, steps=2, config=replace(config, dense_warmup=0.5, dense_last=0.0))
            generate(self._pipe, self.job.clips[0].prompt, short, sparse=True, quiet=True)

    def make(self, work: Work) -> None:
        """The dense video, from the store or made anew, and the missing sparse ones."""
        folder = self.job.folder_of(work.clip)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            frames, dense = self._dense(work)
            with whole_file(folder / DENSE_VIDEO) as partial:
                shutil.copyfile(self.store.video(work.key), partial)
            for name in work.settings:
                self._sparse(work, name, folder, frames, dense)
        except OSError as error:
            raise CommandError(f"cannot write to {folder}: {error.strerror or error}. Disk full?") from error

    def _dense(self, work: Work) -> tuple[np.ndarray, dict[str, Any]]:
        found = self.store.load(work.key)
        if found is not None:
            return found
        settings = self.job.settings_of(work.clip)
        run = generate(self.pipe, work.clip.prompt, settings, sparse=False, quiet=self.quiet)
        request = dense_request(work.clip.prompt, settings, self.job.identity)
        return run.frames, self.store.save(work.key, request, run, settings.fps, self._environment)

    def _sparse(self, work: Work, name: str, folder: Path, reference: np.ndarray, dense: dict[str, Any]) -> None:
        clip, settings = work.clip, self.job.settings_of(work.clip, name)
        pipe = self.pipe
        steps = masked_steps(settings.steps, settings.config) if clip == self.job.clips[0] else ()
        with capture_level_masks(pipe, steps=steps) if steps else nullcontext() as recorder:
            run = generate(pipe, clip.prompt, settings, sparse=True, quiet=self.quiet, label=name)
        masks = recorder.read() if recorder else []
        measures = measure_clip(reference, run.frames, self.job.lpips_weights)
        record = {
            **request_of(self.job, clip, name, work.key),
            **self._environment,
            "processes": self.job.processes,
            **run_record.describe_run(run),
            **describe_parts(run),
            **run_record.describe_comparison(_as_run(dense, reference), run, measures),
            "notes": [*run.statistics.notes, *size_notes(run, settings)],
            "masks": [[mask.step, mask.layer, mask.head, mask.num_levels] for mask in masks],
        }
        (folder / f"{name}.json").unlink(missing_ok=True)  # the record comes last, and says that all is there
        write_video(folder / f"{name}.mp4", run.frames, settings.fps)
        write_video(folder / f"{name}.difference.mp4", difference_video(reference, run.frames), settings.fps)
        if masks:
            with whole_file(folder / f"{name}.masks.npz") as partial:
                np.savez_compressed(partial, **{str(i): mask.levels for i, mask in enumerate(masks)})
        run_record.write_json(folder / f"{name}.json", record)


def size_notes(run: Generated, settings: GenerationSettings) -> list[str]:
    """What to say where a pipeline rounds a size by itself."""
    made, asked = run.frames.shape[:3], (settings.num_frames, settings.height, settings.width)
    if made == asked:
        return []
    words = [f"{frames} frames of {width}x{height}" for frames, height, width in (made, asked)]
    return [f"The pipeline made {words[0]}, where {words[1]} were asked for."]


def masked_steps(steps: int, config: Any) -> list[int]:
    """The first, the middle and the last sparse step that make a plan."""
    first = dense_steps(config.dense_warmup, steps)
    planned = range(first, steps - dense_steps(config.dense_last, steps), config.refresh_every)
    places = np.linspace(0, len(planned) - 1, min(MASKED_STEPS, len(planned))).round().astype(int)
    return sorted({planned[place] for place in places})


def describe_parts(run: Generated) -> dict[str, Any]:
    """Where the time went, and the plans by step, layer and head."""
    report = report_of(run.statistics)
    return {
        "planning_seconds": run.statistics.planning_seconds,
        "attention_seconds": run.statistics.attention_seconds,
        "by_call": report.budgets(),
        "by_step": report.rows("step"),
        "by_layer": report.rows("layer"),
        "by_head": report.rows("head"),
    }


def _as_run(dense: dict[str, Any], frames: np.ndarray) -> Generated:
    """A stored dense video as the run that made it."""
    seconds = dense["seconds_of_steps"]
    return Generated(frames, ["dense"] * len(seconds), seconds, dense["seconds_total"])
