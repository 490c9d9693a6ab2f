"""Intervals and baselines of scores."""

from __future__ import annotations

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


def bootstrap(scores: Sequence[float], clusters: Sequence[Any], *, draws: int = 2000, seed: int = 0) -> Interval:
    """Mean of `scores` with a 95 % percentile interval, resampling whole clusters.

    Questions about one room share its images and objects and are not independent. The bootstrap therefore draws rooms
    instead of questions (Efron & Tibshirani 1993, ch. 8).

    Args:
        scores: (n,) each in [0, 1].
        clusters: (n,) the room (or scene, or video) of each score.
    """
    if len(scores) == 0:
        raise ValueError("bootstrap() needs at least one score; got none")
    values = np.asarray(scores, dtype=np.float64)
    names, inverse = np.unique(np.asarray([str(c) for c in clusters]), return_inverse=True)
    sums = np.bincount(inverse, weights=values, minlength=len(names))
    counts = np.bincount(inverse, minlength=len(names))
    picks = np.random.default_rng(seed).integers(0, len(names), size=(draws, len(names)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


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
