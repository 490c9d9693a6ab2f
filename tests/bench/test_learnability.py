"""The learnability bench: exact rules find every label, the fits are least squares, the page shows every task."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bench.learnability import cues, page, questions, readers
from bench.learnability.__main__ import marks
from fastvst.spatial.boxes import box_distance
from fastvst.tasks import VST_P


@pytest.mark.slow
def test_exact_rules_find_every_label_of_every_task(tmp_path: Path) -> None:
    """Rendered in processes of their own: Mesa and Triton cannot share one."""
    folder = questions.render(tmp_path, 12, 6, 2)
    asked, batches = questions.read(folder, 10_000)
    found = Counter(q["task"] for q in asked)
    assert set(found) == set(VST_P)
    wrong = Counter(q["task"] for q in asked if not q["exact"])
    assert not wrong
    images = [image for batch in batches for image in batch]
    assert len(images) == 1 + max(k for q in asked for k in q["images"]) == len(set(images))
    for q in asked:
        shape = np.shape(q["cues"])
        assert np.isfinite(q["cues"]).all() and len(shape) == (2 if q["kind"] == "pick" else 1)
        if q["kind"] == "pick":
            assert shape[0] == len(q["look"]) - q["shared"] > q["label"]
    assert questions.render(tmp_path, 12, 6, 2) == folder
    few, batches = questions.read(folder, 3)
    assert max(Counter(q["task"] for q in few).values()) == 3
    some = [image for batch in batches for image in batch]
    assert len(some) == 1 + max(k for q in few for k in q["images"])
    for one in few:
        same = next(q for q in asked if {**q, "images": 0} == {**one, "images": 0})
        assert [some[k] for k in one["images"]] == [images[k] for k in same["images"]]


def test_gaps_are_distances_of_boxes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = (
            np.concatenate([rng.normal(0, 2, 3), rng.uniform(0.2, 1.5, 3), [0, 0, rng.uniform(0, 360)]]) for _ in "ab"
        )
        exact = box_distance(a, b)
        if exact > 0.1:
            assert exact - 1e-6 <= cues.gap(a, b) < exact + 0.15, "points on a grid are a little farther apart"


def test_outlines_and_tokens() -> None:
    assert cues.token_of(0, 0) == 0 and cues.token_of(319.9, 239.9) == 23 and cues.token_of(160, 60) == 6 + 3
    assert cues.outline_tokens((0, 0, 320, 240)) == [k for k in range(24) if k // 6 in (0, 3) or k % 6 in (0, 5)]
    assert cues.outline_tokens((10, 10, 40, 40)) == [0]


@pytest.mark.parametrize("shape", [(40, 7), (12, 30)])
def test_ridge_is_least_squares(shape: tuple[int, int]) -> None:
    """The solution of the augmented system, by NumPy's solver, for more rows than columns and for fewer."""
    rng = np.random.default_rng(1)
    x = rng.normal(3, 2, shape)
    y = rng.normal(0, 1, (shape[0], 2))
    z = (x - x.mean(0)) / (x.std(0) + 1e-6)
    strength = 0.2
    rows = np.concatenate([z, np.sqrt(strength * shape[0]) * np.eye(shape[1])])
    weight = np.linalg.lstsq(rows, np.concatenate([y - y.mean(0), np.zeros((shape[1], 2))]), rcond=None)[0]
    np.testing.assert_allclose(readers.ridge(x, y, strength)(x), z @ weight + y.mean(0), atol=1e-8)


