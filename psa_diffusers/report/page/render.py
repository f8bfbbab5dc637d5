"""From the results of a comparison to the text of its page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..measures import FULL_SCALE, UNITS, heat_colours
from ..totals import DENSE
from . import figures, masks
from .svg import COLOURS, page_style, to_svg

Records = Mapping[tuple[str, str], Mapping[str, Any]]


def render(results: Mapping[str, Any], records: Records, folder: Path) -> str:
    """The page.

    Args:
        results: Content of ``compare.json``.
        records: Of the sparse videos, by (clip, setting).
        folder: Of the comparison, with the videos and the level masks.

    Raises:
        ImportError: jinja2 or matplotlib is missing.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("psa_diffusers.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "seconds": lambda value: f"{value:.3g}"}
    here = Path(__file__).parent
    return environment.get_template("page.html.j2").render(
        results=results,
        style=(here / "page.css").read_text(encoding="utf-8"),
        script=(here / "page.js").read_text(encoding="utf-8"),
        data=player_data(results, records),
        settings=list(results["settings"]),
        rows=table_rows(results),
        figures=draw(results, records),
        time_rows=time_of(results, records),
        masks=level_masks(results, records, folder),
        parts=figures.PARTS,
        heat=", ".join(f"rgb{tuple(int(c) for c in colour)}" for colour in heat_colours()[::51]),
        full_scale=FULL_SCALE,
        settings_text={name: json.dumps(config, indent=2) for name, config in results["settings"].items()},
        colours=COLOURS,
    )


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def player_data(results: Mapping[str, Any], records: Records) -> dict[str, Any]:
    """What the script reads: clips, their measures, and the PSNR of their frames to a hundredth of a dB."""
    rows = [row for row in results["clips"] if row["setting"] == DENSE]
    clips = []
    for row in rows:
        measures = {}
        for name in results["settings"]:
            record = records[row["clip"], name]
            kept = {key: record[key] for key in ("psnr", "identical", "ssim", "lpips", "flicker")}
            frames = [None if value is None else round(value, 2) for value in record["frames"]["psnr"]]
            measures[name] = {**kept, "frames": frames}
        clips.append({"name": row["clip"], "prompt": row["prompt"], "seed": row["seed"], "settings": measures})
    return {
        "fps": results["video"]["fps"],
        # Not the number that was asked for: some pipelines round it.
        "frames": max(len(record["frames"]["psnr"]) for record in records.values()),
        "settings": list(results["settings"]),
        "clips": clips,
        "colours": COLOURS,
    }


def table_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The totals, dense first."""
    return [dict(entry) for entry in results["totals"]]


def draw(results: Mapping[str, Any], records: Records) -> dict[str, str]:
    """The figures as SVG, by name."""
    sparse = [entry for entry in results["totals"] if entry["setting"] != DENSE]
    budgets = [name for name, config in results["settings"].items() if _is_on_curve(config, results["settings"])]
    drawn = {}
    with page_style():
        for measure in ("psnr", "ssim", "lpips", "flicker"):
            if any(entry[measure]["value"] is not None for entry in sparse):
                told = "; ".join(
                    f"{entry['setting']}: {_number(entry[measure]['value'], 3)} at {budget:.3f}"
                    for entry in sparse
                    if (budget := entry["compute_budget_sparse"]["value"]) is not None
                )
                figure = figures.plot_fidelity(sparse, measure, budgets)
                drawn[measure] = to_svg(figure, measure, f"{UNITS[measure]} against compute budget. {told}")
        curves = {name: _mean_frames([r for (_, s), r in records.items() if s == name]) for name in results["settings"]}
        drawn["frames"] = to_svg(figures.plot_frames(curves), "frames", "Mean PSNR of every frame, a line a setting")
        drawn["time"] = to_svg(
            figures.plot_time(time_of(results, records)), "time", "Seconds of a clip by part; the table below has them"
        )
        for number, name in enumerate(results["settings"]):
            record = next(record for (_, setting), record in records.items() if setting == name)
            label = f"{name}: compute budget of every step and layer, dense 1"
            drawn[f"calls {name}"] = to_svg(figures.plot_calls(record["by_call"]), f"calls{number}", label)
    return drawn


def _is_on_curve(config: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether it differs from the first setting of the budget rule in the budget alone."""
    first = next((other for other in settings.values() if other["rule"] == "budget"), None)
    return first is not None and {**config, "compute_budget": 0} == {**first, "compute_budget": 0}


def _mean_frames(records: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """The mean PSNR of each frame over the clips in which it is finite."""
    columns = zip(*(record["frames"]["psnr"] for record in records), strict=True)
    finite = [[value for value in column if value is not None] for column in columns]
    return [sum(values) / len(values) if values else None for values in finite]


def time_of(results: Mapping[str, Any], records: Records) -> dict[str, dict[str, float]]:
    """Mean seconds of a clip by setting and part."""
    clips = list(dict.fromkeys(clip for clip, _ in records))
    first = next(iter(results["settings"]))
    dense = [records[clip, first]["dense_run"] for clip in clips]
    parts = {DENSE: figures.mean_parts([figures.dense_time_parts(run, run["seconds_of_steps"]) for run in dense])}
    for name in results["settings"]:
        parts[name] = figures.mean_parts([figures.time_parts(records[clip, name]) for clip in clips])
    return parts


def level_masks(results: Mapping[str, Any], records: Records, folder: Path) -> list[dict[str, Any]]:
    """The level masks of one clip for each setting that has some, with the colours of their levels."""
    found = []
    for name in results["settings"]:
        for (clip, setting), record in records.items():
            file = folder / "videos" / clip / f"{name}.masks.npz"
            if setting == name and record["masks"] and file.is_file():
                pictures = masks.read_masks(file, record["masks"])
                levels = masks.css_colours(record["masks"][0][3])
                steps = list(dict.fromkeys(picture["step"] for picture in pictures))
                found.append({"setting": name, "clip": clip, "pictures": pictures, "levels": levels, "steps": steps})
                break
    return found
