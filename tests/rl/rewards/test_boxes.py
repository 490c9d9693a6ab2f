"""The reward of boxes: every form of the truth, brute force over assignments, and responses in a wrong format."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from fastvst.rl.rewards.verifiable import score
from fastvst.spatial.boxes import format_boxes, iou_3d

TRUTH = np.array(
    [[0, 0, 3, 1, 1, 1, 0, 30, 0], [2, 0, 4, 1, 2, 1, 10, 0, 0], [-2, 0.5, 5, 0.5, 0.5, 0.5, 0, 0, 45]], dtype=float
)


def _text(boxes: np.ndarray) -> str:
    return format_boxes(boxes, ["chair"] * len(boxes))


def test_perfect_boxes_score_one_in_any_order_and_with_any_form_of_the_truth() -> None:
    as_list = [{"bbox_3d": box.tolist(), "label": "chair"} for box in TRUTH]
    sample_answer = {"type": "boxes", "value": as_list, "unit": "m, degrees"}
    raw = _text(TRUTH).removeprefix("```json\n").removesuffix("\n```")
    for truth in (
        _text(TRUTH),
        raw,
        as_list,
        sample_answer,
        {"type": "boxes", "value": _text(TRUTH), "mode": ["bbox3d"]},
    ):
        found = score(_text(TRUTH[::-1]), truth, ["bbox3d"])
        assert found.accuracy > 0.97 and found.format == 1  # texts have two decimals, also for angle / 180


def test_small_angles_are_degrees_in_a_sample_and_half_turns_in_a_list() -> None:
    box = [0, 0, 3, 1, 1, 4, 0, 0.5, 0]
    straight = _text(np.array([[*box[:6], 0, 0, 0]], dtype=float))
    listed = [{"bbox_3d": box, "label": "chair"}]
    assert score(straight, {"type": "boxes", "value": listed, "unit": "m, degrees"}).accuracy > 0.95
    assert score(straight, listed, ["bbox3d"]).accuracy < 0.8  # 0.5 is then a quarter turn of a long box


def test_accuracy_is_half_iou_half_f1_of_the_best_assignment() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        guess = TRUTH[: rng.integers(1, 4)] + rng.normal(0, 0.15, (1, 9)) * ([1] * 6 + [20] * 3)
        guess[:, 3:6] = np.abs(guess[:, 3:6]) + 0.1
        text = _text(guess)
        boxes = np.array([e["bbox_3d"] for e in json.loads(text.split("\n", 1)[1].rsplit("\n", 1)[0])])
        boxes[:, 6:] *= 180
        iou = iou_3d(boxes, TRUTH)
        best = max(
            (iou[range(len(boxes)), list(order)] for order in itertools.permutations(range(3), len(boxes))),
            key=lambda pairs: pairs.sum(),
        )
        hits = (best >= 0.25).sum()
        precision = hits / len(boxes)
        recall = hits / 3
        f1 = 2 * precision * recall / (precision + recall) if hits else 0
        assert score(text, [{"bbox_3d": b} for b in TRUTH.tolist()], ["bbox3d"]).accuracy == pytest.approx(
            0.5 * best.sum() / 3 + 0.5 * f1
        )


@pytest.mark.parametrize(
    ("response", "accuracy", "shape"),
    [
        ("no boxes", 0, 0),
        ("```json\n[]\n```", 0, 0),
        ("```json\n{\n```", 0, 0),
        ('```json\n[{"bbox_3d":[1,2,3],"label":"chair"}]\n```', 0, 0),
        ('```json\n[{"bbox_3d":[1,2,3,1,1,1,0,0,"x"],"label":"chair"}]\n```', 0, 0),
        ('```json\n[{"bbox_3d":[90,2,3,1,1,1,0,0,0],"label":"chair"}]\n```', 0, 1),
        ('```json\n[{"bbox_3d":[0,0,3,1,1,1,0,0.166667,0]}]\n```', None, 0),  # no label: accuracy, but no format
    ],
)
def test_boxes_in_a_wrong_format(response: str, accuracy: float | None, shape: int) -> None:
    found = score(response, _text(TRUTH[:1]), ["bbox3d"])
    assert found.format == shape
    assert found.accuracy == accuracy if accuracy is not None else found.accuracy > 0.95
