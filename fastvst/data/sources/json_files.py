"""JSON arrays and JSON Lines with random access, in any encoding and with any line ends that JSON allows.

A file is read in the encoding of its byte order mark; without one it is UTF-8, UTF-16 or UTF-32, as its first bytes say
(RFC 4627, section 3). Rows are separated by LF, CR LF, CR or the record separator of RFC 7464: a string cannot hold any
of these unescaped. A row that is not JSON costs that row only.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fastvst import jsonl

JSON_BLOCK = 256  # rows in a block
ROW_BYTES = 1 << 30  # largest row of a text file or an archive; images are base64 in it
PIECE = 1 << 24  # bytes of a file that are searched for row ends at a time
FIRST_ROWS = 64  # rows whose keys tell the form of a file
LINE = re.compile(rb"[^\r\n\x1e]+")
# One step through a JSON text that may be wrong in its details: a string, a bracket, or anything else.
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]|[^"\[\]{}]+', re.DOTALL)
BLANK = re.compile(r"[\s,\x1e]*")
BYTE_ORDER_MARKS = {
    "utf-8-sig": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}

Row = dict[str, Any]


@dataclass(frozen=True)
class JsonTable:
    """A JSON array or JSON Lines file, indexed by the byte span of every row. Its blocks are 256 rows each."""

    path: Path
    block_rows: list[int]
    columns: list[str]
    spans: np.ndarray = field(repr=False)  # (rows, 2) int64 first byte and end
    encoding: str = "utf-8"

    @classmethod
    def open(cls, path: Path) -> JsonTable:
        """Index the file: one pass over its lines, or one parse of the array, which holds its whole text in memory.

        Raises:
            ValueError: neither an array of objects nor lines of objects.
        """
        encoding, skipped = text_encoding(path)
        if encoding != "utf-8" or _first_byte(path, skipped) == b"[":
            spans = _text_spans(path, encoding, skipped)
        else:
            spans = _line_spans(path, skipped)
            if len(spans) and not _is_json(path, spans[0]):
                spans = _object_spans(path, skipped, spans)
        count = len(spans)
        blocks = [min(JSON_BLOCK, count - at) for at in range(0, count, JSON_BLOCK)]
        table = cls(path, blocks, [], spans, encoding)
        return cls(path, blocks, first_keys(table.rows(b) for b in range(len(blocks))), spans, encoding)

    @property
    def notes(self) -> tuple[str, ...]:
        """How the file differs from UTF-8 without a byte order mark and with LF at the end of a line."""
        return text_notes(self.path, self.encoding)

    def rows(self, block: int, start: int = 0, stop: int | None = None) -> Iterator[Row | ValueError]:
        """Rows `start` to `stop` (None: all) of a block; ValueErrors in place of rows that are not JSON objects."""
        first = block * JSON_BLOCK
        with open(self.path, "rb") as file:
            for index in range(first + start, first + (self.block_rows[block] if stop is None else stop)):
                begin, end = self.spans[index].tolist()
                if end - begin > ROW_BYTES:
                    yield ValueError(f"the row has {end - begin:,} bytes; at most {ROW_BYTES:,} are read")
                    continue
                file.seek(begin)
                try:
                    text = file.read(end - begin).decode(self.encoding)
                    row = jsonl.loads(text.rstrip().removesuffix(","), object_pairs_hook=_object)
                except (ValueError, RecursionError, MemoryError) as error:  # JSONDecodeError, UnicodeDecodeError
                    yield ValueError(f"not JSON: {error}; expected an object")
                    continue
                yield row if isinstance(row, dict) else ValueError(f"a JSON {type(row).__name__}; expected an object")


def text_notes(path: Path, encoding: str) -> tuple[str, ...]:
    """How a text differs from UTF-8 without a byte order mark and with LF after a line, from its first 64 KiB."""
    found = [f"encoding {encoding}"] if encoding != "utf-8" else []
    found += ["byte order mark"] if text_encoding(path)[1] else []
    with open(path, "rb") as file:
        text = file.read(1 << 16).decode(encoding, "replace")
    ends = {"CR LF": "\r\n" in text, "CR": re.search("\r(?!\n|$)", text), "record separators": "\x1e" in text}
    return (*found, *(f"line ends {name}" for name, there in ends.items() if there))


def first_keys(blocks: Iterable[Iterator[Row | ValueError]]) -> list[str]:
    """The keys of the first FIRST_ROWS rows that can be read."""
    rows = islice((row for rows in blocks for row in rows if isinstance(row, dict)), FIRST_ROWS)
    return list(dict.fromkeys(key for row in rows for key in row))


def _object(pairs: list[tuple[str, Any]]) -> Row:
    """An object. Raises ValueError if a key is there twice: json would keep the last and drop the others."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return found