def test_a_curve_rises_where_the_cues_say_the_answer() -> None:
    """Of three candidates the one with the largest hidden component is right: a reader needs few questions."""
    rng = np.random.default_rng(2)
    hidden = rng.normal(size=20)

    def ask(room: int) -> tuple[dict, np.ndarray]:
        x = rng.normal(size=(3, 20))
        return {"kind": "pick", "label": int((x @ hidden).argmax()), "room": room, "task": "distance"}, x

    made = [ask(room) for room in range(800)]
    train, test = readers.split([q for q, _ in made])
    assert len(test) == 200 and not set(train) & set(test)
    parts = [([made[k][0] for k in part], [made[k][1] for k in part]) for part in (train, test)]
    found = readers.curve(*parts)
    assert set(found) == {75, 150, 300, 600} and found[600] > 0.9 > found[75] > 0.6
    shuffled = [({**q, "label": int(rng.integers(3))}, x) for q, x in made]
    parts = [([shuffled[k][0] for k in part], [shuffled[k][1] for k in part]) for part in (train, test)]
    assert readers.curve(*parts)[600] < 0.45, "labels by chance cannot be learned"


def test_stored_directions_are_read_with_nothing_learned() -> None:
    """Tokens that are made of the directions: the place of a colour, the depth of a mark and the word of a motion."""
    rows = np.linalg.qr(np.random.default_rng(3).normal(size=(64, 64)))[0]
    directions = {"colour": rows[:8], "name": rows[8:10], "values": rows[10:27], "motion": rows[27:35]}
    head = np.kron(np.eye(3), [[-1.0], [1.0]]) @ np.eye(3, 8)  # left, right, up, down, backward, forward
    tokens = np.zeros((3, 24, 64))
    tokens[0, 7] = 2 * directions["colour"][1] + 0.3 * directions["values"][12]
    tokens[0, 9] = 2 * directions["colour"][3] - 0.4 * directions["values"][12]
    tokens[2] = -0.5 * directions["motion"][1]
    lookup = readers.Lookup(readers.Reading(tokens, directions, ["bed"], head))
    assert lookup.place(0, "colour", "red") == 7 and lookup.place(0, "colour", "blue") == 9
    assert lookup.depth(0, "colour", "red") == pytest.approx(0.3, abs=1e-3)
    assert lookup.motion(1, 2) == "up" and lookup.motion(2, 1) == "down"
    asked = {"room": 0, "images": [0], "look": [[0, "colour", "red"], [0, "colour", "blue"]], "tokens": [[7], [8]]}
    depth = {**asked, "task": "depth_comparison", "label": 1}
    move = {"task": "camera_motion", "images": [1, 2], "look": [], "label": "left"}
    box = {**asked, "task": "distance", "tokens": [[6, 7], [9]]}
    ring = {**asked, "task": "correspondence", "tokens": [[7], [9]]}
    assert marks([depth, move, box, ring], lookup) == {
        "dots": 0.5,
        "rings": 1.0,
        "boxes": 1.0,
        "nearer point": 1.0,
        "motion": 0.0,
    }


def test_boxes_numbers_and_words() -> None:
    box = [0.5, 0.2, 3.0, 1.0, 0.8, 0.6, 0.0, 30.0, 0.0]
    assert readers.right({"kind": "box", "label": box}, readers.box_of(np.array(readers.box_code(box))))
    assert not readers.right({"kind": "box", "label": box}, [2.0, *box[1:]])
    number = {"kind": "number", "label": 50.0}
    assert readers.right(number, 54.9) and not readers.right(number, 55.1)
    assert readers.constant([{"kind": "word", "label": w} for w in "aab"]) == "a"


def test_the_page_shows_every_task() -> None:
    curve = {"75": 0.3, "150": 0.5, "300": 0.79, "600": 0.8}
    assert page.enough(curve) == 300
    task = {"train": 600, "constant": 0.2, "exact": 1.0, "cues": curve, "tokens": curve}
    made = {"commit": "abc", "seed": 77, "generator_version": 12}
    results = {"made_with": made, "marks": {"dots": 0.98}, "tasks": dict.fromkeys(VST_P, task)}
    text = page.write(results)
    assert text.count("<svg") == 19 and text.count("<polyline") == 38
    assert all(name.replace("_", " ") in page.markdown(results) for name in VST_P)
