"""Checks of published rows at load, before anything is generated. Every message names the file and the row.

What cannot be read (no question, no answer, options that are not a list) is an error. A row that can be read but not
scored (its answer is none of its options) keeps the reason in `Row.unscorable`; a row without its image keeps it in
`Row.unaskable`.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvst.evaluate.files import Row, read_image

LABEL = re.compile(r"^\s*\(?([A-Z])[.):]")  # "A. left", "(A) left", "A: left"


def is_missing(value: Any) -> bool:
    """None, NaN, a blank text, or an empty collection."""
    if value is None or (isinstance(value, float) and value != value):
        return True
    if isinstance(value, str):
        return not value.strip()
    return isinstance(value, (bytes, list, tuple, dict)) and not value


def identifier(cell: Mapping[str, Any], key: str, path: Path, number: int) -> str:
    """The id of a row as a text; 7 and 7.0 are "7".

    Raises:
        ValueError: the row has none; `number` is its position in the file.
    """
    value = cell.get(key)
    if is_missing(value):
        raise ValueError(f"{path}, row number {number} has no {key}")
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def text(cell: Mapping[str, Any], key: str, where: str) -> str:
    """A text that every row must have, unchanged; numbers become texts.

    Raises:
        ValueError: it is missing (None, NaN, blank) or is another type.
    """
    value = cell.get(key)
    if is_missing(value):
        raise ValueError(f"{where} has no {key}")
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"{where}: {key} is a {type(value).__name__}; expected a text")
    return str(value)


def category(value: Any) -> str:
    """The group of a row; "" if it has none."""
    return "" if is_missing(value) else str(value)


def options(value: Any, where: str) -> list[str]:
    """Options as published: a list of texts, or the text of such a list, as tables in CSV or TSV hold it.

    Raises:
        ValueError: anything else. A text is never split into its characters.
    """
    parsed = value
    if isinstance(value, str):
        try:
            parsed = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            parsed = None
        # "['left' 'right']", as numpy prints it, is one joined text in Python.
        if isinstance(parsed, (list, tuple)) and len(parsed) < 2:
            parsed = None
    if not isinstance(parsed, (list, tuple)) or not parsed:
        raise ValueError(f"{where}: options are {_shown(value)}; expected a list of texts")
    for option in parsed:
        if is_missing(option) or not isinstance(option, (str, int, float)):
            raise ValueError(f"{where}: option {option!r} in {_shown(value)} is not a text")
    return [str(option) for option in parsed]


def listed(value: Any) -> list[Any]:
    """A cell that holds one value, a list of them, or the text of such a list; [] if it is missing."""
    if is_missing(value):
        return []
    if isinstance(value, str) and value.strip()[:1] == "[" and value.strip()[-1:] == "]":
        try:
            return list(ast.literal_eval(value.strip()))
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            return [value]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def labels(texts: Iterable[str]) -> list[str]:
    """The letters of options that start with "A.", "(A)" or "A:"."""
    return [found[1] for found in map(LABEL.match, texts) if found]


def images(values: Sequence[Any], folder: Path, where: str) -> tuple[tuple[bytes | Path, ...], str]:
    """The images of a row, and the reason why it cannot be asked ("" if every image is there).

    Raises:
        ValueError: an image that is neither bytes nor {"bytes", "path"} nor a path.
    """
    present = [value for value in values if not _is_no_image(value)]
    try:
        found = tuple(read_image(value, folder) for value in present)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not found:
        return (), f"{where} has no image"
    if len(found) < len(values):
        return found, f"{where} has {len(found)} of its {len(values)} images"
    return found, ""


def _is_no_image(value: Any) -> bool:
    if isinstance(value, dict):
        return is_missing(value.get("bytes")) and is_missing(value.get("path"))
    return is_missing(value)


def with_answer_in(row: Row, letters: Collection[str], answer: str, where: str) -> Row:
    """The row; marked as unscorable if its answer is none of `letters`.

    Args:
        answer: the letter of the row's answer.
    """
    if row.unscorable or answer in letters:
        return row
    known = f"its options {', '.join(letters)}" if letters else "its options: it has none"
    return dataclasses.replace(row, unscorable=f"{where}: answer {row.answer[:80]!r} is none of {known}")


def checked(rows: Sequence[Row], path: str | Path) -> list[Row]:
    """The rows.

    Raises:
        ValueError: there are none, two have the same id, or none of them can be scored.
    """
    if not rows:
        raise ValueError(f"{path} has no questions")
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise ValueError(f"{path} has two rows with id {row.id!r}; predictions could not be told apart")
        seen.add(row.id)
    if all(row.unscorable for row in rows):
        raise ValueError(f"none of the {len(rows)} rows can be scored: {rows[0].unscorable}")
    return list(rows)


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:80] + "..."
