"""JSON Lines files: one JSON value a line, appended while a program works, and readable after it was killed.

A row is complete once its line feed is written. A kill in the middle of a write leaves a torn last line: `read` leaves
it out, and the next `append` cuts it off. Only "\\n" ends a line; strings may contain U+2028, U+0085 and the like. Only
one process may write a file at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from fastvst import atomic

MOST_DEPTH = 128  # of nested lists and objects; as tokenizer.json may have (serde_json, which reads it)


def append(
    path: str | Path, rows: Iterable[Any], *, ensure_ascii: bool = True, default: Callable[[Any], Any] | None = None
) -> int:
    """Add rows at the end of a file; it and its folder are created where they are missing.

    Args:
        ensure_ascii, default: as in `json.dumps`.

    Returns:
        The length of the file in bytes.
    """
    path = Path(path)
    data = _encode(rows, ensure_ascii, default)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        _cut_torn_line(file)
        file.write(data)
        return file.tell()


def write(path: str | Path, rows: Iterable[Any], *, ensure_ascii: bool = True) -> None:
    """Replace a file by these rows, all of them or none (see fastvst/atomic.py)."""
    data = _encode(rows, ensure_ascii, None)
    with atomic.file(path) as partial:
        partial.write_bytes(data)


def read(path: str | Path) -> list[Any]:
    """The complete rows of a file that `append` wrote.

    Raises:
        ValueError: a complete line that is not JSON.
    """
    return parse(_whole_lines(Path(path).read_bytes()).decode("utf-8"), path)


def loads(text: str | bytes, **options: Any) -> Any:
    """`json.loads` for text of any origin.

    Python's own limit of the depth depends on its version and on what is on the stack.

    Raises:
        ValueError: not JSON, or lists and objects nested in more than MOST_DEPTH others.
    """
    try:
        value = json.loads(text, **options)
        opened = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
        too_deep = opened > MOST_DEPTH and _depth(value) > MOST_DEPTH
    except RecursionError:
        too_deep = True
    if too_deep:
        raise ValueError(f"lists and objects are nested more than {MOST_DEPTH} deep")
    return value


def _depth(value: Any) -> int:
    """How deep lists and objects are nested; at most MOST_DEPTH + 1."""
    level = [value]
    depth = 0
    while depth <= MOST_DEPTH:
        level = [one for one in level if isinstance(one, (list, dict))]
        if not level:
            break
        depth += 1
        level = [child for one in level for child in (one.values() if isinstance(one, dict) else one)]
    return depth


def parse(text: str, where: str | Path) -> list[Any]:
    """The values of JSON lines of any origin; blank lines are skipped, and the last line needs no line feed.

    Args:
        where: file that the text is from, for the message.

    Raises:
        ValueError: a line that is not JSON, with its number from 1.
    """
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                values.append(loads(line))
            except ValueError as error:
                raise ValueError(f"{where}, line {number} is not JSON: {error}") from error
    return values


def drop_torn_line(path: str | Path) -> None:
    """Cut off the last line if it has no line feed. A missing file stays missing."""
    if Path(path).exists():
        with open(path, "r+b") as file:
            _cut_torn_line(file)


def drop_from_step(path: str | Path, first_step: int) -> None:
    """Leave only the rows with `step` < `first_step`, byte for byte: a resumed run makes the others again.

    A missing file is created.

    Raises:
        ValueError: a complete line that is not JSON.
    """
    path = Path(path)
    text = _whole_lines(path.read_bytes()).decode("utf-8") if first_step > 0 and path.exists() else ""
    lines = [line for line in text.split("\n") if line.strip()]
    kept = [line for line, row in zip(lines, parse(text, path), strict=True) if row["step"] < first_step]
    atomic.write_text(path, "".join(line + "\n" for line in kept))


def _encode(rows: Iterable[Any], ensure_ascii: bool, default: Callable[[Any], Any] | None) -> bytes:
    """Half of a surrogate pair, which UTF-8 cannot hold, becomes its JSON escape."""
    lines = [json.dumps(row, ensure_ascii=ensure_ascii, default=default) + "\n" for row in rows]
    return "".join(lines).encode("utf-8", "backslashreplace")


def _whole_lines(data: bytes) -> bytes:
    return data[: data.rfind(b"\n") + 1]


def _cut_torn_line(file: BinaryIO) -> None:
    """Truncate after the last line feed; the position is the end of the file afterwards."""
    length = file.seek(0, os.SEEK_END)
    if length == 0:
        return
    file.seek(length - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    file.truncate(len(_whole_lines(file.read())))
    file.seek(0, os.SEEK_END)
