"""Intervals and baselines of scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.mean:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson(mean: float, count: float) -> Interval:
    """Wilson's 95 % interval (1927) of a share `mean` of `count` independent trials; 0 of 10 gives [0, 0.278]."""
    square = Z * Z / count
    centre = (mean + square / 2) / (1 + square)
    half = math.sqrt(max(mean * (1 - mean), 0.0) * square + square * square / 4) / (1 + square)
    return Interval(mean, max(min(centre - half, mean), 0.0), min(max(centre + half, mean), 1.0))


def interval_of(mean: float, draws: np.ndarray, clusters: float, *, share: bool = True) -> Interval:
    """The 95 % percentile interval of bootstrap draws; Wilson's where all draws are equal.

    Equal draws (every answer right, every answer wrong, a single scene) say nothing about the spread. Wilson's interval
    then takes each cluster as one trial.

    Args:
        clusters: number of independent units.
        share: whether the scores are in [0, 1]; otherwise equal draws give an interval without width.
    """
    low, high = np.percentile(draws, [2.5, 97.5])
    if share and high - low < 1e-12:
        return wilson(min(max(mean, 0.0), 1.0), clusters)
    return Interval(mean, float(low), float(high))


def bootstrap(
    scores: Sequence[float], clusters: Sequence[Any], *, draws: int = 2000, seed: int = 0, trials: bool = True
) -> Interval:
    """Mean of `scores` with a 95 % percentile interval, resampling whole clusters.

    Questions about one room share its images and objects and are not independent. The bootstrap therefore draws rooms
    instead of questions (Efron & Tibshirani 1993, ch. 8). Where all draws are equal, as at 0 % and 100 %, the interval
    is Wilson's with one trial per cluster.

    Args:
        scores: (n,).
        clusters: (n,) the room (or scene, or video) of each score.
        trials: the scores are results of answers. False for expected scores, which are exact: equal ones keep an
            interval without width.
    """
    if len(scores) == 0:
        raise ValueError("bootstrap() needs at least one score; got none")
    values = np.asarray(scores, dtype=np.float64)
    names, inverse = np.unique(np.asarray([str(c) for c in clusters]), return_inverse=True)
    sums = np.bincount(inverse, weights=values, minlength=len(names))
    counts = np.bincount(inverse, minlength=len(names))
    picks = np.random.default_rng(seed).integers(0, len(names), size=(draws, len(names)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    share = trials and bool(values.min() >= 0.0 and values.max() <= 1.0)
    return interval_of(float(values.mean()), means, len(names), share=share)


def best_constant(
    answers: Sequence[str], gold: Sequence[Any], score: Callable[[str, Any], float], *, candidates: int = 40
) -> str:
    """The constant answer that scores best on the *training* rows.

    For exact matches it is the majority answer, for numbers the constant with the most training answers in its
    tolerance. Only the most frequent `candidates` are tried.
    """
    values, counts = np.unique(np.asarray(answers), return_counts=True)
    frequent = values[np.argsort(-counts, kind="stable")[:candidates]]
    return str(max(frequent, key=lambda text: (sum(score(str(text), g) for g in gold), str(text))))
