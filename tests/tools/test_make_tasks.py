"""The page of tasks is written where the documentation links to it."""

from __future__ import annotations

from pathlib import Path

from tools.make_tasks import PAGE


def test_the_default_target_is_the_page_in_the_docs() -> None:
    assert Path(__file__).parents[2] / "docs" / "tasks.html" == PAGE and PAGE.is_file()
