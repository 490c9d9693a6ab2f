"""The held-out rows of the first command: equal shares, many rooms."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from fastvst.data.sources import open_source
from fastvst.evaluate.rooms import questions
from fastvst.generate.presets import HELDOUT
from fastvst.generate.rooms import apportion, make_rooms


def test_the_shares_are_equal() -> None:
    assert set(Counter(apportion(HELDOUT.shares or {}, 1200)).values()) == {200}


@pytest.mark.slow
def test_200_questions_a_task_about_more_than_80_rooms(tmp_path: Path) -> None:
    folder = make_rooms(tmp_path, 1200, 0, 2, HELDOUT, split="heldout", progress=None)
    asked = questions(open_source(folder))
    assert min(Counter(q.task for q in asked).values()) >= 200
    rooms = {task: len({q.room for q in asked if q.task == task}) for task in HELDOUT.rows}
    assert min(rooms.values()) >= 80, rooms
    described = json.loads((folder / "rooms.json").read_text())
    assert described["split"] == "heldout" and described["samples"] == 1200
