"""General questions: every reply is true in the image, no turn tells another, none is one of the nineteen tasks."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter

import numpy as np
import pytest

from fastvst.cli import compare_rooms
from fastvst.data.sample import Sample
from fastvst.evaluate import rooms
from fastvst.evaluate.answers import score
from fastvst.generate.parquet import to_row
from fastvst.generate.presets import BASE, GENERAL
from fastvst.generate.rooms import SPLITS, room_seed, scene_samples
from fastvst.scenes.scene import Scene
from fastvst.spatial import draw
from fastvst.tasks import GENERAL as GENERAL_TASKS
from fastvst.tasks import GENERAL_PAIRS, PAIRS, SINGLE, WALKS
from fastvst.tasks.looks import GRID, SIZE

PLACE = re.compile(r"\((\d+), (\d+)\)")
ORDERS = {"farther left": (0, 1), "farther right": (0, -1), "higher": (1, 1), "lower": (1, -1)}


@pytest.fixture(scope="module")
def talks(scenes: list[Scene]) -> list[Sample]:
    """Conversations; the lists of `general_marks`, whose turns tell the same facts, have a test of their own."""
    rows = [row for number, scene in enumerate(scenes) for row in scene_samples(scene, number, BASE)]
    return [row for row in rows if row.metadata["task"] != "general_marks"]


@pytest.fixture(scope="module")
def single(scenes: list[Scene]) -> list[Sample]:
    many = dataclasses.replace(GENERAL, rows={"general_question": 8.0, "general_pair_question": 3.0})
    return [row for number, scene in enumerate(scenes) for row in scene_samples(scene, number, many)]


def turns(row: Sample) -> list[tuple[str, str]]:
    """(question, reply) of a row."""
    said = [m["content"][-1]["text"] for m in row.messages]
    return list(zip(said[::2], said[1::2], strict=True))


def pixels(row: Sample, question: str) -> np.ndarray:
    """The image (H, W, 3) that a question is about."""
    images = [part["image"] for part in row.parts("image")]
    return np.asarray(images[1 if question.find("image 2") >= 0 else 0]).astype(int)


def centre(image: np.ndarray, colour: str) -> np.ndarray | None:
    """Middle (x, y), pixels of SIZE, of the pixels that have exactly the colour of a mark."""
    rows, columns = np.nonzero((image == np.array(draw.COLOURS[colour])).all(-1))
    if len(rows) < 8:
        return None
    scale = np.array(SIZE) / image.shape[1::-1]
    return np.array([(columns.min() + columns.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2]) * scale


def test_marks_are_where_the_replies_say(talks: list[Sample]) -> None:
    found: Counter[str] = Counter()
    for row in talks:
        for question, reply in turns(row):
            if "general_text" in row.metadata["task"]:
                continue
            image = pixels(row, question)
            place = PLACE.fullmatch(reply)
            asked = re.search(r"(\w+) (point|circle)\b(?! in the|s)", question)
            if place and asked and asked[1] in draw.COLOURS:
                at = centre(image, asked[1])
                assert at is not None and np.abs(at - [int(n) for n in place.groups()]).max() <= GRID, (
                    row.id,
                    question,
                )
                found["place"] += 1
            titles = re.findall(r"the (\w+) (?:point|circle|box)\b", question, re.IGNORECASE)
            word = next((w for w in ORDERS if f" {w}" in question), None)
            if word and len(titles) == 2 and "first image" not in question:
                axis, sign = ORDERS[word]
                first, second = (centre(image, title) for title in titles)
                assert first is not None and second is not None
                best = titles[int(sign * (first[axis] - second[axis]) > 0)]
                assert reply.split()[0] == best, (row.id, question)
                found["order"] += 1
            if question.startswith("How many") and "drawn" in question:
                drawn = sum(centre(image, colour) is not None for colour in draw.COLOURS)
                assert int(reply) == drawn, (row.id, question)
                found["count"] += 1
    assert min(found.values()) >= 10 and len(found) == 3, found


def test_objects_are_where_the_replies_say(talks: list[Sample], scenes: list[Scene]) -> None:
    """By the id map: the pixel that a reply states shows the object, with the rounding of coordinates."""
    named = {scene.name: scene for scene in scenes}
    checked = 0
    for row in talks:
        if row.metadata["task"] != "general":
            continue
        scene = named[row.metadata["scene"]]
        views = [scene.views[k] for k in scene.stills()]
        for question, reply in turns(row):
            text = re.match(r"(?:Point to|Where is|Give a pixel on) the ([a-z ]+)[.?]$", question)
            name, spot = (text[1], reply) if text else (reply, question)
            place = PLACE.search(spot)
            if place is None or re.search(r"point|circle|box|surface", f"{question}{reply}"):
                continue
            shown = []
            for view in views:
                assert view.ids is not None
                x, y = (int(n) * s / t for n, s, t in zip(place.groups(), view.size, SIZE, strict=True))
                window = view.ids[max(0, int(y) - 10) : int(y) + 11, max(0, int(x) - 10) : int(x) + 11]
                shown += [scene.object(int(k)).name for k in np.unique(window) if k > 0]
            assert name in shown, (row.id, question, reply)
            checked += 1
    assert checked >= 20


def test_no_turn_tells_what_another_tells(talks: list[Sample]) -> None:
    for row in talks:
        asked = [question for question, _ in turns(row)]
        assert len(asked) <= 14
        if row.metadata["task"] == "general_text":
            continue
        assert len(set(asked)) == len(asked)
        told: Counter[str] = Counter()
        for question, reply in turns(row):  # a mark's name or place is asked once
            for title in re.findall(r"the (\w+ (?:point|circle|box))", question):
                where = "2" if "image 2" in question else "1"
                about = "place" if PLACE.search(reply) else "name" if "object" in question else ""
                told[f"{about} {title} {where}"] += bool(about)
        assert not told or max(told.values()) <= 1, (row.id, told)


def test_true_replies_score_one_and_no_constant_does(single: list[Sample]) -> None:
    asked = rooms.questions(single)
    skills = Counter(question.form for question in asked)
    assert {"name", "pointing", "colour", "order", "counting", "yes or no", "which image"} <= set(skills), skills
    for question in asked:
        reply = question.sample.messages[-1]["content"][0]["text"]
        assert question.task == "general_question" and score(reply, question.answer) == 1.0, question.text
        for wrong in question.answer.get("candidates", ()):
            assert score(wrong, question.answer) == (wrong == question.answer["value"])
    for skill in ("yes or no", "which image", "order"):
        replies = Counter(str(q.answer["value"]) for q in asked if q.form == skill)
        assert max(replies.values()) <= 0.75 * skills[skill], (skill, replies)


def test_no_question_is_one_of_the_nineteen_tasks(talks: list[Sample], single: list[Sample]) -> None:
    spatial = re.compile(
        r"camera|closer|nearer|farther from|nearest|depth|distance|meter|3D|bbox|direction|same point", re.I
    )
    for row in [*talks, *single]:
        if row.metadata["task"] != "general_text":
            assert not any(spatial.search(f"{q} {r}") for q, r in turns(row)), row.id
    assert not {*GENERAL_TASKS, *GENERAL_PAIRS} & {*SINGLE, *PAIRS, *WALKS}


def test_the_rooms_of_the_base_and_of_its_benchmark_are_their_own() -> None:
    ends = sorted((room_seed(s, 0, 0), room_seed(s, (1 << 20) - 1, (1 << 20) - 1), s) for s in SPLITS)
    assert all(last < first for (_, last, _), (first, _, _) in zip(ends, ends[1:], strict=False))
    assert {"base", "general", "train", "heldout", "tower"} == set(SPLITS)


def test_conversations_are_no_questions_of_a_benchmark(talks: list[Sample]) -> None:
    """Rows of several turns have no checkable answer; parquet keeps it so."""
    several = [row for row in talks if len(row.messages) > 2]
    assert several and rooms.questions(several) == []
    assert json.loads(to_row(several[0], 95)["answer"])["answer"] is None


def test_points_are_scored_by_their_distance() -> None:
    answer = {"type": "point", "value": [84, 56], "tolerance": 14.0}
    for reply, right in (
        ("(84, 56)", 1),
        ("(84, 70)", 1),
        ("(84, 71)", 0),
        ("The lamp is at (80.5, 50).", 1),
        ("84", 0),
        ("(56, 84)", 0),
        ("(84, 56, 3)", 0),
        ("", 0),
    ):
        assert score(reply, answer) == right, reply


def test_the_benchmark_has_its_own_rooms_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, str]] = []

    def remember(out: object, samples: int, seed: int, workers: int, config: object, *, split: str) -> str:
        made.append((samples, split))
        assert config is GENERAL
        return "folder"

    monkeypatch.setattr("fastvst.generate.rooms_subprocess.make_rooms_in_subprocess", remember)
    compare_rooms.render("general", 1200, "heldout")
    compare_rooms.render("general", 2000, "train")
    assert made == [(500, "general"), (500, "base")]
