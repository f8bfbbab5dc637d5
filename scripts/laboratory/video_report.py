"""Tables and plots of what ``video_runs`` wrote: means over prompts, paired differences, confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import mean, pick, read_rows, save_figure, write_rows
from policies import OUR_CONFIGS, PLAIN, PUBLISHED
from video_experiments import CONTROL, KEPT_STEPS, REUSE, STEPS_POLICY, kept_variant

from psa_diffusers.integration.schedule import dense_steps
from psa_diffusers.metrics.intervals import mean_with_interval

SETTING = ("run", "policy", "variant", "budget", "schedule", "dense_first", "dense_last")
REFERENCES = {"default": "ours, default", "plain": PLAIN, "best": "ours, fitted, 64 queries, variance of each query"}
OURS = "ours, "
Row = dict[str, Any]
# Of the policies that are not ours, apart from matplotlib's usual colours, which ours have.
DARK = ["#000000", "#7a0177", "#005a32", "#8c2d04", "#08306b", "#525252", "#99000d", "#006d6d", "#6a51a3", "#b15928"]


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
    alone, it is the usual setting (default budget, dense warm-up and schedule); in that on kept plans, the same policy
    with plans made anew ("fresh").
    """
    groups, table = groups_of(rows), []
    one_policy = {row["policy"] for row in rows} == {STEPS_POLICY}
    reuse = {row["experiment"] for row in rows} == {REUSE}
    for key, group in groups.items():
        facts = dict(zip(SETTING, key, strict=True))
        line = {**facts, "steps": int(group[0]["steps"]), "clips": len(group)}
        line |= {name: int(facts[name]) for name in ("dense_first", "dense_last")}
        for name in ("achieved", "achieved_all", "estimator"):
            line[name] = round(mean(row[name] for row in group), 5)
        for name in ("psnr", "ssim"):
            line |= interval(name, [row[name] for row in group])
        line["worst_psnr"] = min(row["psnr"] for row in group)
        for name in ("sparse_step_seconds", "dense_step_seconds"):
            line[name] = sorted(row[name] for row in group)[len(group) // 2]
        twins = {label: groups.get((key[0], policy, "", *key[3:])) for label, policy in REFERENCES.items()}
        if reuse:
            twins = {"fresh": groups.get((*key[:2], "", *key[3:]))}
        elif one_policy:
            twins = {"usual": usual(groups, key[0])}
        for label, twin in twins.items():
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
    """PSNR against the achieved budget of the sparse steps; bars where there is one budget alone."""
    rows = [row for row in table if row["policy"] != CONTROL]
    return _curves(rows) if len({row["budget"] for row in rows}) > 1 else _bars(rows)


def _bars(rows: list[Row]) -> Any:
    """A bar a policy, best first, with its interval; ours in their own colour."""
    from psa_diffusers.report.figure import new_figure

    rows = sorted(rows, key=lambda row: row["psnr"])
    figure = new_figure(8.6, 0.27 * len(rows) + 1.1)
    axes = figure.subplots()
    names = [f"{row['policy']}{', ' * bool(row['variant'])}{row['variant']}" for row in rows]
    colours = ["#d95f02" if row["policy"].startswith(OURS) else "#2c7fb8" for row in rows]
    whiskers = {"xerr": _whiskers(rows), "error_kw": {"elinewidth": 0.9, "capsize": 2}}
    axes.barh(names, [row["psnr"] for row in rows], color=colours, **whiskers)
    axes.set(
        xlabel=f"PSNR against dense, dB, at compute budget {rows[0]['budget']:g} of the sparse steps", xlim=(15, None)
    )
    axes.grid(alpha=0.3, axis="x")
    axes.tick_params(axis="y", labelsize=8)
    return figure


def _whiskers(rows: Sequence[Row]) -> list[list[float]] | None:
    """How far the interval reaches below and above each mean; None where some row has none."""
    if any(row["psnr_low"] == "" for row in rows):
        return None
    return [[row["psnr"] - row["psnr_low"] for row in rows], [row["psnr_high"] - row["psnr"] for row in rows]]


def _curves(table: list[Row]) -> Any:
    """A line a policy: ours, every other, and of the paper's published settings the best at each budget."""
    from psa_diffusers.report.figure import new_figure

    figure = new_figure(9.4, 5.6)
    axes = figure.subplots()
    lines = {name: pick(table, policy=name) for name in dict.fromkeys(row["policy"] for row in table)}
    published = [row for name in PUBLISHED for row in lines.pop(name, [])]
    if published:
        budgets = sorted({row["budget"] for row in published})
        best = [max(pick(published, budget=budget), key=lambda row: row["psnr"]) for budget in budgets]
        lines["best published PSA setting"] = best
    others = [name for name in lines if not name.startswith(OURS)]
    for number, (name, rows) in enumerate(lines.items()):
        rows = sorted(rows, key=lambda row: row["achieved"])
        style = {"linewidth": 2.4}
        if name in others:
            style = {"linewidth": 1.1, "linestyle": "--", "color": DARK[others.index(name) % len(DARK)]}
        points = [row["achieved"] for row in rows], [row["psnr"] for row in rows]
        marker = "osD^vPX*<>hp"[number % 12]
        axes.errorbar(*points, yerr=_whiskers(rows), marker=marker, markersize=4, label=name, **style)
    axes.set(xlabel="compute budget of the sparse steps (dense = 1)", ylabel="PSNR against dense, dB")
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    return figure


def draw_steps(table: list[Row]) -> Any:
    """By dense first and last steps; by schedule."""
    from psa_diffusers.report.figure import new_figure

    figure = new_figure(11, 6.2)
    left, right = figure.subplots(1, 2)
    _draw_dense_steps(left, table)
    _draw_schedules(right, table)
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), handlelength=4)
    return figure


