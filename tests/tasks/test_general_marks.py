"""Lists about the marks of one image: every reply agrees with the pixels that are drawn."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from fastvst.data.sample import Sample
from fastvst.generate.presets import BASE
from fastvst.generate.rooms import scene_samples
from fastvst.scenes.scene import Scene
from fastvst.spatial import draw
from fastvst.tasks.general_marks import ORDER_LISTS
from fastvst.tasks.looks import GRID, SIZE

SPOT = re.compile(r"\((\d+), (\d+)\)")
AXES = {"farther left": (0, 1), "farther right": (0, -1), "higher": (1, 1), "lower": (1, -1)}
BY_LIST = {text: AXES[word.removesuffix(" in the image")] for word, text in ORDER_LISTS.items()}


@pytest.fixture(scope="module")
def rows(scenes: list[Scene]) -> list[Sample]:
    made = [row for number, scene in enumerate(scenes) for row in scene_samples(scene, number, BASE)]
    return [row for row in made if row.metadata["task"] == "general_marks"]


def turns(row: Sample) -> list[tuple[str, str]]:
    said = [m["content"][-1]["text"] for m in row.messages]
    return list(zip(said[::2], said[1::2], strict=True))


def drawn(row: Sample) -> dict[str, np.ndarray]:
    """Middle (x, y), pixels of SIZE, of the dots, rings or boxes of each colour; boxes that another covers are left
    out."""
    (part,) = row.parts("image")
    image = np.asarray(part["image"]).astype(int)
    scale = np.array(SIZE) / image.shape[1::-1]
    found = {}
    for name, colour in draw.COLOURS.items():
        v, u = np.nonzero((image == np.array(colour)).all(-1))
        if len(v) >= 8:
            found[name] = np.array([(u.min() + u.max() + 1) / 2, (v.min() + v.max() + 1) / 2]) * scale
    return found


def items(reply: str) -> list[tuple[str, str]]:
    return [tuple(item.split(": ")) for item in reply.split("; ")]


def test_places_parts_and_orders_are_those_of_the_pixels(rows: list[Sample]) -> None:
    checked: Counter[str] = Counter()
    for row in rows:
        if any("box" in question for question, _ in turns(row)):
            continue
        at = drawn(row)
        for question, reply in turns(row):
            where = (row.id, question, reply)
            word = next((w for w in AXES if w in question), None)
            listed = next((w for w in BY_LIST if w in question), None)
            if re.match(r"Where is each|Give the pixel of each", question):
                assert {colour for colour, _ in items(reply)} == set(at), where
                for colour, spot in items(reply):
                    assert np.abs(at[colour] - [int(n) for n in SPOT.fullmatch(spot).groups()]).max() <= GRID, where
                checked["places"] += 1
            elif "which part" in question:
                for colour, part in items(reply):
                    x, y = at[colour] / SIZE * 3
                    row_of, column_of = part.split()
                    assert abs(("top", "middle", "bottom").index(row_of) + 0.5 - y) < 0.6, where
                    assert abs(("left", "centre", "right").index(column_of) + 0.5 - x) < 0.6, where
                checked["parts"] += 1
            elif word and (asked := re.findall("|".join(at), question)):
                axis, sign = AXES[word]
                assert reply == min(asked, key=lambda c, a=axis, s=sign: s * at[c][a]), where
                checked["pairs"] += 1
            elif listed:
                axis, sign = BY_LIST[listed]
                assert reply.split(", ") == sorted(at, key=lambda c, a=axis, s=sign: s * at[c][a]), where
                checked["lists"] += 1
            elif question.startswith("Compare") or "ends" in question:
                asked = re.findall("|".join(at), question) or list(at)
                for direction, colour in items(reply):
                    axis, sign = AXES[direction]
                    assert colour == min(asked, key=lambda c, a=axis, s=sign: s * at[c][a]), where
                    checked["compared"] += 1
    assert len(checked) == 5 and min(checked.values()) >= 5, checked


def test_objects_and_marks_name_each_other(rows: list[Sample]) -> None:
    """The list of marks by object is the list of objects by mark turned round, less classes that appear twice."""
    checked = 0
    for row in rows:
        said = turns(row)
        by_mark = next((r for q, r in said if re.match(r"Name the object at each|What is at each", q)), None)
        by_object = next((r for q, r in said if q.endswith("each object?") or q.endswith("of each object.")), None)
        if by_mark is not None and by_object is not None:
            names = dict(items(by_mark))
            single = {name: colour for colour, name in names.items() if list(names.values()).count(name) == 1}
            assert dict(items(by_object)) == single
            checked += 1
        for question, reply in said:
            one = re.fullmatch(r"What is at (\w+)\?", question)
            if one and one[1] in draw.COLOURS and by_mark is not None:
                assert dict(items(by_mark))[one[1]] == reply
    assert checked >= 5


def test_no_question_is_about_depth_or_metres(rows: list[Sample]) -> None:
    said = " ".join(text for row in rows for turn in turns(row) for text in turn).lower()
    assert not re.search(r"closer|nearer|depth|metre|meter|camera| cm\b", said)
