"""The true reply of every generated row scores 1 in every reader, and every wrong option scores 0."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fastvst.data.sample import Sample
from fastvst.evaluate.answers import chosen_option, score
from fastvst.evaluate.rooms import questions, summarise
from fastvst.generate.presets import ALL_TASKS
from fastvst.generate.rooms import THOUGHT, RoomsConfig, room_samples, room_seed, scene_samples
from fastvst.reasoning import geometric
from fastvst.rl import rewards
from fastvst.scenes.rooms.render import Renderer
from fastvst.scenes.scene import Scene
from fastvst.tasks.common import LETTERS, TaskConfig, choice


def replies(row: Sample) -> Iterator[tuple[str, dict[str, Any]]]:
    """(true reply, checkable answer) of every turn of a row."""
    said = [m["content"][-1]["text"] for m in row.messages if m["role"] == "assistant"]
    yield from zip(said, row.metadata.get("turn_answers", [row.answer]), strict=True)


def wrong_replies(answer: dict[str, Any]) -> Iterator[str]:
    """Every wrong option, by its text, and by its letter where the question has letters."""
    for place, option in enumerate(answer["candidates"]):
        if option != answer["value"]:
            yield option
            if "letter" in answer:
                yield from (LETTERS[place], f"{LETTERS[place]}. {option}", f"({LETTERS[place]})")


def check(row: Sample) -> str:
    """Assert both properties of one row; returns its task and form."""
    for reply, answer in replies(row):
        where = (row.id, reply, answer)
        direct = reply.rsplit("</think>", 1)[-1].strip()
        assert score(reply, answer) == score(direct, answer) == 1.0, where
        if answer["type"] != "facts":  # captions are no RL rows
            # VST's box reward contains the IoU, and a reply has two decimals: thin boxes lose most by rounding.
            least = 0.8 if answer["type"] == "boxes" else 1.0
            assert rewards.score(direct, answer, thinking=False).accuracy >= least, where
            thoughts = [f"<think>Let me look.</think> {direct}", *([reply] if "</think>" in reply else [])]
            for thoughtful in (rewards.score(thought, answer, thinking=True) for thought in thoughts):
                assert thoughtful.accuracy >= least and thoughtful.format == 1.0, where
        if answer["type"] == "choice":
            for wrong in wrong_replies(answer):
                assert score(wrong, answer) == 0.0, (*where, wrong)
                assert rewards.score(wrong, answer, thinking=False).accuracy == 0.0, (*where, wrong)
    reasoned = "thought " if "</think>" in row.messages[-1]["content"][-1]["text"] else ""
    return f"{reasoned}{row.metadata['task']}: {row.metadata.get('form', '')}"


# Every task that has traces.
THOUGHTS = RoomsConfig(
    rows={f"{THOUGHT}{task}": 3.0 for task in geometric.TRACES}, shots=ALL_TASKS.shots, walk=ALL_TASKS.walk
)


@pytest.mark.parametrize("easy", [0.0, 0.5, 1.0])
def test_gold_in_a_few_rooms(walked: list[Scene], easy: float) -> None:
    found: Counter[str] = Counter()
    for config in (ALL_TASKS, THOUGHTS):
        config = dataclasses.replace(config, tasks=TaskConfig(easy=easy))
        for number, scene in enumerate(walked):
            found.update(check(row) for row in scene_samples(scene, number, config))
    assert len({name.split(":")[0] for name in found}) >= 19 + len(geometric.TRACES) - 2, found


def test_a_question_about_a_view_is_asked_once(scenes: list[Scene]) -> None:
    config = RoomsConfig(rows={"distance": 30, "measurement": 30})
    for number, scene in enumerate(scenes[:3]):
        asked = Counter(
            (row.metadata["task"], row.metadata["view"], tuple(sorted(row.metadata["objects"])), str(row.answer))
            for row in scene_samples(scene, number, config)
            if len(row.messages) == 2
        )
        assert asked and max(asked.values()) <= 2, asked.most_common(1)  # a size can be asked as height and as greatest


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_gold_of_every_task_and_form(renderer: Renderer, split: str) -> None:
    found: Counter[str] = Counter()
    for number in range(25):
        rows = room_samples(room_seed(split, 5, number), renderer, dataclasses.replace(ALL_TASKS))
        rows += room_samples(room_seed(split, 6, number), renderer, RoomsConfig())
        for easy in (0.0, 1.0):
            config = dataclasses.replace(THOUGHTS, tasks=TaskConfig(easy=easy))
            rows += room_samples(room_seed(split, 7, number), renderer, config)
        found.update(check(row) for row in rows)
    assert sum(found.values()) > 500 and len(found) > 60, found
    reasoned = {name.split(":")[0].removeprefix(f"thought {THOUGHT}") for name in found if name.startswith("thought ")}
    assert reasoned == set(geometric.TRACES), found


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("D. up and forward", 1.0),
        ("D", 1.0),
        ("(D)", 1.0),
        ("`D`", 1.0),
        ("D) up and forward.", 1.0),
        ("up and forward", 1.0),
        ("Up and Forward.", 1.0),
        ("So, the answer is D. up and forward.", 1.0),
        ("<think>A or D</think> D", 1.0),
        ("D. left", 0.0),
        ("A. left", 0.0),
        ("A chair moved up and forward", 0.0),
        ("E", 0.0),
        ("", 0.0),
    ],
)
def test_letters_and_texts(response: str, expected: float) -> None:
    answer = choice("up and forward", ["left", "up", "down", "up and forward"], lettered=True)
    assert answer["letter"] == "D" and score(response, answer) == expected


def test_without_letters_only_the_text_counts() -> None:
    answer = choice("up", ["left", "up"], lettered=False)
    assert "letter" not in answer and score("up", answer) == 1.0 and score("B", answer) == 0.0


def test_no_option_is_stated_by_another_letter() -> None:
    options = ["left", "right"]
    assert chosen_option("C", options) is None and chosen_option("B right", options) == "right"
    assert chosen_option("A", options) == "left" and chosen_option("B. left", options) is None


def test_the_random_baseline_guesses_in_the_form_asked_for(walked: list[Scene]) -> None:
    config = dataclasses.replace(ALL_TASKS, tasks=TaskConfig(easy=0.0))
    asked = questions(row for n, scene in enumerate(walked) for row in scene_samples(scene, n, config))
    lettered = [q for q in asked if "letter" in q.answer]
    results = summarise(lettered, ["A"] * len(lettered), [score("A", q.answer) for q in lettered], lettered, examples=0)
    for task in results.tasks:
        sizes = [len(q.answer["candidates"]) for q in lettered if q.task == task.task]
        assert task.random.mean == pytest.approx(np.mean([1 / n for n in sizes])), task
        assert task.majority.mean >= task.model.mean - 1e-9, "the letter A is one of the constants"
