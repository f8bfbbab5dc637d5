"""Confidence intervals of means over clips."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES, SEED = 9999, 0
FEWEST = 3  # with two groups an interval says nothing but the two


@dataclass(frozen=True)
class Mean:
    """A mean and its confidence interval.

    Attributes:
        value: The mean; None without any number.
        low, high: Ends of the interval; None where ``reason`` says why there is none.
        count: Numbers that went in.
        groups: Groups that they came in.
    """

    value: float | None
    low: float | None
    high: float | None
    count: int
    groups: int
    reason: str | None = None


def mean_with_interval(
    values: Sequence[float | None], groups: Sequence[Hashable] | None = None, confidence: float = 0.95
) -> Mean:
    """The mean of the numbers, with a bootstrap interval (bias-corrected and accelerated, by scipy).

    Numbers of one group (the seeds of a prompt) are not independent: first each group is averaged, and the groups are
    drawn again and again. The mean is that of the groups, so that each counts alike.

    Args:
        values: Finite numbers; None is left out.
        groups: The group of each number; default each is one.
        confidence: In (0, 1).

    Raises:
        ValueError: a number is not finite, or ``confidence`` is not in (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"mean_with_interval: confidence must be in (0, 1), but is {confidence!r}.")
    chosen: dict[Hashable, list[float]] = {}
    for group, value in zip(range(len(values)) if groups is None else groups, values, strict=True):
        if value is None:
            continue
        if not math.isfinite(value):
            raise ValueError(f"mean_with_interval: values must be finite, but hold {value!r}.")
        chosen.setdefault(group, []).append(value)
    count = sum(len(numbers) for numbers in chosen.values())
    if not chosen:
        return Mean(None, None, None, 0, 0, "there is nothing to average.")
    means = np.array([np.mean(numbers) for numbers in chosen.values()])
    value = float(means.mean())
    if len(means) < FEWEST:
        reason = f"an interval needs at least {FEWEST} prompts, and there are {len(means)}."
        return Mean(value, None, None, count, len(means), reason)
    low, high = _bootstrap(means, confidence)
    return Mean(value, low, high, count, len(means))


def _bootstrap(means: np.ndarray, confidence: float) -> tuple[float, float]:
    from scipy.stats import DegenerateDataWarning, bootstrap

    if np.ptp(means) == 0:
        return float(means[0]), float(means[0])
    options = {"confidence_level": confidence, "n_resamples": RESAMPLES, "vectorized": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)
        interval = bootstrap((means,), np.mean, rng=np.random.default_rng(SEED), **options).confidence_interval
        if not math.isfinite(interval.low) or not math.isfinite(interval.high):  # too few different means for BCa
            generator = np.random.default_rng(SEED)
            interval = bootstrap((means,), np.mean, rng=generator, method="percentile", **options).confidence_interval
    return float(interval.low), float(interval.high)
