"""No rule that ignores the image answers a task much better than the best constant answer."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastvst.data.sample import Sample
from fastvst.generate.presets import ALL_TASKS
from fastvst.generate.rooms import RoomsConfig, room_samples, room_seed
from fastvst.scenes.rooms.render import Renderer

# Attempts per still, pair or video: many rows of the tasks with choices, none of the tasks with numbers and boxes.
ROWS = {"correspondence": 2.0, "camera_motion": 1.0, "distance": 3.0, "depth_comparison": 3.0, "object_object": 6.0}
MARGIN = 0.08  # 5 points, and the noise of a few hundred questions


def place(row: Sample) -> int:
    """Position of the right answer among the candidates."""
    answer = row.answer
    assert answer is not None
    return answer["candidates"].index(answer["value"])


def best_constant(rows: list[Sample]) -> float:
    """Share of the most frequent answer."""
    return max(Counter(row.answer["value"] for row in rows if row.answer).values()) / len(rows)


def best_by(rows: list[Sample], key: Callable[[Sample], Any], label: Callable[[Sample], Any]) -> float:
    """Share that the best rule key -> label gets right on the second half, learned on the first half."""
    half = len(rows) // 2
    learned: dict[Any, Counter[Any]] = defaultdict(Counter)
    for row in rows[:half]:
        learned[key(row)][label(row)] += 1
    overall = Counter(label(row) for row in rows[:half]).most_common(1)[0][0]
    guess = {k: c.most_common(1)[0][0] for k, c in learned.items()}
    return float(np.mean([guess.get(key(row), overall) == label(row) for row in rows[half:]]))


@pytest.fixture(scope="module")
def asked(renderer: Renderer) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = defaultdict(list)
    config = RoomsConfig(rows=ROWS, shots=dataclasses.replace(ALL_TASKS.shots, overlap=1.0))
    for number in range(70):
        for row in room_samples(room_seed("heldout", 9, number), renderer, config):
            if row.answer is not None and row.answer["type"] == "choice":
                found[row.metadata["task"]].append(row)
    assert all(len(rows) > 40 for rows in found.values()), {task: len(rows) for task, rows in found.items()}
    return found


@pytest.mark.slow
def test_the_order_of_the_options_says_nothing(asked: dict[str, list[Sample]]) -> None:
    for task, rows in asked.items():
        lettered = [row for row in rows if "letter" in (row.answer or {})]
        if len(lettered) > 60:
            share = max(Counter(map(place, lettered)).values()) / len(lettered)
            assert share < 0.25 + MARGIN + 0.05, (task, share)


@pytest.mark.slow
def test_the_place_in_the_other_image_says_little(asked: dict[str, list[Sample]]) -> None:
    rows = asked["correspondence"]
    gaps = [np.linalg.norm(np.array(r.metadata["spots"]) - np.array(r.metadata["point"]), axis=1) for r in rows]
    for rank in range(4):
        share = np.mean([int(np.argsort(g)[rank]) == place(row) for g, row in zip(gaps, rows, strict=True)])
        assert share < best_constant(rows) + MARGIN + 0.02, (rank, share)


@pytest.mark.slow
def test_no_shift_is_frequent(asked: dict[str, list[Sample]]) -> None:
    words = Counter(r.answer["value"] for r in asked["camera_motion"] if r.answer and r.metadata["mode"] == "shift")
    single = {word: n for word, n in words.items() if " and " not in word}
    assert len(single) == 6 and max(single.values()) < 0.3 * sum(single.values()), single


@pytest.mark.slow
def test_the_names_say_little(asked: dict[str, list[Sample]]) -> None:
    rows = asked["distance"]
    shortest = np.mean([np.argmin([len(c) for c in r.answer["candidates"]]) == place(r) for r in rows if r.answer])
    assert abs(shortest - 0.5) < MARGIN + 0.05
    rows = asked["object_object"]
    given = best_by(rows, lambda r: r.metadata["given"], lambda r: r.answer["value"] if r.answer else "")
    assert given < best_constant(rows) + MARGIN + 0.05
