"""Average precision of 3D boxes as the Omni3D evaluator computes it (COCO's rules with 3D IoU and depth ranges).

Every function works on one category. The rules:

- A question's detections keep their order (all scores are equal, and the sort is stable); at most 100 count.
- Each detection matches the free ground truth of the highest IoU >= threshold (of equals, the later one). It matches
  ignored ground truth only if no other fits. A detection on ignored ground truth, or an unmatched one outside the depth
  range, is ignored.
- True and false positives are accumulated over all questions in order. Precision is made monotone from the right and
  read at 101 recall points: at the first detection that reaches the recall, 0 if none does.

All scores are equal, so the result depends on the order of the questions and of the boxes inside an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastvst.evaluate.statistics import Interval, interval_of

THRESHOLDS = np.linspace(0.05, 0.50, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MAX_DETECTIONS = 100
AT = 2  # index of IoU 0.15 in THRESHOLDS
DRAWS = 200  # draws of the bootstrap; each one evaluates every category
DEPTHS = {
    "all": (0.0, 1e5),
    "near": (0.0, 10.0),
    "medium": (10.0, 35.0),
    "far": (35.0, 1e5),
}  # metres, both ends included


@dataclass(frozen=True)
class Question:
    """One image of one category.

    Attributes:
        iou: (D, G) float64, detections in emission order.
        detection_depth, truth_depth: (D,), (G,) metres.
        ignored: (G,) bool, ground truth that is neither a positive nor a miss.
    """

    iou: np.ndarray
    detection_depth: np.ndarray
    truth_depth: np.ndarray
    ignored: np.ndarray


@dataclass(frozen=True)
class Matches:
    """Result of one question in one depth range.

    Attributes:
        hit: (T, D) bool, matched to a ground truth.
        skipped: (T, D) bool, neither true nor false positive.
        positives: number of ground truths that count.
    """

    hit: np.ndarray
    skipped: np.ndarray
    positives: int


def match(question: Question, depth: tuple[float, float]) -> Matches:
    """Greedy matching, all thresholds at once."""
    return match_all([question], depth)[0]


def match_all(questions: Sequence[Question], depth: tuple[float, float]) -> list[Matches]:
    """`match` of every question. Questions of equal numbers of detections and ground truths are computed together."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, question in enumerate(questions):
        shapes.setdefault(question.iou[:MAX_DETECTIONS].shape, []).append(i)
    made: list[Matches | None] = [None] * len(questions)
    for chosen in shapes.values():
        for i, found in zip(chosen, _match_alike([questions[i] for i in chosen], depth), strict=True):
            made[i] = found
    return [found for found in made if found is not None]


def _match_alike(questions: Sequence[Question], depth: tuple[float, float]) -> list[Matches]:
    """Questions of one shape. Arrays are (Q, T, D) and (Q, T, G)."""
    low, high = depth
    iou = np.stack([q.iou[:MAX_DETECTIONS] for q in questions])
    distance = np.stack([q.detection_depth[:MAX_DETECTIONS] for q in questions])
    truth = np.stack([q.truth_depth for q in questions])
    ignored = np.stack([q.ignored for q in questions]) | (truth < low) | (truth > high)
    outside = (distance < low) | (distance > high)
    count, detections, truths = iou.shape
    hit = np.zeros((count, len(THRESHOLDS), detections), dtype=bool)
    skipped = np.zeros_like(hit)
    free = np.ones((count, len(THRESHOLDS), truths), dtype=bool)
    for d in range(detections if truths else 0):
        overlap = iou[:, None, d]
        bad = ignored[:, None]
        fits = free & (overlap >= THRESHOLDS[:, None])
        counted = fits & ~bad
        fits = np.where(counted.any(2, keepdims=True), counted, fits)  # ignored ground truth only where no other fits
        best = truths - 1 - np.where(fits, overlap, -1.0)[..., ::-1].argmax(2)  # (Q, T), the last of equals
        hit[..., d] = fits.any(2)
        skipped[..., d] = hit[..., d] & np.take_along_axis(ignored, best, axis=1)
        taken = np.nonzero(hit[..., d])
        free[(*taken, best[taken])] = False
    skipped |= ~hit & outside[:, None]
    positives = (~ignored).sum(1).tolist()
    return [Matches(*each) for each in zip(hit, skipped, positives, strict=True)]


@dataclass(frozen=True)
class Pool:
    """All questions of one category, in order.

    Attributes:
        hit, counted: (T, N) bool of all detections; a detection that does not count is neither a true nor a false
            positive.
        starts, lengths: (Q,) first detection and number of detections of each question.
        positives: (Q,) numbers of ground truths that count.
    """

    hit: np.ndarray
    counted: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    positives: np.ndarray


def pool(matches: Sequence[Matches]) -> Pool:
    """Join the questions of one category."""
    lengths = np.array([m.hit.shape[1] for m in matches], dtype=np.int64)
    return Pool(
        hit=np.concatenate([m.hit for m in matches], axis=1),
        counted=~np.concatenate([m.skipped for m in matches], axis=1),
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        positives=np.array([m.positives for m in matches], dtype=np.int64),
    )


