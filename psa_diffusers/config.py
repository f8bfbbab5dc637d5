"""PSAConfig: every choice that decides what is computed sparsely, and how."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .budget_schedule import BudgetPoint, read_points

RULES = ("budget", "threshold", "topk")
IMPORTANCES = ("sampled", "antidiagonal", "pooled")
REDUCTIONS = ("sum", "max")
LOGIT_CORRECTIONS = ("none", "variance")
VALUE_CORRECTIONS = ("none", "covariance", "fitted")
ORDERS = ("gilbert", "raster")
BACKENDS = ("auto", "triton", "torch", "reference")

DEFAULT_COMPUTE_BUDGET = 0.15
DEFAULT_LOGIT_CORRECTION = "variance"  # of the budget rule; the paper's rules have none
DEFAULT_VALUE_CORRECTION = "covariance"
# Of a preset's file: what it is, what it was calibrated for, and the settings.
PRESET_KEYS = ("description", "calibrated", "config")
# The paper's multi-level thresholds and its best top-k shares (PSA-3), section 4.4.
DEFAULT_LEVEL_THRESHOLDS = (0.7, 0.8, 0.9, 0.9)
DEFAULT_LEVEL_FRACTIONS = (0.15, 0.10, 0.20, 0.0)


def _is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


def _require(condition: bool, name: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"PSAConfig: {name} must be {rule}, but is {value!r}.")


@dataclass(frozen=True)
class PSAConfig:
    """How Pyramid Sparse Attention plans and computes (arXiv 2512.04025). Immutable; valid with no arguments.

    Args:
        query_block_size: Tokens in a block of queries that share one row of the plan. A power of two.
        kv_block_size: Tokens in a block of keys and values. A power of two above ``2 ** (num_levels - 1)``.
        num_levels: Resolutions of the pyramid: level ``h`` holds ``kv_block_size / 2 ** (h - 1)`` tokens a block.
        rule: How levels are chosen. ``"budget"`` minimises the estimated error at ``compute_budget`` (with one more
            level, a single centroid a block); ``"threshold"`` and ``"topk"`` are the paper's rules (section 3.3).
        compute_budget: Share of dense attention's work that the ``budget`` rule may use, in (0, 1]. Higher is denser,
            slower and closer to dense. Defaults to 0.15 for the ``budget`` rule, and belongs to it alone.
        target_error: ``budget`` rule only, instead of ``compute_budget``: the relative error that each call's output
            may have (its root mean square over the heads), in (0, 1). The plan spends what that is estimated to need
            (``psa_diffusers.planning.target``); only the torch planner can, so that on a GPU planning is slower.
        budget_schedule: ``budget`` rule only: compute budgets that change over a pipeline's run, instead of
            ``compute_budget`` at every step: points (at, budget), where step ``i`` of ``n`` is at ``i / n``, linear
            between them. A budget may be one a layer, and a point of one expert alone
            (:class:`~psa_diffusers.budget_schedule.BudgetPoint`). Tensors given to ``build_plan`` have no step, and an
            expert may have no points: there ``compute_budget`` holds.
        level_thresholds: ``threshold`` rule only: ``num_levels`` shares of the cumulative importance, in [0, 1]; a
            block gets the finest level whose threshold the blocks before it have not reached. Higher keeps more.
        level_fractions: ``topk`` rule only: ``num_levels`` shares of a row's blocks, level 1 first; the rest is
            skipped.
        similarity_thresholds: ``num_levels - 1`` cosine similarities, for levels 2 and up: a block is pooled to a
            level only where the tokens that it would merge are more alike than that. ``None`` sets no cap.
        importance: How much a query block needs a key block: ``"sampled"`` softmax over sampled tokens,
            ``"antidiagonal"`` strided sums (XAttention), ``"pooled"`` mean query against mean key.
        importance_reduction: ``"sum"`` of the sampled softmax over a block, or its ``"max"`` (the paper's).
        sampled_queries, sampled_keys: Tokens sampled a block by ``"sampled"``.
        logit_correction: ``"variance"`` adds to a pooled key's logit half the variance, over its group and the head's
            queries, of the logits that it stands for: the attention that pooling takes from keys that differ
            (:mod:`~psa_diffusers.backends.logit_variance`); ``"none"`` is the published method. Left out (None), it is
            ``"variance"`` with the ``budget`` rule and ``"none"`` with the others.
        value_correction: ``"covariance"`` gives pooled blocks the covariance of values and keys back that pooling takes
            from the output, one matrix a head (see :mod:`~psa_diffusers.backends.reference`); ``"fitted"`` gives every
            head as much of it as fits a few of its queries best, computed in full while planning; ``"none"`` is the
            published method. Belongs to the ``budget`` rule, which reads every block; there ``"covariance"`` is the
            default.
        order: Order of the video tokens in blocks: ``"gilbert"`` keeps a block compact in time and space;
            ``"raster"`` keeps the model's own order.
        dense_warmup: Share of the denoising steps, from the first, that stay dense. Rounded up to whole steps.
        dense_last: Share of the denoising steps, at the end, that stay dense. Rounded up.
        dense_layers: Indices of transformer blocks that always stay dense.
        refresh_every: Denoising steps for which a plan is kept before it is made anew. 1 plans at every step.
        backend: ``"auto"`` picks by device; or ``"triton"``, ``"torch"``, ``"reference"``.
        seed: Seed of the sampled positions. Nothing here touches the global random state.

    Raises:
        ValueError: a value breaks its rule; the message names the argument, the rule and the value.
    """

    query_block_size: int = 128
    kv_block_size: int = 64
    num_levels: int = 4
    rule: str = "budget"
    compute_budget: float | None = None
    target_error: float | None = None
    budget_schedule: tuple[BudgetPoint, ...] | None = None
    level_thresholds: tuple[float, ...] | None = None
    level_fractions: tuple[float, ...] | None = None
    similarity_thresholds: tuple[float, ...] | None = None
    importance: str = "sampled"
    importance_reduction: str = "sum"
    sampled_queries: int = 16
    sampled_keys: int = 8
    logit_correction: str | None = None
    value_correction: str | None = None
    order: str = "gilbert"
    dense_warmup: float = 0.25
    dense_last: float = 0.0
    dense_layers: tuple[int, ...] = ()
    refresh_every: int = 1
    backend: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_types()
        self._check_choices()
        self._check_blocks()
        self._check_rule()
        self._check_schedule()

    # -- checks ---------------------------------------------------------------------------------------------------

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def _check_types(self) -> None:
        integers = ("query_block_size", "kv_block_size", "num_levels", "sampled_queries", "sampled_keys")
        for name in (*integers, "refresh_every", "seed"):
            value = getattr(self, name)
            _require(isinstance(value, int) and not isinstance(value, bool), name, "a whole number", value)
        for name in ("compute_budget", "target_error", "dense_warmup", "dense_last"):
            value = getattr(self, name)
            optional = name in ("compute_budget", "target_error") and value is None
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            _require(optional or is_number, name, "a number", value)
        for name in ("level_thresholds", "level_fractions", "similarity_thresholds", "dense_layers"):
            value = getattr(self, name)
            if value is None and name != "dense_layers":
                continue
            _require(isinstance(value, list | tuple), name, "a list of numbers", value)
            kind = int if name == "dense_layers" else int | float
            good = all(isinstance(item, kind) and not isinstance(item, bool) for item in value)
            _require(good, name, "a list of whole numbers" if kind is int else "a list of numbers", value)
            self._set(name, tuple(value) if kind is int else tuple(float(item) for item in value))

    def _check_choices(self) -> None:
        if self.logit_correction is None:
            self._set("logit_correction", DEFAULT_LOGIT_CORRECTION if self.rule == "budget" else "none")
        choices = {
            "rule": RULES,
            "importance": IMPORTANCES,
            "importance_reduction": REDUCTIONS,
            "logit_correction": LOGIT_CORRECTIONS,
            "order": ORDERS,
            "backend": BACKENDS,
        }
        for name, allowed in choices.items():
            _require(getattr(self, name) in allowed, name, f"one of {', '.join(allowed)}", getattr(self, name))

    def _check_blocks(self) -> None:
        for name in ("query_block_size", "kv_block_size"):
            _require(_is_power_of_two(getattr(self, name)), name, "a power of two", getattr(self, name))
        for name in ("num_levels", "sampled_queries", "sampled_keys", "refresh_every"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        coarsest = 2 ** (self.num_levels - 1)
        rule = f"above 2 ** (num_levels - 1) = {coarsest}, so that the coarsest level pools less than a block"
        _require(self.kv_block_size > coarsest, "kv_block_size", rule, self.kv_block_size)

    def _check_rule(self) -> None:
        owned = (
            ("budget", "target_error", None),
            ("budget", "compute_budget", None if self.target_error is not None else DEFAULT_COMPUTE_BUDGET),
            ("budget", "value_correction", DEFAULT_VALUE_CORRECTION),
            ("budget", "budget_schedule", None),
            ("threshold", "level_thresholds", DEFAULT_LEVEL_THRESHOLDS),
            ("topk", "level_fractions", DEFAULT_LEVEL_FRACTIONS),
        )
        for rule, name, default in owned:
            value = getattr(self, name)
            if rule != self.rule:
                _require(
                    value is None, name, f"left out (None) with rule={self.rule!r}: only rule={rule!r} reads it", value
                )
            elif value is None:
                fits = rule == "budget" or len(default) == self.num_levels
                _require(
                    fits,
                    name,
                    f"given ({self.num_levels} numbers) when num_levels is not {len(DEFAULT_LEVEL_THRESHOLDS)}",
                    value,
                )
                self._set(name, default)
        if self.rule == "budget":
            self._check_budget()
        elif self.rule == "threshold":
            self._check_shares("level_thresholds", self.num_levels)
        else:
            self._check_shares("level_fractions", self.num_levels)
            total = sum(self.level_fractions)
            _require(0 < total <= 1 + 1e-9, "level_fractions", "shares with a sum in (0, 1]", self.level_fractions)
        if self.similarity_thresholds is not None:
            self._check_similarity()

    def _check_budget(self) -> None:
        minimum = 1 / self.kv_block_size
        if self.target_error is None:
            self._check_compute_budget(minimum)
        else:
            for name in ("compute_budget", "budget_schedule"):
                rule = "left out (None) with target_error, which decides what is spent; give one of the two"
                _require(getattr(self, name) is None, name, rule, getattr(self, name))
            _require(0 < self.target_error < 1, "target_error", "a relative error in (0, 1)", self.target_error)
            self._set("target_error", float(self.target_error))
        if self.budget_schedule is not None:
            self._set("budget_schedule", read_points(self.budget_schedule, minimum))
        correction = self.value_correction
        _require(
            correction in VALUE_CORRECTIONS, "value_correction", f"one of {', '.join(VALUE_CORRECTIONS)}", correction
        )

    def _check_compute_budget(self, minimum: float) -> None:
        budget = self.compute_budget
        _require(0 < budget <= 1, "compute_budget", "in (0, 1], dense attention being 1", budget)
        rule = f"at least 1 / kv_block_size = {minimum:g}, one centroid a block; raise it or use larger kv blocks"
        _require(budget >= minimum, "compute_budget", rule, budget)
        self._set("compute_budget", float(budget))

    def _check_shares(self, name: str, count: int) -> None:
        values = getattr(self, name)
        _require(len(values) == count, name, f"{count} numbers, one a level (num_levels={self.num_levels})", values)
        _require(all(0 <= value <= 1 for value in values), name, "numbers in [0, 1]", values)

    def _check_similarity(self) -> None:
        values, count = self.similarity_thresholds, self.num_levels - 1
        _require(
            len(values) == count, "similarity_thresholds", f"{count} numbers, for levels 2 to {self.num_levels}", values
        )
        _require(all(-1 <= value <= 1 for value in values), "similarity_thresholds", "cosines in [-1, 1]", values)

    def _check_schedule(self) -> None:
        for name in ("dense_warmup", "dense_last"):
            _require(0 <= getattr(self, name) <= 1, name, "a share of the steps in [0, 1]", getattr(self, name))
        _require(all(layer >= 0 for layer in self.dense_layers), "dense_layers", "indices from 0", self.dense_layers)

    # -- dictionaries and files -----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values (tuples become lists), ready for YAML or JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.budget_schedule is not None:
            values["budget_schedule"] = [point.to_dict() for point in self.budget_schedule]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PSAConfig:
        """The config with these settings; what is left out keeps its default.

        Raises:
            ValueError: a key is unknown (the message lists the known ones) or a value breaks its rule.
        """
        if not isinstance(values, dict):
            raise ValueError(f"PSAConfig: expected a mapping of settings, but got {type(values).__name__}.")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise ValueError(f"PSAConfig: unknown settings {', '.join(unknown)}; known ones are {', '.join(known)}.")
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write the settings to a ``.yaml``, ``.yml`` or ``.json`` file, whole or not at all."""
        path = Path(path)
        if _file_format(path) == "json":
            text = json.dumps(self.to_dict(), indent=2) + "\n"
        else:
            text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> PSAConfig:
        """Read a file written by :meth:`save`, by hand, or by ``psa-tune`` (a preset: ``config`` beside what it is).

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not YAML/JSON, or holds unknown settings or bad values.
        """
        values = _read_mapping(Path(path))
        is_preset = "config" in values and values.keys() <= set(PRESET_KEYS)
        return cls.from_dict(values["config"] if is_preset else values)

    # -- presets --------------------------------------------------------------------------------------------------

    @classmethod
    def preset(cls, name: str) -> PSAConfig:
        """A named preset from ``configs/``. :meth:`presets` lists them.

        Raises:
            ValueError: there is no preset of that name (the message lists those there are).
        """
        path = configs_folder() / f"{name}.yaml"
        if name not in cls.presets():
            raise ValueError(f"PSAConfig: no preset {name!r}; there are {', '.join(cls.presets())}.")
        return cls.from_dict(_read_mapping(path).get("config", {}))

    @classmethod
    def presets(cls) -> dict[str, str]:
        """The presets' names, each with what it is and what it is based on."""
        files = sorted(configs_folder().glob("*.yaml"))
        return {file.stem: str(_read_mapping(file).get("description", "")) for file in files}


def _file_format(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"PSAConfig: a config file must end in .yaml, .yml or .json, but is {path.name!r}.")
    return "json" if suffix == ".json" else "yaml"


def _read_mapping(path: Path) -> dict[str, Any]:
    kind = _file_format(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if kind == "json" else yaml.safe_load(text)
    except (UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"PSAConfig: {path} is not valid {kind.upper()}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"PSAConfig: {path} must hold a mapping of settings, but holds a {type(values).__name__}.")
    return values


def configs_folder() -> Path:
    """``configs/`` inside an installed package, else beside the package in a checkout."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"
