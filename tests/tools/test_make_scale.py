"""docs/scale.md and its image are what the generator writes from the memory and time models."""

from __future__ import annotations

from typing import Any

import pytest

from tools import make_scale


@pytest.mark.slow
def test_the_page_and_the_picture_are_those_of_the_models() -> None:
    known: dict[Any, Any] = {}
    docs = make_scale.ROOT / "docs"
    hint = "run python tools/make_scale.py"
    assert (docs / "scale.md").read_text(encoding="utf-8") == make_scale.page(known), hint
    assert (docs / "scale.svg").read_text(encoding="utf-8") == make_scale.picture(known), hint


def test_every_figure_is_called_a_model() -> None:
    text = make_scale.TEXT
    assert "Every figure is a model; no GPU has measured it" in text
