"""The files at the end of a comparison: tables, compare.json, the page, the export for VBench."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..metrics.video_io import whole_file
from ..report.totals import DENSE, clip_row, dense_row, flat, frame_rows, totals
from . import run_record, vbench
from .comparison_job import Clip, Job
from .errors import CommandError

RESULTS, PAGE = "compare.json", "report.html"


def finish(job: Job, *, say: Callable[[str], None]) -> dict[str, Any]:
    """Read all records, write everything else, and return the content of ``compare.json``."""
    records = {(clip.name, name): _record(job, clip, name) for clip in job.clips for name in job.configs}
    rows = [dense_row(clip.name, records[clip.name, next(iter(job.configs))]) for clip in job.clips]
    rows += [clip_row(clip.name, name, records[clip.name, name]) for name in job.configs for clip in job.clips]
    results = {
        "command": job.command,
        "prompts": list(dict.fromkeys(clip.prompt for clip in job.clips)),
        "seeds": list(dict.fromkeys(clip.seed for clip in job.clips)),
        "video": {name: value for name, value in job.settings.to_dict().items() if name not in ("config", "preset")},
        "model": job.identity,
        "settings": {name: config.to_dict() for name, config in job.configs.items()},
        "confidence": job.confidence,
        "totals": totals(rows, job.confidence),
        "notes": _notes(job, list(records.values())),
        "made_by": _makers(records.values()),
        **run_record.describe_environment(job.settings, job.command),
        "processes": job.processes,
        "folder": str(job.output),
        "clips": rows,
    }
    try:
        _write(job, results, records)
    except OSError as error:
        raise CommandError(f"cannot write to {job.output}: {error.strerror or error}. Disk full?") from error
    if job.vbench is not None:
        say(f"{_export(job)} videos for VBench in {job.vbench}.")
    return results


def _write(job: Job, results: dict[str, Any], records: dict[tuple[str, str], dict[str, Any]]) -> None:
    frames = (row for (clip, name), record in records.items() for row in frame_rows(clip, name, record))
    write_csv(job.output / "totals.csv", [flat(entry) for entry in results["totals"]])
    write_csv(job.output / "clips.csv", results["clips"])
    write_csv(job.output / "frames.csv", list(frames))
    run_record.write_json(job.output / RESULTS, results)
    if _missing_packages():
        return
    from ..report.page import render

    text = render(results, records, job.output)
    with whole_file(job.output / PAGE) as partial:
        partial.write_text(text, encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write whole or not at all; a row may lack columns, and None is an empty cell."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n", restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{item:.6g}" if isinstance(item, float) else item for name, item in row.items()})


def _missing_packages() -> list[str]:
    """What the page needs and is not installed."""
    return [name for name in ("jinja2", "matplotlib") if importlib.util.find_spec(name) is None]


def _record(job: Job, clip: Clip, name: str) -> dict[str, Any]:
    return json.loads((job.folder_of(clip) / f"{name}.json").read_text(encoding="utf-8"))


def _notes(job: Job, records: list[dict[str, Any]]) -> list[str]:
    """What has to be said beside the figures, each once."""
    notes = [*job.remarks, *(note for record in records for note in record["notes"])]
    if _missing_packages():
        missing = " and ".join(_missing_packages())
        notes.append(f"No {PAGE}: {missing} missing. pip install 'psa-diffusers[report]', and the same command again.")
    for record in records:
        notes += [f"{record['setting']}: calls stayed dense: {item['reason']}." for item in record["fallbacks"]]
        if record["lpips"] is None:
            notes.append(f"No LPIPS: {record['lpips_reason']}")
    if len(_makers(records)) > 1:
        notes.append("The videos were made by more than one version of the package or its libraries: see made_by.")
    if any(record["processes"] > 1 and str(record["device"]).startswith("cpu") for record in records):
        notes.append("Several processes shared the CPU, so that the times are of a busy machine.")
    return list(dict.fromkeys(notes))


def _makers(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Versions, machine and threads that made the videos, each once."""
    makers = []
    for record in records:
        maker = {name: record[name] for name in ("versions", "device_name", "threads", "processes")}
        if maker not in makers:
            makers.append(maker)
    return makers


def _export(job: Job) -> int:
    count = 0
    indices = {seed: index for index, seed in enumerate(dict.fromkeys(clip.seed for clip in job.clips))}
    for name in (DENSE, *job.configs):
        videos = [(clip.prompt, indices[clip.seed], job.folder_of(clip) / f"{name}.mp4") for clip in job.clips]
        count += vbench.export(job.vbench, name, videos)
    return count
