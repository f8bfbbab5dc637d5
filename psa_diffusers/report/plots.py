"""Pictures of plans and of what they cost: level masks, attention mass, trade-off curves. They need matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..planning.plan import Plan
from .figure import bare, new_figure
from .level_losses import level_name, level_shares

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SKIPPED = "#d0d0d0"
MARKERS = "osD^vPX*"


def level_colours(num_levels: int) -> dict[str, Any]:
    """A colour for each level's name, in the order in which :func:`level_shares` lists them: the finer, the darker."""
    import matplotlib

    names = [level_name(level, num_levels) for level in range(1, num_levels + 2)]
    shades = matplotlib.colormaps["YlGnBu"]
    colours = {name: shades(1 - 0.9 * i / (len(names) - 1)) for i, name in enumerate(names)}
    return {**colours, "skip": SKIPPED}


def plot_level_masks(plans: Mapping[str, Plan], heads: Sequence[int] = (0,), sample: int = 0) -> Figure:
    """Level masks as pictures: a row a plan, a column a head; a bar below each shows the share of every level.

    A mask has query blocks from top to bottom and key blocks from left to right, both in the plan's order.

    Args:
        plans: By title; all with the same number of levels.
        heads: Which heads to show.
        sample: Of the batch.

    Raises:
        ValueError: there is nothing to show, or the plans have different numbers of levels.
    """
    levels = {plan.num_levels for plan in plans.values()}
    if len(levels) != 1 or not heads:
        raise ValueError(f"plot_level_masks: plans must share one num_levels, not {levels}; heads: {heads}.")
    figure = new_figure(2.3 * len(heads) + 1.2, 2.0 * len(plans) + 0.4)
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colours = level_colours(num_levels := levels.pop())
    by_level = ListedColormap([colours[level_name(level, num_levels)] for level in range(num_levels + 2)])
    heights = [ratio for _ in plans for ratio in (10, 1)]
    grid = figure.subplots(2 * len(plans), len(heads), squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, (title, plan) in enumerate(plans.items()):
        for column, head in enumerate(heads):
            mask, bar = bare(grid[2 * row][column]), grid[2 * row + 1][column]
            mask.set_title(f"{title}, head {head}", fontsize=8)
            picture = plan.level_mask[sample, head].cpu().numpy()
            mask.imshow(picture, cmap=by_level, vmin=0, vmax=num_levels + 1, aspect="auto", interpolation="nearest")
            _draw_shares(bar, level_shares(plan, sample=sample, head=head), colours)
    handles = [Patch(facecolor=colour, edgecolor="#888888", label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8)
    return figure


def _draw_shares(axes: Any, shares: Mapping[str, float], colours: Mapping[str, Any]) -> None:
    start = 0.0
    for name, share in shares.items():
        axes.barh(0, share, left=start, color=colours[name])
        start += share
    axes.set_xlim(0, 1)
    bare(axes)


def plot_mass(panels: Mapping[str, Tensor]) -> Figure:
    """The share of each query block's attention (rows) that goes to each key block (columns), on a log scale.

    Args:
        panels: By title, [query_blocks, kv_blocks] each.
    """
    figure = new_figure(3.2 * len(panels) + 0.6, 2.4)
    from matplotlib.colors import LogNorm

    image, grid = None, figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, mass) in zip(grid, panels.items(), strict=True):
        bare(axes).set_title(title, fontsize=9)
        even = 1 / mass.shape[1]
        scale = LogNorm(vmin=even / 30, vmax=even * 30, clip=True)
        image = axes.imshow(mass.cpu().numpy(), norm=scale, cmap="magma", aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=list(grid), label="share of a row")
    return figure


def plot_trade_off(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    points: Mapping[str, tuple[float, float]] | None = None,
    *,
    measure: str = "relative error of one step",
) -> Figure:
    """Error against compute budget: nearer to the corner at the lower left is better.

    Args:
        curves: By label, (compute budget, error) of each measurement.
        points: By label, single measurements with their name beside them.
        measure: What the error is of.
    """
    figure = new_figure(6.8, 3.8)
    from matplotlib.ticker import LogLocator

    axes = figure.subplots()
    for number, (label, curve) in enumerate(curves.items()):
        budgets, errors = zip(*sorted(curve), strict=True)
        axes.plot(budgets, errors, marker=MARKERS[number % len(MARKERS)], label=label)
    for number, (label, (budget, error)) in enumerate((points or {}).items()):
        axes.plot([budget], [error], "k.", markersize=5)
        beside = (5, -9 if number % 2 else 3)  # in turn, for points that lie on each other
        axes.annotate(label, (budget, error), xytext=beside, textcoords="offset points", fontsize=8)
    axes.set(xlabel="compute budget (dense = 1)", ylabel=measure, yscale="log")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3, which="both")
    if curves:
        axes.legend(frameon=False, fontsize=8)
    return figure


def plot_budgets(budgets: Mapping[tuple[int, int], float]) -> Figure:
    """The compute budget of every (step, layer), dense = 1: steps from left to right, layers from top to bottom.

    Colours go by the budget's square root, so that small ones can be told apart.
    """
    steps, layers = (sorted({key[i] for key in budgets}) for i in (0, 1))
    figure = new_figure(max(4.0, 0.3 * len(steps) + 1.5), max(1.6, 0.2 * len(layers) + 0.8))
    from matplotlib.colors import PowerNorm

    axes = figure.subplots()
    picture = [[budgets.get((step, layer), float("nan")) for step in steps] for layer in layers]
    image = axes.imshow(picture, cmap="YlGnBu", norm=PowerNorm(0.5, 0, 1), aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(steps)), steps)
    axes.set_yticks(range(len(layers)), layers)
    axes.set(xlabel="step", ylabel="layer")
    figure.colorbar(image, ax=axes, label="compute budget")
    return figure
