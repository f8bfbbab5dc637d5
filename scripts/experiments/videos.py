"""Experiments 1 and 9 on whole videos: every policy at equal compute, dense steps, budgets over steps, kept plans.

    python scripts/experiments/videos.py --device cuda --dtype float16 --output benchmarks/experiments
    python scripts/experiments/videos.py --draw --output benchmarks/experiments    (tables and plots of what is there)

The bundled model makes each clip from the same noise: dense by the pipeline's own attention, and with its sparse steps
computed by a policy. A clip is compared with its dense one. Prompts are held out of the model's training; policies are
tuned on four of them ("tuning") and reported on others. Writes videos_tuning.csv and .json, videos.csv,
video_steps.csv, video_reuse.csv (a row a clip, as they are made: a stopped run goes on), their summaries and plots, and
videos.json (settings, versions, machine). ``seconds`` in the CSV files are of a step of the whole batch.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import _laboratory  # noqa: F401
from harness import BUDGETS, RESULTS, read_rows
from video_experiments import (
    POLICIES,
    REUSE,
    STEPS,
    TUNING,
    chosen_variants,
    policy_settings,
    reuse_settings,
    step_settings,
    tuning_settings,
)
from video_model import VideoModel
from video_report import best_variants, draw_policies, draw_reuse, draw_steps, report
from video_runs import Runs, say

from psa_diffusers.cli.run_record import device_name, digest, versions, write_json

BEGIN = time.monotonic()
PROMPTS = Path(__file__).parents[1] / "demo_model" / "eval_prompts.txt"
FILES = {TUNING: "videos_tuning", POLICIES: "videos", STEPS: "video_steps", REUSE: "video_reuse"}
# The laboratory's captures for tuning are of the first prompt of the file.
TUNING_LINES = (0, 97, 98, 99)


def read_prompts(path: Path, seed: int, count: int) -> dict[str, list[tuple[str, int]]]:
    """(prompt, seed) for tuning, and ``count`` others for reporting; the prompt is a line's last column."""
    lines = [line.split("\t")[-1] for line in path.read_text().splitlines() if line.strip() and line[0] != "#"]
    numbered = [(prompt, seed + number) for number, prompt in enumerate(lines)]
    unseen = [pair for number, pair in enumerate(numbered) if number not in TUNING_LINES]
    if count > len(unseen):
        raise SystemExit(f"--prompts must be at most {len(unseen)}, but is {count}.")
    report_on = unseen[:count]
    return {TUNING: [numbered[number] for number in TUNING_LINES]} | dict.fromkeys((POLICIES, STEPS, REUSE), report_on)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="Folder for CSV files and plots.")
    parser.add_argument("--experiments", nargs="+", choices=FILES, default=list(FILES))
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS, help="In the order in which they are run.")
    parser.add_argument("--policies", nargs="+", help="Only policies whose name holds one of these.")
    parser.add_argument("--prompts", type=int, default=16, help="To report on.")
    parser.add_argument("--batch", type=int, default=16, help="Prompts at a time.")
    parser.add_argument("--steps", type=int, help="Default: the model's.")
    parser.add_argument("--tuning-steps", type=int, help="Of tuning. Default: the same.")
    parser.add_argument(
        "--size", type=int, nargs=3, metavar=("FRAMES", "HEIGHT", "WIDTH"), help="Default: the model's."
    )
    parser.add_argument("--seed", type=int, default=0, help="Of the first prompt's noise.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--model", help="Default: the bundled one.")
    parser.add_argument("--limit-seconds", type=float, help="Begin no run after so many seconds from the start.")
    parser.add_argument("--draw", action="store_true", help="Run nothing.")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    if not options.draw:
        failures = run(options)
        for failure in failures:
            say(f"FAILED: {failure}")
        if failures:
            return 1
    tables(options.output)
    return 0


def run(options: argparse.Namespace) -> list[str]:
    """All experiments; what failed."""
    size = dict(zip(("num_frames", "height", "width"), options.size or (), strict=False))
    whole = VideoModel(options.device, options.dtype, options.model, num_inference_steps=options.steps, **size)
    deadline = None if options.limit_seconds is None else BEGIN + options.limit_seconds
    failures = []
    prompts = read_prompts(PROMPTS, options.seed, options.prompts)
    say(f"Loaded: {time.monotonic() - BEGIN:.0f} s since the start")
    for experiment in options.experiments:
        file = options.output / f"{FILES[experiment]}.csv"
        model = whole.with_steps(options.tuning_steps or whole.steps) if experiment == TUNING else whole
        runs = Runs(model, file, note_facts(model, options), options.batch, deadline)
        finished = runs.run_all(settings_of(experiment, model.steps, options), prompts[experiment])
        failures += runs.failures
        say(f"{experiment}: {time.monotonic() - BEGIN:.0f} s since the start")
        if experiment == TUNING and finished and not runs.failures:
            write_json(options.output / "videos_tuning.json", best_variants(read_rows(file)))
        if not finished:
            break
    return failures


def settings_of(experiment: str, steps: int, options: argparse.Namespace) -> list:
    if experiment == TUNING:
        settings = tuning_settings(steps)
    elif experiment == POLICIES:
        settings = policy_settings(steps, options.budgets, chosen_variants(options.output / "videos_tuning.json"))
    else:
        settings = step_settings(steps) if experiment == STEPS else reuse_settings(steps)
    wanted = options.policies or [""]
    return [setting for setting in settings if any(part in setting.name for part in wanted)]


def note_facts(model: VideoModel, options: argparse.Namespace) -> str:
    """The name for rows of this model, size and device; videos.json says what it stands for."""
    facts = {**model.size, "dtype": options.dtype, "device": device_name(options.device), "model": model.identity}
    name, file = "run-" + digest(json.dumps(facts, sort_keys=True)), options.output / "videos.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    command = shlex.join(["python", *sys.argv])
    write_json(file, {**known, name: {**facts, "versions": versions(), "command": command}})
    return name


def tables(folder: Path) -> None:
    """Summaries and plots of what is in the CSV files."""
    for experiment, draw in ((POLICIES, draw_policies), (STEPS, draw_steps), (REUSE, draw_reuse)):
        file = folder / f"{FILES[experiment]}.csv"
        if file.is_file():
            try:
                report(file, draw)
            except ImportError as error:  # scipy for the intervals, matplotlib for the plots
                say(f"No table and plot of {file}: {error} Run again with --draw where it is installed.")


if __name__ == "__main__":
    sys.exit(main())