def draw_reuse(table: list[Row]) -> Any:
    """PSNR by the number of steps that plans are kept, a line a policy."""
    from psa_diffusers.report.figure import new_figure

    figure = new_figure(6.4, 4)
    axes = figure.subplots()
    kept = {kept_variant(steps): steps for steps in KEPT_STEPS}
    for policy in dict.fromkeys(row["policy"] for row in table):
        rows = sorted(pick(table, policy=policy), key=lambda row: kept[row["variant"]])
        points = [kept[row["variant"]] for row in rows], [row["psnr"] for row in rows]
        axes.errorbar(*points, yerr=_whiskers(rows), marker="o", capsize=2, label=policy)
    axes.set(xlabel="steps for which a plan is kept", ylabel="PSNR against dense, dB")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure


def _draw_dense_steps(axes: Any, table: Sequence[Row]) -> None:
    """A line for each number of dense last steps: at one budget of the sparse steps, and at one compute of all."""
    constant, budget, total = (
        pick(table, schedule="constant"),
        OUR_CONFIGS[STEPS_POLICY].compute_budget,
        _usual_total(table),
    )
    for number, last in enumerate(sorted({row["dense_last"] for row in constant})):
        some = sorted(pick(constant, dense_last=last), key=lambda row: row["dense_first"])
        same_total = [row for row in some if abs(row["achieved_all"] - total) < 0.005]
        for rows, dashes, what in (
            (pick(some, budget=budget), "-", f"sparse ones at {budget:.3g}"),
            (same_total, "--", f"all together at {total:.3g}"),
        ):
            points = [row["dense_first"] for row in rows], [row["psnr"] for row in rows]
            style = {"color": f"C{number}", "linestyle": dashes, "marker": "o", "capsize": 2}
            axes.errorbar(*points, yerr=_whiskers(rows), label=f"{last} last steps dense, {what}", **style)
    axes.set(xlabel="first steps that are dense", ylabel="PSNR against dense, dB")
    axes.grid(alpha=0.3)


def _draw_schedules(axes: Any, table: Sequence[Row]) -> None:
    """A bar for each schedule, at each number of dense steps and mean budget."""
    names = list(dict.fromkeys(row["schedule"] for row in table))
    scheduled = {(row["dense_first"], row["budget"]) for row in table if row["schedule"] != "constant"}
    for number, (first, budget) in enumerate(sorted(scheduled)):
        rows = {row["schedule"]: row for row in pick(table, dense_first=first, dense_last=0, budget=budget)}
        places = [names.index(name) + 0.25 * (number - 1) for name in rows]
        label = f"{first} first steps dense, mean budget {budget:.3g}"
        values, ends = [row["psnr"] for row in rows.values()], _whiskers(list(rows.values()))
        axes.barh(places, values, 0.22, xerr=ends, label=label, error_kw={"elinewidth": 0.9, "capsize": 2})
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlabel="PSNR against dense, dB", xlim=(min(row["psnr"] for row in table) - 4, None))


def _usual_total(table: Sequence[Row]) -> float:
    """Compute of all steps by the default setting."""
    config, steps = OUR_CONFIGS[STEPS_POLICY], table[0]["steps"]
    first = dense_steps(config.dense_warmup, steps)
    return (first + (steps - first) * config.compute_budget) / steps
