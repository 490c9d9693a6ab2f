"""The measurement of a cold start from replies that are made here: scores, forms, claims, intervals, the page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from direct_rows import direct_rows
from fastvst.data.sample import Sample
from fastvst.evaluate import thoughts
from fastvst.evaluate.thoughts import FORM, Replies, reasoning_questions, right, summarise
from fastvst.evaluate.thoughts_page import write_thoughts_page
from fastvst.reasoning import geometric
from fastvst.scenes.scene import Scene
from scene_truth import reply

TASKS = ("depth_comparison", "camera_motion", "object_object")


@pytest.fixture(scope="module")
def asked(walked: list[Scene]) -> list[Sample]:
    found = []
    for scene in walked:
        for row in direct_rows(scene, 1):
            made = geometric.compose(scene, row, np.random.default_rng(0)) if row.metadata["task"] in TASKS else None
            found += [made] if made is not None else []
    return reasoning_questions([*found, *direct_rows(walked[0], 1)])


def test_the_form() -> None:
    for text, good in (
        ("<think>a\nb</think> B. left", True),
        ("<think>a</think> ", False),
        ("B. left", False),
        ("<think>a B", False),
        ("<think></think> x", False),
        ("<think>a</think> b</think> c", False),
        ("so <think>a</think> b", False),
    ):
        assert bool(FORM.fullmatch(text)) == good, text


def test_true_thoughts_beat_garbage(walked: list[Scene], asked: list[Sample], tmp_path: Path) -> None:
    scenes = {scene.name: scene for scene in walked}
    assert len(asked) >= 12 and all(s.kind.startswith("thought_") for s in asked)
    gold = [reply(row) for row in asked]
    wrong = tuple("a plain answer" for _ in asked)
    early = Replies(1, tuple(f"<think>The image shows a zebra. {t[:20]}" for t in gold), wrong)
    late = Replies(2, tuple(gold), tuple(text.rsplit("</think> ", 1)[-1] for text in gold))
    results = summarise(asked, scenes, Replies(0, (), wrong), [early, late])
    first, last = (point.tasks[-1] for point in results.points)
    assert (first.questions, first.formed, first.counts.true, first.faithful) == (len(asked), 0.0, 0, None)
    assert first.counts.unknown + first.counts.unreadable >= len(asked) and first.plain == 1.0
    assert (last.thinking.mean, last.direct.mean, last.formed, last.counts.share) == (1.0, 1.0, 1.0, 1.0)
    assert last.gain.mean == 0.0 and not last.better and results.before["all"].mean == 0.0
    assert dataclasses.replace(last, direct=results.before["all"]).better
    assert last.faithful is not None and last.faithful.low > 0.3, "Wilson's interval, one trial for each room"
    assert sum(t.questions for t in results.points[-1].tasks[:-1]) == len(asked)
    assert sum(t + f for t, f in last.counts.kinds.values()) == last.counts.true + last.counts.false
    found = json.loads(json.dumps(results.to_json()))
    assert found["faithfulness"] == 1.0 and [p["step"] for p in found["points"]] == [1, 2]
    assert "after 2 steps: faithful 100.0" in results.table() and "depth comparison" in results.table()
    page = write_thoughts_page(tmp_path, results).read_text()
    assert "#c9f0d1" in page and page.count('class="card"') >= 3 and "data:image/jpeg" in page
    assert "<script" not in page and "lies above the one without: nowhere" in page


def test_a_page_of_hostile_replies_is_escaped(walked: list[Scene], asked: list[Sample], tmp_path: Path) -> None:
    scenes = {scene.name: scene for scene in walked}
    bad = tuple("<think><script>alert(1)</script>. The bed <b> \ud800 is near.</think> <img src=x>" for _ in asked)
    page = write_thoughts_page(tmp_path, summarise(asked, scenes, Replies(0, (), bad), [Replies(1, bad, bad)]))
    text = page.read_text(errors="replace")
    assert "<script" not in text and "<img src=x" not in text and "No claim was checked" in text


def test_answers_with_and_without_their_letter(asked: list[Sample]) -> None:
    for row in asked:
        assert right(reply(row), row) == 1.0 and right("nothing of the kind", row) == 0.0


def test_nothing_to_summarise_is_an_error(asked: list[Sample]) -> None:
    with pytest.raises(ValueError, match="0 questions and 0 checkpoints"):
        summarise([], {}, Replies(0, (), ()), [])
    assert thoughts.ALL not in {one.kind for one in asked}
