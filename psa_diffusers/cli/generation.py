"""What psa-generate does: check everything, load the model, make the videos, write them down."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import PSAConfig
from ..metrics import write_video
from ..report.comparison import compare_videos, side_by_side
from . import machine as machines
from . import pipeline, run_record, settings, text_to_video
from .denoise import Generated, generate
from .errors import WrongUsageError
from .output import DENSE_VIDEO, SIDE_BY_SIDE, VIDEO, RunFolder, default_folder, plan_folders
from .processes import Processes, own_device

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A checked request: nothing in it can be refused any more but by the model's weights themselves."""

    source: pipeline.ModelSource
    prompts: list[str]
    requests: list[dict[str, Any]]
    settings: settings.GenerationSettings
    output: Path
    numbered: bool
    overwrite: bool
    compare: bool
    lpips_weights: Path | None
    command: str
    unknown_words: list[str]
    remark: str | None = None  # on the settings


def prepare(
    *,
    prompts: tuple[str | None, Path | None],
    attention: tuple[str | None, Path | None, float | None],
    model: str | None,
    video: dict[str, Any],
    machine: tuple[str | None, str | None, str],
    seed: int,
    compare: bool,
    lpips_weights: Path | None,
    output: Path | None,
    overwrite: bool,
    command: str,
    processes: Processes | None = None,
) -> Job:
    """Check every option, cheapest first, before any weights are read.

    Raises:
        WrongUsageError: an option cannot be met; the message says what to do.
    """
    if processes is not None and processes.count > 1:
        machine = _of_this_process(processes, prompts[1], machine)
    texts = settings.read_prompts(*prompts)
    config = settings.read_config(*attention)
    settings.check_lpips_weights(lpips_weights, compare)
    source = pipeline.find_model(model)
    unknown_words = settings.check_words(texts, source.vocabulary())
    resolved = resolve_settings(source, config, video, machine, seed, preset=attention[0])
    identity = source.identity()
    requests = [run_record.describe_request(text, resolved, identity, compare) for text in texts]
    numbered = prompts[1] is not None
    if output is None:
        output = Path("outputs") / prompts[1].stem if numbered else default_folder(texts[0], seed)
    return Job(
        source=source,
        prompts=texts,
        requests=requests,
        settings=resolved,
        output=output,
        numbered=numbered,
        overwrite=overwrite,
        compare=compare,
        lpips_weights=lpips_weights,
        command=command,
        unknown_words=unknown_words,
        remark=settings.remark_on_calibration(attention[1], resolved),
    )


def _of_this_process(processes: Processes, prompts_file: Path | None, machine: tuple) -> tuple:
    """The machine's options, with the device that the launcher gave to this process."""
    if prompts_file is None:
        raise WrongUsageError(
            "several processes share the prompts of a file: use --prompts-file, or start one process."
        )
    return own_device(processes, machine)


def resolve_settings(
    source: pipeline.ModelSource,
    config: PSAConfig,
    video: dict[str, Any],
    machine: tuple[str | None, str | None, str],
    seed: int,
    preset: str | None = None,
) -> settings.GenerationSettings:
    """What the user gave, else what the model says, else what its pipeline is meant for; all of it checked.

    Args:
        source: The model.
        config: How sparse steps are computed.
        video: Keys of ``WAN_DEFAULTS``; None where the user gave nothing.
        machine: Device, dtype (None picks) and offload.
        seed: Of the noise.
        preset: Name of the config, for the record.
    """
    given = {name: value for name, value in video.items() if value is not None}
    chosen = {**text_to_video.video_defaults(source), **given}
    text_to_video.check_options(source, given, chosen)
    device = machines.pick_device(machine[0])
    machines.check_offload(machine[2], device)
    resolved = settings.GenerationSettings(
        model=source.name,
        negative_prompt=chosen["negative_prompt"],
        steps=chosen["num_inference_steps"],
        guidance_scale=None if chosen["guidance_scale"] is None else float(chosen["guidance_scale"]),
        height=chosen["height"],
        width=chosen["width"],
        num_frames=chosen["num_frames"],
        fps=chosen["fps"],
        seed=seed,
        dtype=machines.pick_dtype(machine[1], device),
        device=device,
        offload=machine[2],
        config=config,
        preset=preset,
    )
    settings.check_numbers(resolved.steps, resolved.guidance_scale, resolved.fps, resolved.seed)
    if text_to_video.is_wan(source):  # other pipelines check it themselves
        settings.check_size(resolved.num_frames, resolved.height, resolved.width, *pipeline.size_rules(source))
    machines.check_backend(config.backend, device)
    return resolved


