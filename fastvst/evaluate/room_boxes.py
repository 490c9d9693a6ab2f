"""3D boxes of the rooms benchmark: AP at IoU 0.15, mean matched IoU, and the mean box as a blind baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastvst.evaluate.answers import normalise
from fastvst.evaluate.average_precision import AT, DEPTHS, Question, by_category, category_mean, match_all
from fastvst.evaluate.statistics import Interval, bootstrap
from fastvst.spatial.boxes import greedy_matches, iou_3d, iou_3d_sets

Labelled = Mapping[str, np.ndarray]  # label -> (N, 9) boxes: centre and size in m, angles in degrees
ROTATIONS = 24  # orientations that the mean box is tried with
KNOWN = 200  # training boxes of a class that the orientation is chosen by
TOUCHING = float(np.finfo(np.float64).tiny)  # any IoU above 0
ANY = ""  # the class of all boxes together


@dataclass(frozen=True)
class BoxScores:
    """AP at IoU 0.15 (mean over classes), and the mean over true boxes of the IoU with the box matched to each."""

    precision: Interval
    matched: Interval


def labelled(boxes: np.ndarray, labels: Sequence[str]) -> dict[str, np.ndarray]:
    """Boxes by label, in their order. Labels are compared as `answers.score` compares them."""
    names = [normalise(label) for label in labels]
    return {name: boxes[[n == name for n in names]] for name in dict.fromkeys(names)}


def of_truth(truth: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The true boxes of a question, a list of {"bbox_3d": 9 numbers in m and degrees, "label"}."""
    return labelled(np.array([t["bbox_3d"] for t in truth], dtype=np.float64), [t["label"] for t in truth])


def score_boxes(found: Sequence[Labelled], truth: Sequence[Labelled], rooms: Sequence[str]) -> BoxScores:
    """Scores of the boxes of some questions.

    A question of several classes counts as one question for each class, as in Omni3D. Boxes of a class that a question
    does not have count as false there.

    Args:
        found, truth: the boxes of each question.
        rooms: room of each question; intervals draw rooms.
    """
    none = np.zeros((0, 9))
    pairs = [(i, name) for i, real in enumerate(truth) for name in dict.fromkeys([*real, *found[i]])]
    ious = iou_3d_sets([(found[i].get(name, none), truth[i].get(name, none)) for i, name in pairs])
    questions = [Question(u, np.zeros(len(u)), np.zeros(u.shape[1]), np.zeros(u.shape[1], dtype=bool)) for u in ious]
    members: dict[str, list[int]] = {}
    for k, (_, name) in enumerate(pairs):
        members.setdefault(name, []).append(k)
    table = by_category(match_all(questions, DEPTHS["all"]), members, [rooms[i] for i, _ in pairs])
    overlaps = [(float(value), rooms[i]) for u, (i, _) in zip(ious, pairs, strict=True) for value in matched_iou(u)]
    values, places = zip(*overlaps, strict=True)
    return BoxScores(category_mean(table, len(set(rooms)), AT), bootstrap(values, places))


def matched_iou(iou: np.ndarray) -> np.ndarray:
    """(G,) IoU of each true box with the predicted box that is matched to it, 0 without one.

    Matches are one to one and greedy by IoU.

    Args:
        iou: (D, G), of predicted and true boxes.
    """
    result = np.zeros(iou.shape[1])
    for row, column in greedy_matches(iou, TOUCHING):
        result[column] = iou[row, column]
    return result


def mean_boxes(training: Sequence[Labelled]) -> dict[str, np.ndarray]:
    """The mean box of each class of the training questions, (1, 9), and of all classes under `ANY`.

    Centre and size are means. Angles have no mean that is a box's: of the orientations of up to 24 training boxes the
    one is taken whose box has the highest mean IoU with the training boxes.
    """
    groups: dict[str, list[np.ndarray]] = {ANY: []}
    for boxes in training:
        for name, found in boxes.items():
            groups.setdefault(name, []).append(found)
            groups[ANY].append(found)
    return {name: _mean_box(np.concatenate(parts)) for name, parts in groups.items() if parts}


def _mean_box(boxes: np.ndarray) -> np.ndarray:
    candidates = np.repeat(boxes.mean(0, keepdims=True), min(len(boxes), ROTATIONS), axis=0)
    candidates[:, 6:] = boxes[: len(candidates), 6:]
    best = int(iou_3d(candidates, boxes[:KNOWN]).mean(1).argmax())
    return candidates[best : best + 1]


def guess(means: Mapping[str, np.ndarray], truth: Labelled) -> dict[str, np.ndarray]:
    """The answer of the mean-box baseline: one mean box for each class that the question names."""
    return {name: means.get(name, means[ANY]) for name in truth}
