"""Tables on disk with random access: Parquet, Arrow (as `datasets.save_to_disk` writes it), JSON (json_files.py).

Every table is a list of *blocks* (a Parquet row group, an Arrow record batch, 256 JSON rows). (block, row) is the
permanent reference of a row: a saved shuffle buffer is a list of such pairs. A table holds only offsets and opens its
file while it reads a block, so tables can be sent to other processes, and a worker holds 64 rows at a time, not a whole
row group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fastvst.data.sources.json_files import JsonTable, Row
from fastvst.data.sources.rows import COLUMNS

BATCH = 64  # rows that are converted to Python objects at a time


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
        try:
            # with buffer_size pyarrow streams the pages of a column instead of holding the whole column chunk
            with pq.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False) as file:
                for batch in file.iter_batches(BATCH, row_groups=[block], columns=columns, use_threads=False):
                    skip = max(start - at, 0)
                    if skip < batch.num_rows:
                        yield from _batch_rows(batch.slice(skip))
                    at += batch.num_rows
        except Exception as error:
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
        try:
            batch = _record_batches(self.path)[block]
            batch = batch.select([c for c in self.columns if self.whole or c in COLUMNS])
        except Exception as error:
            for _ in range(start, self.block_rows[block]):
                yield ValueError(f"record batch {block} cannot be read: {error}")
            return
        for at in range(start, batch.num_rows, BATCH):
            yield from _batch_rows(batch.slice(at, BATCH))


def _batch_rows(batch: pa.RecordBatch) -> list[Row | ValueError]:
    """The rows of a batch; ValueErrors in place of rows with a value that is not what its column says (not UTF-8)."""
    try:
        return batch.to_pylist()
    except Exception:
        return [_one_row(batch.slice(index, 1)) for index in range(batch.num_rows)]


def _one_row(batch: pa.RecordBatch) -> Row | ValueError:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[0].as_py()
        except Exception as error:
            return ValueError(f"column {name!r} cannot be read: {type(error).__name__}: {error}")
    return row


def _record_batches(path: Path) -> list[pa.RecordBatch]:
    """All record batches as views into the memory-mapped file; only their headers are read here."""
    source = pa.memory_map(str(path))
    if source.read(6) == b"ARROW1":
        file = pa.ipc.open_file(source)
        return [file.get_batch(i) for i in range(file.num_record_batches)]
    source.seek(0)
    return list(pa.ipc.open_stream(source))


Table = ParquetTable | ArrowTable | JsonTable