def plan(job: Job) -> list[RunFolder | None]:
    """A folder for every prompt, None for those that are finished already; the last check of a job."""
    return plan_folders(job.output, job.requests, job.numbered, job.overwrite)


def run(
    job: Job, folders: list[RunFolder | None], processes: Processes, *, say: Say, quiet: bool
) -> dict[int, dict[str, Any]]:
    """Make this process's share of the videos that are not there yet, one after the other.

    Each is on disk before the next one starts.

    Returns:
        The records, by the number of the prompt.
    """
    todo = [number for number, folder in enumerate(folders) if folder is not None]
    _announce(job, len(todo), processes, say)
    own = processes.share(todo)
    pipe, load_seconds = None, 0.0
    if own:
        start = time.perf_counter()
        pipe = pipeline.load_pipeline(job.source, job.settings.dtype, job.settings.device, job.settings.offload)
        load_seconds = time.perf_counter() - start
    records = {}
    for number in own:
        prompt, request, folder = job.prompts[number], job.requests[number], folders[number]
        if len(job.prompts) > 1:
            say(f'{folder.path}: "{prompt}"')
        records[number] = _make_one(job, pipe, prompt, request, folder, load_seconds, quiet)
    if processes.count > 1 and own:
        say("Waiting for the other processes.")
    return records


def _announce(job: Job, todo: int, processes: Processes, say: Say) -> None:
    if job.unknown_words:
        say(f"The model does not know these words and ignores them: {', '.join(job.unknown_words)}.")
    if job.remark:
        say(job.remark)
    if todo < len(job.prompts):
        done = len(job.prompts) - todo
        say(f"{done} of {len(job.prompts)} videos are there already; --overwrite makes them anew.")
    if processes.count > 1 and todo:
        say(f"{processes.count} processes make {todo} videos; the first one shows its progress.")


def _make_one(
    job: Job, pipe: Any, prompt: str, request: dict[str, Any], folder: RunFolder, load_seconds: float, quiet: bool
) -> dict[str, Any]:
    """One prompt: the sparse video and its record first, so that an interrupted comparison keeps them."""
    sparse = generate(pipe, prompt, job.settings, sparse=True, quiet=quiet)
    fps = job.settings.fps
    record = {
        "finished": False,
        **request,
        **run_record.describe_environment(job.settings, job.command),
        "seconds_loading": load_seconds,
        **run_record.describe_run(sparse),
        "folder": str(folder.path),
        "files": {"video": VIDEO},
    }
    folder.write_record(record)
    folder.write(VIDEO, lambda path: write_video(path, sparse.frames, fps))
    folder.remove(DENSE_VIDEO, SIDE_BY_SIDE)
    if job.compare:
        record.update(_compare(job, pipe, prompt, sparse, folder, quiet))
        record["files"] = {"video": VIDEO, "dense": DENSE_VIDEO, "side_by_side": SIDE_BY_SIDE}
    record["finished"] = True
    folder.write_record(record)
    return record


def _compare(job: Job, pipe: Any, prompt: str, sparse: Generated, folder: RunFolder, quiet: bool) -> dict[str, Any]:
    dense = generate(pipe, prompt, job.settings, sparse=False, quiet=quiet)
    fps = job.settings.fps
    folder.write(DENSE_VIDEO, lambda path: write_video(path, dense.frames, fps))
    budget = sparse.statistics.compute_budget_sparse
    label = "PSA" if budget is None else f"PSA, compute budget {budget:.2f}"
    both = side_by_side(dense.frames, sparse.frames, ("dense", label))
    folder.write(SIDE_BY_SIDE, lambda path: write_video(path, both, fps))
    closeness = compare_videos(dense.frames, sparse.frames, job.lpips_weights)
    return run_record.describe_comparison(dense, sparse, closeness)