def text_encoding(path: Path) -> tuple[str, int]:
    """Name of the encoding, and the bytes of the byte order mark."""
    with open(path, "rb") as file:
        head = file.read(4)
    for name, mark in sorted(BYTE_ORDER_MARKS.items(), key=lambda item: -len(item[1])):
        if head.startswith(mark):
            return name.removesuffix("-sig"), len(mark)
    return json.detect_encoding(head), 0


def _first_byte(path: Path, skipped: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(skipped)
        while (byte := file.read(1)) and (byte.isspace() or byte == b"\x1e"):
            pass
        return byte


def _line_spans(path: Path, skipped: int) -> np.ndarray:
    spans: list[tuple[int, int]] = []
    at = skipped
    begin = at  # of the line that a piece ended within
    with open(path, "rb") as file:
        file.seek(skipped)
        while piece := file.readline(PIECE):  # no line is held in memory as a whole
            for match in LINE.finditer(piece):
                start = begin if match.start() == 0 else at + match.start()
                continued = bool(spans) and spans[-1][0] == start
                if continued or match.group().strip():
                    del spans[len(spans) - continued :]
                    spans.append((start, at + match.end()))
            last = max(piece.rfind(mark) for mark in (b"\r", b"\n", b"\x1e"))
            begin = at + last + 1 if last >= 0 else begin
            at += len(piece)
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def _is_json(path: Path, span: np.ndarray) -> bool:
    with open(path, "rb") as file:
        file.seek(int(span[0]))
        try:
            jsonl.loads(file.read(int(span[1] - span[0])).rstrip().removesuffix(b","))
        except (ValueError, RecursionError):
            return False
        return True


def _object_spans(path: Path, skipped: int, lines: np.ndarray) -> np.ndarray:
    """Spans of objects that are written over several lines each; `lines` if the text is not a sequence of objects."""
    try:
        spans = _text_spans(path, "utf-8", skipped)
    except ValueError:
        return lines
    return spans if len(spans) < len(lines) and all(_is_json(path, span) for span in spans) else lines


def _text_spans(path: Path, encoding: str, skipped: int) -> np.ndarray:
    """Byte spans of the elements of an array, or of the values of a sequence, from the whole text.

    Raises:
        ValueError: an array or an element that does not end.
    """
    # bytes that are not in the encoding become surrogates: their rows are rejected later, the others are read
    errors = "surrogateescape" if encoding == "utf-8" else "surrogatepass"
    text = path.read_bytes()[skipped:].decode(encoding, errors)
    begin = BLANK.match(text, 0).end()  # type: ignore[union-attr]
    array = text[begin : begin + 1] == "["
    if not array and encoding != "utf-8":
        pieces = [(match.start(), match.end()) for match in re.finditer(r"[^\r\n\x1e]+", text) if match.group().strip()]
    else:
        try:
            pieces = _elements(text, begin + 1 if array else begin, array)
        except ValueError as error:
            raise ValueError(f"{path}: not a complete JSON array: {error}") from error
    spans = []
    at = 0
    byte = skipped
    for start, end in pieces:
        byte += len(text[at:start].encode(encoding, errors))
        length = len(text[start:end].encode(encoding, errors))
        spans.append((byte, byte + length))
        byte += length
        at = end
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def _elements(text: str, at: int, array: bool) -> list[tuple[int, int]]:
    """First character and end of every element, until the end of the array or of the text."""
    decoder = json.JSONDecoder()
    found: list[tuple[int, int]] = []
    while True:
        begin = BLANK.match(text, at).end()  # type: ignore[union-attr]
        if text[begin : begin + 1] == "]" if array else begin == len(text):
            return found
        try:
            _, end = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError):
            end = _end_of_element(text, begin)
        found.append((begin, end))
        at = end


def _end_of_element(text: str, begin: int) -> int:
    """End of an element that is not valid JSON, from its brackets. Raises ValueError if they do not close."""
    depth = 0
    at = begin
    while at < len(text):
        match = TOKEN.match(text, at)
        if match is None:
            break
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match.group(), 0)
        at = match.end()
        if depth <= 0 and match.group() in ("]", "}"):
            end = at if depth == 0 else match.start()
            if end > begin:
                return end
            break
    raise ValueError(f"the element at character {begin} does not end")
