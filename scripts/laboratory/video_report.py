"""Tables and plots of what ``video_runs`` wrote: means over prompts, paired differences, confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import mean, pick, read_rows, save_figure, write_rows
from policies import OUR_CONFIGS, PUBLISHED
from video_experiments import CONTROL, STEPS_POLICY

from psa_diffusers.integration.schedule import dense_steps
from psa_diffusers.metrics.intervals import mean_with_interval

SETTING = ("run", "policy", "variant", "budget", "schedule", "dense_first", "dense_last")
REFERENCES = {"default": "ours, default", "fitted": "ours, fitted"}
Row = dict[str, Any]


def best_variants(rows: Sequence[Row]) -> dict[str, str]:
    """Of each policy the variant of the highest mean PSNR."""
    found = {}
    for policy in dict.fromkeys(row["policy"] for row in rows):
        means: dict[str, float] = {}
        for variant in dict.fromkeys(row["variant"] for row in pick(rows, policy=policy)):
            means[variant] = mean(row["psnr"] for row in pick(rows, policy=policy, variant=variant))
        found[policy] = max(means, key=means.get)
    return found


def groups_of(rows: Sequence[Row]) -> dict[tuple, list[Row]]:
    """Rows by setting."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in SETTING), []).append(row)
    return groups


def summarise(rows: Sequence[Row]) -> list[Row]:
    """A row a setting: means over clips with 95 % intervals, and what the references are ahead by, clip by clip.

    A reference is compared at its own setting's budget and steps; in the experiment on steps, where there is one policy
    alone, it is the usual setting (default budget, dense warm-up and schedule).
    """
    groups, table = groups_of(rows), []
    one_policy = {row["policy"] for row in rows} == {STEPS_POLICY}
    for key, group in groups.items():
        facts = dict(zip(SETTING, key, strict=True))
        line = {**facts, "clips": len(group)}
        for name in ("achieved", "achieved_all", "estimator"):
            line[name] = round(mean(row[name] for row in group), 5)
        for name in ("psnr", "ssim"):
            line |= interval(name, [row[name] for row in group])
        line["worst_psnr"] = min(row["psnr"] for row in group)
        for name in ("sparse_step_seconds", "dense_step_seconds"):
            line[name] = sorted(row[name] for row in group)[len(group) // 2]
        for label, policy in REFERENCES.items():
            twin = usual(groups, key[0]) if one_policy else groups.get((key[0], policy, "", *key[3:]))
            line |= paired(f"{label}_ahead", twin or [], group)
        table.append(line)
    return table


def usual(groups: dict[tuple, list[Row]], run: str) -> list[Row] | None:
    """The default setting's rows of a run."""
    steps = next(int(rows[0]["steps"]) for key, rows in groups.items() if key[0] == run)
    config = OUR_CONFIGS[STEPS_POLICY]
    first = dense_steps(config.dense_warmup, steps)
    return groups.get((run, STEPS_POLICY, "", config.compute_budget, "constant", first, 0))


def paired(label: str, reference: Sequence[Row], group: Sequence[Row]) -> Row:
    """Mean difference in PSNR over the clips that both have, its interval, and in how many the reference is ahead."""
    theirs = {(row["prompt"], row["seed"]): row["psnr"] for row in group}
    gains = [row["psnr"] - theirs[pair] for row in reference if (pair := (row["prompt"], row["seed"])) in theirs]
    return {**interval(f"{label}_db", gains), f"{label}_in": sum(gain > 0 for gain in gains)}


def interval(name: str, values: Sequence[float]) -> Row:
    """The mean and its 95 % bootstrap interval; clips that equal their dense one are left out."""
    found = mean_with_interval([value for value in values if math.isfinite(value)])
    ends = {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    return {key: "" if value is None else round(value, 4) for key, value in ends.items()}


def report(file: Path, draw: Callable[[list[Row]], Any]) -> None:
    """NAME_summary.csv and NAME.png of NAME.csv."""
    rows = read_rows(file)
    table = summarise(rows)
    write_rows(file.with_name(f"{file.stem}_summary.csv"), table)
    save_figure(file.with_suffix(".png"), draw(table))


def draw_policies(table: list[Row]) -> Any:
    """PSNR against the achieved budget of the sparse steps: ours, the published settings' best, and every other."""
    from psa_diffusers.report.figure import new_figure

    figure = new_figure(9.4, 5.6)
    axes = figure.subplots()
    names = [name for name in dict.fromkeys(row["policy"] for row in table) if name != CONTROL]
    lines = {name: pick(table, policy=name) for name in names if name not in PUBLISHED}
    published = [row for row in table if row["policy"] in PUBLISHED]
    lines["best published PSA setting"] = [
        max(pick(published, budget=budget), key=lambda row: row["psnr"])
        for budget in sorted({row["budget"] for row in published})
    ]
    for number, (name, rows) in enumerate(lines.items()):
        rows = sorted(rows, key=lambda row: row["achieved"])
        x, y, low, high = ([row[key] for row in rows] for key in ("achieved", "psnr", "psnr_low", "psnr_high"))
        style = {"linewidth": 2.4} if name in OUR_CONFIGS else {"linewidth": 1.1, "linestyle": "--"}
        (line,) = axes.plot(x, y, marker="osD^vPX*<>hp"[number % 12], markersize=4.5, label=name, **style)
        if all(end != "" for end in (*low, *high)) and (name in OUR_CONFIGS or name == "best published PSA setting"):
            axes.fill_between(x, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set(xlabel="compute budget of the sparse steps (dense = 1)", ylabel="PSNR against dense, dB")
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    return figure


def draw_steps(table: list[Row]) -> Any:
    """PSNR against the compute of all steps: by dense first and last steps; and by schedule."""
    from psa_diffusers.report.figure import new_figure

    figure = new_figure(11.5, 4.8)
    left, right = figure.subplots(1, 2)
    constant = pick(table, schedule="constant")
    for number, first in enumerate(sorted({row["dense_first"] for row in constant})):
        for last, marker in zip((0, 1, 2), "osD", strict=True):
            points = pick(constant, dense_first=first, dense_last=last)
            x, y = ([row[key] for row in points] for key in ("achieved_all", "psnr"))
            label = f"{first:.0f} first steps dense" if last == 0 else None
            left.plot(x, y, marker, color=f"C{number}", markersize=5 + last, label=label, alpha=0.8)
    left.set(xlabel="compute of all steps (dense = 1)", ylabel="PSNR against dense, dB")
    left.set_title("circle, square, diamond: 0, 1, 2 last steps dense", fontsize=9)
    left.legend(frameon=False, fontsize=8)
    left.grid(alpha=0.3)
    names = list(dict.fromkeys(row["schedule"] for row in table))
    scheduled = {tuple(row[k] for k in ("dense_first", "budget")) for row in table if row["schedule"] != "constant"}
    for number, (first, budget) in enumerate(sorted(scheduled)):
        rows = {row["schedule"]: row for row in pick(table, dense_first=first, dense_last=0, budget=budget)}
        label = f"{first:.0f} dense, mean budget {budget:.3g}"
        places = [names.index(name) + 0.25 * (number - 1) for name in rows]
        right.barh(places, [row["psnr"] for row in rows.values()], height=0.22, label=label)
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.set(xlabel="PSNR against dense, dB")
    low = min(row["psnr"] for row in table)
    right.set_xlim(left=max(0.0, low - 4))
    right.legend(fontsize=8, loc="lower right")
    return figure
