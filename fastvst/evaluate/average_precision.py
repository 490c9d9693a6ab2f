"""Average precision of 3D boxes as the Omni3D evaluator computes it (COCO's rules with 3D IoU and depth ranges).

Every function works on one category at a time; nothing here knows of files. Written from the definition:

- A question's detections are taken in the order given (all scores tie, the sort is stable), at most 100.
- Each detection takes the free ground truth of highest IoU >= threshold (the later one of equals); ignored ground truth
  only if no other fits. A detection on ignored ground truth, or an unmatched one outside the depth range, is ignored.
- True and false positives are cumulated over all questions in their order, precision is made monotone from the right
  and read at 101 recall points (the first detection that reaches the recall; 0 where none does).

Because all scores tie, the order of questions and of boxes inside an answer changes the result: it is part of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

THRESHOLDS = np.linspace(0.05, 0.50, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MAX_DETECTIONS = 100
DEPTHS = {
    "all": (0.0, 1e5),
    "near": (0.0, 10.0),
    "medium": (10.0, 35.0),
    "far": (35.0, 1e5),
}  # metres, both ends inside


@dataclass(frozen=True)
class Question:
    """One image of one category.

    Attributes:
        iou: (D, G) float64, detections in emission order.
        detection_depth, truth_depth: (D,), (G,) metres.
        ignored: (G,) bool, ground truth that neither counts nor punishes.
    """

    iou: np.ndarray
    detection_depth: np.ndarray
    truth_depth: np.ndarray
    ignored: np.ndarray


@dataclass(frozen=True)
class Matches:
    """Result of one question in one depth range.

    Attributes:
        hit: (T, D) bool, matched to any ground truth.
        skipped: (T, D) bool, neither true nor false positive.
        positives: ground truth that counts.
    """

    hit: np.ndarray
    skipped: np.ndarray
    positives: int


def match(question: Question, depth: tuple[float, float]) -> Matches:
    """Greedy matching, all thresholds at once."""
    low, high = depth
    ignored = question.ignored | (question.truth_depth < low) | (question.truth_depth > high)
    iou, distance = question.iou[:MAX_DETECTIONS], question.detection_depth[:MAX_DETECTIONS]
    outside = (distance < low) | (distance > high)
    every, (detections, truths) = np.arange(len(THRESHOLDS)), iou.shape
    hit = np.zeros((len(THRESHOLDS), detections), dtype=bool)
    skipped = np.zeros_like(hit)
    if ignored.all() and outside.all():  # nothing of this question lies in the range
        return Matches(hit, ~skipped, 0)
    free = np.ones((len(THRESHOLDS), truths), dtype=bool)
    for d in range(detections if truths else 0):
        fits = free & (iou[d] >= THRESHOLDS[:, None])
        counted = fits & ~ignored
        fits = np.where(counted.any(1, keepdims=True), counted, fits)  # ignored ones only where no other fits
        values = np.where(fits, iou[d], -1.0)
        best = truths - 1 - values[:, ::-1].argmax(1)  # the last of equals
        hit[:, d] = fits.any(1)
        skipped[:, d] = hit[:, d] & ignored[best]
        free[every[hit[:, d]], best[hit[:, d]]] = False
    return Matches(hit, skipped | (~hit & outside), int((~ignored).sum()))


@dataclass(frozen=True)
class Pool:
    """All questions of one category, in order.

    Attributes:
        hit, counted: (T, N) bool of all detections; a detection that does not count is neither true nor false.
        starts, lengths: (Q,) where the detections of each question lie.
        positives: (Q,) ground truth that counts.
    """

    hit: np.ndarray
    counted: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    positives: np.ndarray


def pool(matches: Sequence[Matches]) -> Pool:
    """Put the questions of one category together."""
    lengths = np.array([m.hit.shape[1] for m in matches], dtype=np.int64)
    return Pool(
        hit=np.concatenate([m.hit for m in matches], axis=1),
        counted=~np.concatenate([m.skipped for m in matches], axis=1),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        positives=np.array([m.positives for m in matches], dtype=np.int64),
    )


def average_precision(category: Pool, times: np.ndarray | None = None) -> np.ndarray | None:
    """(T,) average precision; None if there is no ground truth that counts.

    times: (Q,) how often each question is taken, for the bootstrap; copies stand next to each other.
    """
    hit, counted, positives = category.hit, category.counted, int(category.positives.sum())
    if times is not None:
        positives = int(category.positives @ times)
        lengths = np.repeat(category.lengths, times)
        first = np.repeat(category.starts, times) - (np.cumsum(lengths) - lengths)
        index = np.repeat(first, lengths) + np.arange(int(lengths.sum()))
        hit, counted = hit[:, index], counted[:, index]
    if positives == 0:
        return None
    right = hit & counted
    true = np.cumsum(right, axis=1)
    false = np.cumsum(~hit & counted, axis=1)
    # Precision changes for the better only at true positives, so column k holds that of the k-th one, k = 1 ...
    table = np.zeros((len(hit), positives + 2))
    rows, columns = np.nonzero(right)
    k = true[rows, columns]
    table[rows, k] = k / (k + false[rows, columns] + np.spacing(1))
    table = np.maximum.accumulate(table[:, ::-1], axis=1)[:, ::-1]
    # ... and a recall point needs the smallest k with k / positives >= recall (at least one detection).
    needed = np.searchsorted(np.arange(positives + 1) / positives, RECALLS, side="left")
    return table[:, np.maximum(needed, 1)].sum(1) / len(RECALLS)
