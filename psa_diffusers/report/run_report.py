"""psa_report: what a run did, by step, layer and head: compute budget, levels, dense calls with reasons, planning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..integration import psa_statistics
from ..integration.guards import seconds as seconds_of
from ..integration.statistics import PSAStatistics, SparseCall
from .level_losses import level_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("step", "layer", "head")


@dataclass
class Share:
    """Part of a run: a step, a layer, a head, or the whole.

    Attributes:
        pairs: Block pairs of the sparse calls, by level's name.
        cost: What they cost; a full pair = 1.
        sparse, dense: Self-attention calls. The calls of a head are those of its layer.
        reasons: Why calls were dense, with how many.
        planning_seconds: Time for making plans; of a head its even share.
    """

    pairs: dict[str, int] = field(default_factory=dict)
    cost: float = 0.0
    sparse: int = 0
    dense: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    planning_seconds: float = 0.0

    @property
    def compute_budget(self) -> float | None:
        """Of the sparse calls; dense = 1. None without any."""
        total = sum(self.pairs.values())
        return self.cost / total if total else None

    def add_pairs(self, counts: Iterable[int], call: SparseCall, seconds: float) -> None:
        for level, count in enumerate(counts):
            name = level_name(level, call.num_levels)
            self.pairs[name] = self.pairs.get(name, 0) + count
            self.cost += count * _cost(level, call)
        self.sparse += 1
        self.planning_seconds += seconds

    def add_dense(self, reason: str, calls: int) -> None:
        self.dense += calls
        self.reasons[reason] = self.reasons.get(reason, 0) + calls

    def row(self) -> dict[str, Any]:
        """Plain values: for tables and JSON."""
        total = sum(self.pairs.values())
        names = {name: count / total for name, count in self.pairs.items()}
        skipped = {"skip": names.pop("skip")} if "skip" in names else {}
        return {
            "compute_budget": self.compute_budget,
            **names,
            **skipped,
            "sparse": self.sparse,
            "dense": self.dense,
            "planning_ms": 1000 * self.planning_seconds,
            "why dense": ", ".join(f"{reason} ({calls})" for reason, calls in self.reasons.items()),
        }


@dataclass(frozen=True)
class PSAReport:
    """A run in parts: keys are (step, layer, head), of which head is None for what is not of a single head.

    Attributes:
        calls: A :class:`Share` for each (step, layer); step or layer is None where it was not known.
        heads: A :class:`Share` for each (step, layer, head) of the sparse calls.
    """

    calls: dict[tuple[int | None, int | None], Share]
    heads: dict[tuple[int | None, int, int], Share]

    def rows(self, by: str = "layer") -> list[dict[str, Any]]:
        """One row for each step, layer, or head of a layer.

        Raises:
            ValueError: ``by`` is none of these.
        """
        if by not in PARTS:
            raise ValueError(f"PSAReport.rows: by must be one of {', '.join(PARTS)}, but is {by!r}.")
        if by == "head":
            keys = sorted({key[1:] for key in self.heads})
            merged = {key: _merge(share for at, share in self.heads.items() if at[1:] == key) for key in keys}
            return [{"layer": layer, "head": head, **share.row()} for (layer, head), share in merged.items()]
        place = PARTS.index(by)
        keys = sorted({key[place] for key in self.calls}, key=lambda key: -1 if key is None else key)
        return [{by: key, **_merge(s for at, s in self.calls.items() if at[place] == key).row()} for key in keys]

    def table(self, by: str = "layer") -> str:
        """The rows as text, in columns."""
        rows = self.rows(by)
        names = list(max(rows, key=len, default={}))  # a row without sparse calls has no levels
        lines = [names, *([_text(row.get(name)) for name in names] for row in rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
        aligned = (zip(line, widths, names, strict=True) for line in lines)
        return "\n".join("  ".join(_aligned(*cell) for cell in line).rstrip() for line in aligned)

    def plot(self) -> Figure:
        """The compute budget of every step (columns) and layer (rows), dense = 1. Needs matplotlib.

        Raises:
            ValueError: nothing has run yet.
        """
        from .plots import plot_budgets

        if not self.budgets():
            raise ValueError("PSAReport.plot: there are no calls of known steps to show; run the pipeline first.")
        return plot_budgets({(step, layer): budget for step, layer, budget in self.budgets()})

    def budgets(self) -> list[tuple[int, int, float]]:
        """(step, layer, compute budget of all its calls, dense ones counting 1), where step and layer are known."""
        return [(*key, _budget_of_all(share)) for key, share in self.calls.items() if None not in key]

    def __str__(self) -> str:
        return self.table()


def psa_report(pipe: Any) -> PSAReport:
    """What the pipeline's last run did, by step, layer and head. Reading waits for a GPU; the run did not.

    Raises:
        ValueError: PSA is not enabled on this pipeline.
    """
    return report_of(psa_statistics(pipe))


def report_of(statistics: PSAStatistics) -> PSAReport:
    """The same of statistics that were kept, also after PSA was disabled."""
    calls: dict[tuple, Share] = {}
    heads: dict[tuple, Share] = {}
    for (step, layer, reason), count in statistics.dense.items():
        calls.setdefault((step, layer), Share()).add_dense(reason, count)
    for call, counts in zip(statistics.calls, statistics.level_counts(), strict=True):
        seconds, by_head = seconds_of(call.planning), counts.sum(1)  # over the batch
        calls.setdefault((call.step, call.layer), Share()).add_pairs(by_head.sum(1).tolist(), call, seconds)
        for head, levels in enumerate(by_head.T.tolist()):
            share = heads.setdefault((call.step, call.layer, head), Share())
            share.add_pairs(levels, call, seconds / by_head.shape[1])
    return PSAReport(calls, heads)


def _cost(level: int, call: SparseCall) -> float:
    if level == 0:
        return 0.0
    return 2.0 ** -(level - 1) if level <= call.num_levels else 1 / call.kv_block_size


def _merge(shares: Iterable[Share]) -> Share:
    whole = Share()
    for share in shares:
        for name, count in share.pairs.items():
            whole.pairs[name] = whole.pairs.get(name, 0) + count
        for reason, calls in share.reasons.items():
            whole.add_dense(reason, calls)
        whole.cost += share.cost
        whole.sparse += share.sparse
        whole.planning_seconds += share.planning_seconds
    return whole


def _budget_of_all(share: Share) -> float:
    """Of all calls, dense ones counting 1."""
    return (share.sparse * (share.compute_budget or 0.0) + share.dense) / (share.sparse + share.dense)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _aligned(text: str, width: int, name: str) -> str:
    return text.ljust(width) if name == "why dense" else text.rjust(width)
