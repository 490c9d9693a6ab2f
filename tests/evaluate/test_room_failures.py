import math
import re

import pytest

from fastvst.data.sample import Sample
from fastvst.evaluate.answers import score
from fastvst.evaluate.room_failures import against_distance, chosen, confusions, error, largest_errors
from fastvst.evaluate.rooms import Example, Question

BOX = {"bbox_3d": [0.0, 0.0, 3.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0], "label": "chair"}


def example(task, answer, prediction, **facts):
    messages = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "this"}]
    sample = Sample.from_messages(messages, id="1", metadata={"task": task, **facts}, answer=answer)
    return Example(Question(sample, task, "1", "Which?", answer), prediction, score(prediction, answer))


def choice(value, *options, **more):
    return {"type": "choice", "value": value, "candidates": list(options), **more}


def cells(table):
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def test_every_wrong_answer_is_in_the_column_of_what_was_said():
    options = ("left", "right", "up")
    said = [("left", "left"), ("left", "right"), ("left", "no idea"), ("up", "Right."), ("up", "up")]
    rows = [example("camera_motion", choice(true, *options), text) for true, text in said]
    header, *lines = cells(confusions(rows))
    assert header == ["true option", "said: left", "said: up", "said: another option", "said: no option", "questions"]
    assert lines == [["left", "1", "0", "1", "1", "3"], ["up", "0", "1", "1", "0", "2"]]


def test_many_different_options_are_counted_by_their_place():
    rows = []
    for k in range(20):
        options = [f"thing {k}", f"other {k}"]
        rows.append(example("distance", choice(options[k % 2], *options), options[0]))
    header, *lines = cells(confusions(rows))
    assert header == ["true option, by its place in the question", "said: first", "questions"]
    assert lines == [["first", "10", "10"], ["second", "10", "10"]]


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("B", "up"), ("B. up", "up"), ("<think>left</think>A. left", "left"), ("perhaps", None), ("", None)],
)
def test_letters_state_options(prediction, expected):
    assert chosen(example("t", choice("up", "left", "up", letter="B"), prediction)) == expected


def test_errors():
    number = {"type": "number", "value": 50, "unit": "cm", "tolerance": 0.1}
    boxes = {"type": "boxes", "value": [BOX], "tolerance": 0.25}
    near = '```json\n[{"bbox_3d":[0.5,0,3,1,1,1,0,0,0],"label":"chair"}]\n```'
    assert error(example("m", number, "0.4 m")) == pytest.approx(0.2)
    assert error(example("m", number, "50 cm")) == 0.0 and error(example("m", number, "long")) == math.inf
    assert error(example("d", boxes, near)) == pytest.approx(1 - 0.5 / 1.5)
    assert error(example("d", boxes, "none")) == math.inf
    assert error(example("c", choice("a", "a", "b"), "b")) == 1.0


def test_the_largest_errors_first_and_only_readable_ones():
    number = {"type": "number", "value": 50, "unit": "cm", "tolerance": 0.1}
    rows = [example("m", number, f"{said} cm") for said in (50, 100, 60)] + [example("m", number, "?")]
    rows.append(example("c", choice("a", "a", "b"), "b"))
    assert [one.prediction for one in largest_errors(rows, 2)] == ["100 cm", "60 cm"]


def test_scores_by_distance():
    """Eight depth questions: right where the points are far apart, wrong where they are close together."""
    rows = []
    for k in range(8):
        points = [[0, 0, 2.0, "A"], [0, 0, 2.0 + 0.1 * (k + 1), "B"]]
        rows.append(example("depth_comparison", choice("A", "A", "B"), "A" if k >= 4 else "B", points=points))
    charts = re.findall(r"<svg.*?</svg>", against_distance(rows))
    assert len(charts) == 2  # by distance, and by how much farther
    assert re.findall(r">([\d.]+) % of 2<", charts[1]) == ["0.0", "0.0", "100.0", "100.0"]
    assert against_distance(rows[:7]) == ""  # too few