def match_ranges(questions: Sequence[Question]) -> dict[str, list[Matches]]:
    """`match_all` in every range of DEPTHS.

    Only questions that lie partly inside a range are matched again. A range that contains every question shares the
    list of "all".
    """
    depths = [[*q.detection_depth.tolist(), *q.truth_depth.tolist()] for q in questions]
    spans = np.array([(min(d), max(d)) if d else (np.nan, np.nan) for d in depths]).reshape(-1, 2)
    made = {"all": match_all(questions, DEPTHS["all"])}
    for label, (low, high) in DEPTHS.items():
        apart = (spans[:, 1] < low) | (spans[:, 0] > high)
        partly = ~apart & ((spans[:, 0] < low) | (spans[:, 1] > high))
        if label == "all" or not (apart | partly).any():
            made[label] = made["all"]
            continue
        found = list(made["all"])
        for i in np.nonzero(apart)[0]:
            found[i] = Matches(np.zeros_like(found[i].hit), np.ones_like(found[i].skipped), 0)
        again = np.nonzero(partly)[0].tolist()
        for k, one in zip(again, match_all([questions[i] for i in again], (low, high)), strict=True):
            found[k] = one
        made[label] = found
    return made


def average_precision(category: Pool) -> np.ndarray | None:
    """(T,) average precision; None if there is no ground truth that counts."""
    positives = int(category.positives.sum())
    if positives == 0:
        return None
    right = category.hit & category.counted
    true = np.cumsum(right, axis=1)
    false = np.cumsum(~category.hit & category.counted, axis=1)
    # Precision rises only at true positives: column k holds the precision at the k-th one, k = 1 ...
    table = np.zeros((len(right), positives + 2))
    rows, columns = np.nonzero(right)
    k = true[rows, columns]
    table[rows, k] = k / (k + false[rows, columns] + np.spacing(1))
    table = np.maximum.accumulate(table[:, ::-1], axis=1)[:, ::-1]
    # ... and a recall point needs the smallest k with k / positives >= recall (at least one detection).
    needed = np.searchsorted(np.arange(positives + 1) / positives, RECALLS, side="left")
    return table[:, np.maximum(needed, 1)].sum(1) / len(RECALLS)


def resampled(category: Pool, times: np.ndarray) -> np.ndarray:
    """(B, T) average precision of B bootstrap draws; nan in a draw without ground truth that counts.

    The weight of a detection is the number of times that its question was drawn; true and false positives of a draw are
    sums of weights. Only the columns of true positives matter: between two of them precision falls and recall does not
    change. Memory is about B x N x 16 bytes.

    Args:
        times: (B, Q), how often each question was drawn.
    """
    positives = times @ category.positives
    drawn = np.nonzero(positives > 0)[0]
    weights = np.repeat(times[drawn], category.lengths, axis=1).astype(np.int32)  # (b, N)
    reached = _recalls_reached(positives[drawn])
    first = np.arange(len(drawn))[:, None] * reached.shape[1]  # first index of each draw in the flat table
    result = np.full((len(times), len(category.hit)), np.nan)
    total = np.zeros((0, 0), dtype=np.int32)
    for t, (hit, counted) in enumerate(zip(category.hit, category.counted, strict=True)):
        if t == 0 or (counted != category.counted[t - 1]).any():  # they differ only if ignored ground truth was matched
            total = np.cumsum(np.where(counted, weights, 0), axis=1, dtype=np.int32)
        columns = np.nonzero(hit & counted)[0]
        true = np.cumsum(weights[:, columns], axis=1, dtype=np.int32)
        precision = true.astype(np.float32) / np.maximum(total[:, columns], 1).astype(np.float32)
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recalls = reached.ravel().take(true + first)
        gained = np.diff(recalls, axis=1, prepend=np.float32(0.0))
        result[drawn, t] = np.einsum("bn,bn->b", gained, precision, dtype=np.float64) / len(RECALLS)
    return result


def _recalls_reached(positives: np.ndarray) -> np.ndarray:
    """(b, 1 + most positives) float32: how many of RECALLS n true positives reach in each draw; n = 0 reaches none."""
    counts = np.arange(positives.max(initial=0) + 1)
    reached = np.searchsorted(RECALLS, counts / positives[:, None], side="right")
    return np.where(counts > 0, reached, 0).astype(np.float32)


def by_category(
    matches: Sequence[Matches], members: Mapping[str, Sequence[int]], images: Sequence[str], seed: int = 0
) -> dict[str, np.ndarray]:
    """Category -> (1 + DRAWS, T) average precision: of the data, then of each bootstrap draw of whole images.

    The order is kept. A draw without ground truth gives nan. Categories without ground truth are left out.

    Args:
        members: category -> indices of its questions in `matches`.
        images: the image (or room) of each question; the bootstrap draws whole ones.
    """
    names, inverse = np.unique(images, return_inverse=True)
    rng = np.random.default_rng(seed)
    times = np.stack([np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names)) for _ in range(DRAWS)])
    table = {}
    for name, chosen in members.items():
        category = pool([matches[i] for i in chosen])
        value = average_precision(category)
        if value is not None:
            table[name] = np.concatenate([value[None], resampled(category, times[:, inverse[list(chosen)]])])
    return table


def category_mean(table: Mapping[str, np.ndarray], images: int, threshold: int | None = None) -> Interval:
    """Mean over categories at one threshold, or at all, with its interval; `images` were drawn."""
    values = np.stack(list(table.values()))
    values = values.mean(-1) if threshold is None else values[..., threshold]
    present = ~np.isnan(values)
    means = np.where(present, values, 0.0).sum(0) / np.maximum(present.sum(0), 1)
    draws = means[1:][present[:, 1:].any(0)]
    return interval_of(float(means[0]), draws if len(draws) else means[:1], images)
