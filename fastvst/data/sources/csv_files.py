"""CSV and TSV with random access. Every cell is text; an empty cell has no value.

Cells and quotes are those of Python's `csv` (RFC 4180). Cells are separated by tabs in a .tsv file, else by the one of
`,`, `;` and tab that occurs most often in the header; a first line `sep=;`, as Excel writes it, names the separator.
The encoding is recognised as for JSON; a row whose bytes are not in it costs that row only.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastvst.data.sources.json_files import ROW_BYTES, Row, text_encoding, text_notes

CSV_BLOCK = 256  # rows in a block
LARGEST_CELL = 1 << 28  # characters; images are base64 in such cells
SEPARATORS = ("\t", ",", ";")


@dataclass(frozen=True)
class CsvTable:
    """A CSV or TSV file, indexed by the byte span of every row. Its blocks are 256 rows each."""

    path: Path
    block_rows: list[int]
    columns: list[str]
    spans: np.ndarray = field(repr=False)  # (rows, 2) int64 first byte and end
    encoding: str = "utf-8"
    separator: str = ","

    @classmethod
    def open(cls, path: Path) -> CsvTable:
        """Read the header, and index the rows in one pass.

        Raises:
            ValueError: no header, or a column without a name or with the name of another.
        """
        encoding, skipped = text_encoding(path)
        separator = "\t" if path.suffix.lower() == ".tsv" else None
        with _Lines(path, encoding, skipped) as lines:
            first = lines.text.readline()
            lines.seek(skipped)
            if first.lower().startswith("sep=") and len(first.strip()) == 5:
                separator = first.strip()[4]
                next(lines)
            elif separator is None:
                separator = max(SEPARATORS, key=first.count) if any(map(first.count, SEPARATORS)) else ","
            reader = _reader(lines, separator)
            names = [name.strip() for name in next(reader, [])]
            if not names or "" in names or len(set(names)) < len(names):
                raise ValueError(f"the header is {names[:16]}; expected a name for every column, each once")
            spans = []
            begin = lines.at
            for cells in reader:
                if cells and cells != [""]:
                    spans.append((begin, lines.at))
                begin = lines.at
        counts = [min(CSV_BLOCK, len(spans) - at) for at in range(0, len(spans), CSV_BLOCK)]
        return cls(path, counts, names, np.array(spans, dtype=np.int64).reshape(-1, 2), encoding, separator)

    @property
    def notes(self) -> tuple[str, ...]:
        """How the file differs from UTF-8 with commas (or tabs in a .tsv file)."""
        found = text_notes(self.path, self.encoding)
        usual = "\t" if self.path.suffix.lower() == ".tsv" else ","
        return (*found, f"separator {self.separator!r}") if self.separator != usual else found

    def rows(self, block: int, start: int = 0, stop: int | None = None) -> Iterator[Row | ValueError]:
        """Rows `start` to `stop` (None: all) of a block; ValueErrors in place of rows that do not fit the header."""
        first = block * CSV_BLOCK
        with open(self.path, "rb") as file:
            for index in range(first + start, first + (self.block_rows[block] if stop is None else stop)):
                begin, end = self.spans[index].tolist()
                if end - begin > ROW_BYTES:
                    yield ValueError(f"the row has {end - begin:,} bytes; at most {ROW_BYTES:,} are read")
                    continue
                file.seek(begin)
                try:
                    text = file.read(end - begin).decode(self.encoding)
                    cells: list[str] = next(_reader(io.StringIO(text, newline=""), self.separator), [])
                except (ValueError, csv.Error) as error:
                    yield ValueError(f"not a row of CSV: {error}; save the file as UTF-8 or UTF-16")
                    continue
                if len(cells) != len(self.columns):
                    lines = text.count("\n")
                    yield ValueError(
                        f"a row of {lines} lines has {len(cells)} cells, the header has "
                        f"{len(self.columns)}; is a quote open?"
                    )
                    continue
                yield {name: cell if cell else None for name, cell in zip(self.columns, cells, strict=True)}


class _Lines(Iterator[str]):
    """Lines of a file with the position in bytes after each. Bytes that are not in the encoding become surrogates."""

    def __init__(self, path: Path, encoding: str, skipped: int) -> None:
        self.encoding = encoding
        self.errors = "surrogateescape" if encoding == "utf-8" else "surrogatepass"
        self.file = open(path, "rb")  # noqa: SIM115 - closed by __exit__
        self.text = io.TextIOWrapper(self.file, encoding, self.errors, newline="")
        self.at = skipped
        self.seek(skipped)

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *error: object) -> None:
        self.text.close()

    def seek(self, at: int) -> None:
        self.text.seek(at)
        self.at = at

    def __next__(self) -> str:
        line = self.text.readline()
        if not line:
            raise StopIteration
        self.at += len(line.encode(self.encoding, self.errors))
        return line


def _reader(lines: Iterator[str], separator: str) -> Any:
    """`csv.reader` for cells of up to LARGEST_CELL; the limit of the module is 131,072 characters."""
    csv.field_size_limit(LARGEST_CELL)
    return csv.reader(lines, delimiter=separator)
