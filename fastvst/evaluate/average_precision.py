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
import torch

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


def match_range(questions: Sequence[Question], whole: Sequence[Matches], depth: tuple[float, float]) -> list[Matches]:
    """`match` of every question in a depth range, from `whole`, the matches without a range: matching again only where
    a question lies partly inside."""
    low, high = depth
    made = []
    for question, found in zip(questions, whole, strict=True):
        depths = [*question.detection_depth.tolist(), *question.truth_depth.tolist()]
        nearest, farthest = min(depths, default=low), max(depths, default=low)
        if nearest >= low and farthest <= high:
            made.append(found)
        elif farthest < low or nearest > high:
            made.append(Matches(np.zeros_like(found.hit), np.ones_like(found.skipped), 0))
        else:
            made.append(match(question, depth))
    return made


def average_precision(category: Pool) -> np.ndarray | None:
    """(T,) average precision; None if there is no ground truth that counts."""
    positives = int(category.positives.sum())
    if positives == 0:
        return None
    right = category.hit & category.counted
    true = np.cumsum(right, axis=1)
    false = np.cumsum(~category.hit & category.counted, axis=1)
    # Precision changes for the better only at true positives, so column k holds that of the k-th one, k = 1 ...
    table = np.zeros((len(right), positives + 2))
    rows, columns = np.nonzero(right)
    k = true[rows, columns]
    table[rows, k] = k / (k + false[rows, columns] + np.spacing(1))
    table = np.maximum.accumulate(table[:, ::-1], axis=1)[:, ::-1]
    # ... and a recall point needs the smallest k with k / positives >= recall (at least one detection).
    needed = np.searchsorted(np.arange(positives + 1) / positives, RECALLS, side="left")
    return table[:, np.maximum(needed, 1)].sum(1) / len(RECALLS)


def resampled(category: Pool, times: np.ndarray, *, at_once: int = 25) -> np.ndarray:
    """(B, T) average precision of B bootstrap draws; nan in a draw without ground truth that counts.

    Each detection weighs as often as its question was drawn, and a draw's true and false positives are sums of weights.
    times: (B, Q), how often each question was drawn. at_once: draws per step; memory is about 25 x T x N x 40 bytes.
    """
    weights = np.repeat(times, category.lengths, axis=1).astype(np.float32)  # (B, N); counts are exact up to 2^24
    positives = (times @ category.positives).astype(np.float64)
    right = (category.hit & category.counted).astype(np.float32)
    wrong = (~category.hit & category.counted).astype(np.float32)
    result = np.full((len(times), len(right)), np.nan)
    drawn = np.nonzero(positives > 0)[0]
    for first in range(0, len(drawn), at_once):
        chosen = drawn[first : first + at_once]
        w, total = weights[chosen, None], positives[chosen, None, None]
        true, false = np.cumsum(right * w, axis=2), np.cumsum(wrong * w, axis=2)  # (b, T, N)
        precision = true / np.maximum(true + false, 1.0)
        precision = np.maximum.accumulate(precision[..., ::-1], axis=2)[..., ::-1]
        precision = np.pad(precision, ((0, 0), (0, 0), (0, 1)))  # 0 where a recall is never reached
        needed = np.ceil(RECALLS * total - 1e-9)
        needed += needed / total < RECALLS  # 7 / 10 < 0.7000000000000001, the 71st of RECALLS: as the loop above has it
        needed = np.broadcast_to(np.maximum(needed, 1.0), (*true.shape[:2], len(RECALLS)))
        index = torch.searchsorted(
            torch.from_numpy(true), torch.from_numpy(np.ascontiguousarray(needed, dtype=np.float32))
        ).numpy()
        result[chosen] = np.take_along_axis(precision, index, axis=2).mean(2, dtype=np.float64)
    return result
