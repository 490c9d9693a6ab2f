"""Every public operator under every habit of a PyTorch user: it works, or refuses by name; the docs show the table."""

from __future__ import annotations

from pathlib import Path

import pytest

from operator_calls import operator_names
from operator_habits import HABITS, SLOW, outcome, table

DOCS = Path(__file__).parents[3] / "docs" / "embedding.md"


@pytest.mark.parametrize(
    "habit", [pytest.param(habit, marks=pytest.mark.slow) if habit in SLOW else habit for habit in HABITS]
)
@pytest.mark.parametrize("name", operator_names())
def test_operator_and_habit(name: str, habit: str) -> None:
    expected = outcome(name, habit)
    if expected == "works":
        HABITS[habit](name)
    elif expected == "refused":
        with pytest.raises(Exception, match=f"{name} reads values of its arguments"):
            HABITS[habit](name)


def test_the_docs_show_the_table() -> None:
    assert table() in DOCS.read_text(encoding="utf-8"), "run: python tools/make_embedding.py"
