"""RowContext: which row is being read, its errors, and what was changed while reading it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastvst.data.ledger import SampleError


@dataclass
class RowContext:
    """One row while it is read.

    Attributes:
        source: name of its data set.
        id: id of the row as text.
        where: file and row.
        folder: folder in which relative paths of images start.
        roots: real paths of the folders in which images may lie; None: anywhere.
        absolute: absolute paths are allowed to lead anywhere.
        changes: (code, detail) of every value that was written in an unusual way and could be read in one way only.
    """

    source: str
    id: str
    where: str
    folder: Path
    roots: tuple[str, ...] | None = None
    absolute: bool = True
    changes: list[tuple[str, str]] = field(default_factory=list)

    def fail(self, reason: str, detail: str) -> SampleError:
        """The error of this row."""
        return SampleError(reason, self.source, self.id, f"{detail} (at {self.where})")

    def changed(self, code: str, detail: str) -> None:
        """Note that a value was read in another form than it is written in."""
        self.changes.append((code, detail))


def short(value: Any) -> str:
    """repr of a value in at most 120 characters."""
    text = repr(value[:120] if isinstance(value, (str, bytes)) else value)
    return text if len(text) <= 120 else text[:117] + "..."
