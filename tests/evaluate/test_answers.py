import json

import numpy as np
import pytest

from fastvst.evaluate.answers import score
from fastvst.evaluate.statistics import best_constant, bootstrap

BOX = {"bbox_3d": [0.1, 0.2, 2.5, 1.0, 0.8, 0.6, 0.0, 0.25, 0.0], "label": "chair"}


def fenced(boxes):
    return "```json\n[\n" + ",\n".join("\t" + json.dumps(b, separators=(",", ":")) for b in boxes) + "\n]\n```"


@pytest.mark.parametrize(
    "response, value, expected",
    [
        ("trash can", "trash can", 1),
        (" The Trash  Can. ", "trash can", 1),
        ("can", "trash can", 0),
        ("", "left", 0),
        ("D point-D", "D point-D", 1),
        ("D. left and forward", "D. left and forward", 1),
        ("D", "D. left and forward", 1),
        ("A. left and forward", "D. left and forward", 0),
        ("Distance[a, b]=0.7m\nDistance[a, c]=1.2m\nSo, the answer is blinds.", "blinds", 1),
        ("<think>left, no, right</think> left", "left", 1),
    ],
)
def test_text(response, value, expected):
    assert score(response, {"type": "text", "value": value}) == expected


@pytest.mark.parametrize(
    "response, expected",
    [("71 cm", 1), ("0.71 m", 1), ("about 80", 0), ("75", 1), ("", 0), ("1,071 cm", 0), ("tall", 0), ("-71", 0)],
)
def test_number(response, expected):
    assert score(response, {"type": "number", "value": 71.0, "unit": "cm", "tolerance": 0.1}) == expected


def test_boxes():
    other = BOX | {"label": "table"}
    moved = BOX | {"bbox_3d": [3.0] + BOX["bbox_3d"][1:]}
    in_degrees = BOX | {"bbox_3d": BOX["bbox_3d"][:6] + [0.0, 45.0, 0.0]}
    answer = {"type": "boxes", "value": [in_degrees]}
    assert score(fenced([BOX]), answer) == 1.0
    assert score(fenced([moved]), answer) == 0.0
    assert score(fenced([other]), answer) == 0.0, "labels are compared"
    assert score(fenced([BOX, moved]), answer) == pytest.approx(2 / 3)
    assert score(fenced([BOX, BOX]), answer) == pytest.approx(2 / 3), "a true box is matched once"
    assert score("no boxes", answer) == 0.0
    assert score("```json\n[]\n```", {"type": "boxes", "value": []}) == 1.0


def test_unknown_type_is_an_error():
    with pytest.raises(ValueError, match="unknown answer type"):
        score("x", {"type": "poem", "value": "x"})


def test_bootstrap_equals_the_normal_interval_for_independent_scores():
    scores = np.random.default_rng(1).random(400) < 0.3
    interval = bootstrap(scores.astype(float).tolist(), range(400))
    half = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    assert interval.mean == pytest.approx(scores.mean())
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.15)


def test_bootstrap_is_wider_when_questions_share_rooms():
    scores = np.repeat(np.random.default_rng(2).random(40) < 0.5, 10).astype(float).tolist()
    alone = bootstrap(scores, range(400))
    shared = bootstrap(scores, np.repeat(np.arange(40), 10).tolist())
    assert shared.high - shared.low > 2 * (alone.high - alone.low)


def test_best_constant_beats_the_most_frequent_number():
    values = [50, 50, 50] + list(range(96, 105))  # 50 is the mode, but 100 is within 5 % of nine values
    gold = [{"type": "number", "value": float(v), "unit": "cm", "tolerance": 0.05} for v in values]
    assert 96 <= float(best_constant([f"{v} cm" for v in values], gold, score).split()[0]) <= 104
