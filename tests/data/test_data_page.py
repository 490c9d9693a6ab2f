"""docs/data.md names every key, column, role, option, change and reason that the code has."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from fastvst.data.check_report import ACCEPTED
from fastvst.data.mixture import MixtureConfig, SourceConfig
from fastvst.data.sources import FORMATS, forms, marks, turns

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data.md").read_text()
SOURCES = "".join(path.read_text() for path in sorted((ROOT / "fastvst" / "data" / "sources").glob("*.py")))


def first_cells(title: str) -> set[str]:
    """The words in code font in the first column of a section's tables."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    return {
        word
        for line in section.split("\n")
        if line[:2] == "| "
        for word in re.findall(r"`([^`]+)`", line.split("|")[1])
    }


def codes(call: str) -> set[str]:
    """The first arguments of all calls of a function in the sources."""
    return set(re.findall(call + r'\(\s*"([a-z_0-9]+)"', SOURCES))


def test_keys_of_a_source() -> None:
    names = {field.name for field in dataclasses.fields(SourceConfig)}
    assert first_cells("Keys of a source") == names
    assert all(re.search(rf"\b{name}\b", MixtureConfig.__doc__ or "") for name in names), "--help lists the keys"
    assert all(f'"{name}"' in PAGE for name in FORMATS)


def test_changes_and_forms() -> None:
    assert first_cells("Changes that are listed") == codes("changed")
    assert set(forms.FORMS) <= first_cells("Row forms")
    assert set(forms.RESPONSES) < set(forms.FORMS)


@pytest.mark.parametrize(
    "names",
    [
        codes("fail") - {"bad_tools"},
        set(turns.ROLE_NAMES),
        set(marks.PART_OPTIONS),
        {name for names in forms.ALSO.values() for name in names} - {"kind"},
        set(forms.COMMON) - set(forms.IMAGE_ALIASES[9:]) - set(forms.VIDEO_ALIASES[4:]),
        set(forms.REFUSED) - set("CD"),
        set(ACCEPTED) & {"no_thought", "unread_media", "empty_answer"},
    ],
    ids=["reasons", "roles", "options", "columns", "common", "refused", "probable"],
)
def test_the_page_has_every_word_of_the_code(names: set[str]) -> None:
    assert not {name for name in names if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", PAGE)}
