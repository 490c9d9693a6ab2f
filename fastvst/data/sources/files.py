"""Tables on disk with random access: Parquet, Arrow (as `datasets.save_to_disk` writes it), JSON arrays, JSON Lines.

Every table is a list of *blocks* (a Parquet row group, an Arrow record batch, 256 JSON rows). (block, row) is the
permanent reference of a row: a saved shuffle buffer is a list of such pairs. A table holds only offsets and opens its
file while it reads a block, so tables can be sent to other processes, and a worker holds 64 rows at a time, not a whole
row group.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastvst.data.sources.rows import COLUMNS

JSON_BLOCK = 256  # rows in a block of a JSON file
BATCH = 64  # rows that are converted to Python objects at a time

Row = dict[str, Any]


@dataclass(frozen=True)
class ParquetTable:
    """A Parquet file; its blocks are its row groups. Reads the columns of the row forms, or all with `whole`."""

    path: Path
    block_rows: list[int]
    columns: list[str]
    whole: bool = False

    @classmethod
    def open(cls, path: Path) -> ParquetTable:
        with pq.ParquetFile(path) as file:
            rows = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            return cls(path, rows, file.schema_arrow.names)

    def rows(self, block: int, start: int = 0) -> Iterator[Row | ValueError]:
        """Rows of a block from `start` on; ValueErrors in place of rows that cannot be read."""
        columns = [c for c in self.columns if self.whole or c in COLUMNS]
        at = 0
        unreadable = (pa.ArrowException, OSError)  # a local: the generator may be closed after its module is unloaded
        try:
            # with buffer_size pyarrow streams the pages of a column instead of holding the whole column chunk
            with pq.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False) as file:
                for batch in file.iter_batches(BATCH, row_groups=[block], columns=columns, use_threads=False):
                    skip = max(start - at, 0)
                    if skip < batch.num_rows:
                        yield from batch.slice(skip).to_pylist()
                    at += batch.num_rows
        except unreadable as error:
            problem = ValueError(f"row group {block} cannot be read: {error}")
            for _ in range(max(at, start), self.block_rows[block]):
                yield problem


@dataclass(frozen=True)
class ArrowTable:
    """An Arrow IPC stream or file, memory mapped; its blocks are its record batches. `whole` as for Parquet."""

    path: Path
    block_rows: list[int]
    columns: list[str]
    whole: bool = False

    @classmethod
    def open(cls, path: Path) -> ArrowTable:
        batches = _record_batches(path)
        return cls(path, [b.num_rows for b in batches], batches[0].schema.names if batches else [])

    def rows(self, block: int, start: int = 0) -> Iterator[Row | ValueError]:
        """Rows of a block from `start` on."""
        batch = _record_batches(self.path)[block]
        batch = batch.select([c for c in self.columns if self.whole or c in COLUMNS])
        for at in range(start, batch.num_rows, BATCH):
            yield from batch.slice(at, BATCH).to_pylist()


def _record_batches(path: Path) -> list[pa.RecordBatch]:
    """All record batches as views into the memory-mapped file; only their headers are read here."""
    source = pa.memory_map(str(path))
    if source.read(6) == b"ARROW1":
        file = pa.ipc.open_file(source)
        return [file.get_batch(i) for i in range(file.num_record_batches)]
    source.seek(0)
    return list(pa.ipc.open_stream(source))


@dataclass(frozen=True)
class JsonTable:
    """A JSON array or JSON Lines file, indexed by the byte span of every row. Its blocks are 256 rows each."""

    path: Path
    block_rows: list[int]
    columns: list[str]
    spans: np.ndarray = field(repr=False)  # (rows, 2) int64 first byte and end

    @classmethod
    def open(cls, path: Path) -> JsonTable:
        """Index the file: one pass over its lines, or one parse of the array, which holds its whole text in memory.

        Raises:
            ValueError: neither an array of objects nor lines of objects.
        """
        spans = _array_spans(path) if _first_byte(path) == b"[" else _line_spans(path)
        count = len(spans)
        blocks = [min(JSON_BLOCK, count - at) for at in range(0, count, JSON_BLOCK)]
        table = cls(path, blocks, [], spans)
        first = next((row for b in range(len(blocks)) for row in table.rows(b) if isinstance(row, dict)), {})
        return cls(path, blocks, list(first), spans)

    def rows(self, block: int, start: int = 0) -> Iterator[Row | ValueError]:
        """Rows of a block from `start` on; ValueErrors in place of rows that are not JSON objects."""
        first = block * JSON_BLOCK
        with open(self.path, "rb") as file:
            for index in range(first + start, first + self.block_rows[block]):
                begin, end = self.spans[index].tolist()
                file.seek(begin)
                try:
                    row = json.loads(file.read(end - begin))
                except ValueError as error:  # JSONDecodeError, UnicodeDecodeError
                    yield ValueError(f"not JSON: {error}")
                    continue
                yield row if isinstance(row, dict) else ValueError(f"a JSON {type(row).__name__}; expected an object")


def _first_byte(path: Path) -> bytes:
    with open(path, "rb") as file:
        while (byte := file.read(1)) and (byte.isspace() or byte in (b"\xef", b"\xbb", b"\xbf")):
            pass  # white space and a byte order mark
        return byte


def _line_spans(path: Path) -> np.ndarray:
    spans = []
    at = 0
    with open(path, "rb") as file:
        for line in file:
            if line.strip():
                spans.append((at, at + len(line)))
            at += len(line)
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def _array_spans(path: Path) -> np.ndarray:
    text = path.read_text(encoding="utf-8-sig")
    skipped = path.stat().st_size - len(text.encode("utf-8"))  # a byte order mark
    decoder = json.JSONDecoder()
    spans = []
    at = text.index("[") + 1
    byte = skipped + text.index("[") + 1
    try:
        while True:
            begin = at + len(text[at : at + 4096]) - len(text[at : at + 4096].lstrip(" \t\r\n,"))
            if text[begin : begin + 1] == "]":
                break
            _, end = decoder.raw_decode(text, begin)
            start_byte = byte + (begin - at)  # white space and commas are one byte each
            byte = start_byte + len(text[begin:end].encode("utf-8"))
            spans.append((start_byte, byte))
            at = end
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not a complete JSON array: {error}") from error
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


Table = ParquetTable | ArrowTable | JsonTable
