"""Tables on disk with random access: Parquet, Arrow (as `datasets.save_to_disk` writes it), and those of json_files.py,
csv_files.py and tar_files.py.

Every table is a list of *blocks* (a Parquet row group, an Arrow record batch, 256 rows of the others). (block, row) is
the permanent reference of a row: a saved shuffle buffer is a list of such pairs. A table holds only offsets and opens
its file while it reads a block, so tables can be sent to other processes, and a worker holds 64 rows at a time, not a
whole row group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fastvst.data.sources.csv_files import CsvTable
from fastvst.data.sources.hdf5_files import Hdf5Table
from fastvst.data.sources.json_files import JsonTable, Row
from fastvst.data.sources.parquet_pages import RangeColumn, range_columns, row_values
from fastvst.data.sources.tar_files import TarTable

BATCH = 64  # rows that are converted to Python objects at a time
UNPACKED = 1 << 30  # bytes that any Parquet file may become
MOST_UNPACKED = 1000  # times its size that a larger one may become; encoded images and texts become 1 to 20 times
MOST_ROWS_A_BYTE = 1000  # of a file; equal values take about a bit each, and no column holds only these


@dataclass(frozen=True)
class ParquetTable:
    """A Parquet file; its blocks are its row groups.

    Attributes:
        wanted: columns that the row forms look at; None: all.
        whole: read the other columns too.
        binary: columns whose values can be read by their ranges in the file.
        by_range: those of them whose rows have a `FileRange` in place of the bytes.
    """

    path: Path
    block_rows: list[int]
    columns: list[str]
    wanted: frozenset[str] | None = None
    whole: bool = False
    binary: tuple[RangeColumn, ...] = ()
    by_range: frozenset[str] = frozenset()

    @property
    def notes(self) -> tuple[str, ...]:
        """Nothing: the format has one way to be written."""
        return ()

    @property
    def has_ranges(self) -> bool:
        """Whether rows have ranges in place of the bytes of their images."""
        return any(column.name in self.by_range for column in self.binary)

    @classmethod
    def open(cls, path: Path) -> ParquetTable:
        """Read the footer. Raises ValueError if it cannot be true."""
        with pq.ParquetFile(path) as file:
            rows = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            names = file.schema_arrow.names
            binary = range_columns(file)
            unpacked = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
        _check_counts(path, rows)
        _check_names(path, names)
        if unpacked > max(UNPACKED, MOST_UNPACKED * path.stat().st_size):
            raise ValueError(f"{path.stat().st_size} bytes become {unpacked}, over {MOST_UNPACKED} times as many")
        return cls(path, rows, names, binary=binary)

    def rows(self, block: int, start: int = 0, stop: int | None = None) -> Iterator[Row | ValueError]:
        """Rows `start` to `stop` (None: all) of a block; ValueErrors in place of rows that cannot be read."""
        columns = [c for c in self.columns if self.whole or self.wanted is None or c in self.wanted]
        ranged = [column for column in self.binary if column.name in columns and column.name in self.by_range]
        others = {column.name: column.others for column in ranged}
        columns = [path for name in columns for path in others.get(name, (name,))]
        count = self.block_rows[block] if stop is None else stop
        at = 0
        problem = ValueError(f"row group {block} ends before its row {self.block_rows[block]}")
        try:
            # with buffer_size pyarrow streams the pages of a column instead of holding the whole column chunk
            with (
                open(self.path, "rb", buffering=0) as pages,
                pq.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False) as file,
            ):
                values = [row_values(pages.fileno(), str(self.path), file, block, column) for column in ranged]
                for batch in file.iter_batches(BATCH, row_groups=[block], columns=columns, use_threads=False):
                    skip = min(max(start - at, 0), batch.num_rows)
                    found = _batch_rows(batch.slice(skip, count - at - skip), self.wanted)
                    for column, of_rows in zip(ranged, values, strict=True):
                        for row, one in zip(found, islice(of_rows, skip, skip + len(found)), strict=True):
                            if isinstance(row, dict):
                                one.put_into(row, column)
                    yield from found
                    at += batch.num_rows
                    if at >= count:
                        break
        except Exception as error:  # pyarrow raises many kinds on damaged data
            problem = ValueError(f"row group {block} cannot be read: {error}")
        for _ in range(max(at, start), count):
            yield problem


@dataclass(frozen=True)
class ArrowTable:
    """An Arrow IPC stream or file, memory mapped; its blocks are its record batches. Attributes as for Parquet."""

    path: Path
    block_rows: list[int]
    columns: list[str]
    wanted: frozenset[str] | None = None
    whole: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """Nothing: the format has one way to be written."""
        return ()

    @classmethod
    def open(cls, path: Path) -> ArrowTable:
        """Read the headers of all batches. Raises ValueError if they cannot be true."""
        batches = _record_batches(path)
        rows = [b.num_rows for b in batches]
        names = batches[0].schema.names if batches else []
        _check_counts(path, rows)
        _check_names(path, names)
        return cls(path, rows, names)

    def rows(self, block: int, start: int = 0, stop: int | None = None) -> Iterator[Row | ValueError]:
        """Rows `start` to `stop` (None: all) of a block."""
        stop = self.block_rows[block] if stop is None else stop
        try:
            batch = _record_batches(self.path)[block]
            batch = batch.select([c for c in self.columns if self.whole or self.wanted is None or c in self.wanted])
        except Exception as error:
            for _ in range(start, stop):
                yield ValueError(f"record batch {block} cannot be read: {error}")
            return
        for at in range(start, min(stop, batch.num_rows), BATCH):
            yield from _batch_rows(batch.slice(at, min(BATCH, stop - at)), self.wanted)


def _check_counts(path: Path, rows: list[int]) -> None:
    """Raise ValueError for numbers of rows that the file cannot hold, as a damaged footer names them."""
    most = MOST_ROWS_A_BYTE * path.stat().st_size
    if any(count < 0 for count in rows) or sum(rows) > most:
        raise ValueError(f"the file names {sum(rows)} rows in {path.stat().st_size} bytes; it is damaged")


def _check_names(path: Path, names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the column {twice!r} is there {names.count(twice)} times; give every column its own name")


def _batch_rows(batch: pa.RecordBatch, wanted: frozenset[str] | None) -> list[Row | ValueError]:
    """The rows of a batch; ValueErrors in place of rows with a value that is not what its column says (not UTF-8).

    Args:
        wanted: columns whose values a row needs. A value of another column that cannot be read becomes its error.
    """
    try:
        batch.validate(full=True)  # offsets beyond the data would be read from other memory
        return batch.to_pylist()
    except Exception:
        return [_one_row(batch.slice(index, 1), wanted) for index in range(batch.num_rows)]


def _one_row(batch: pa.RecordBatch, wanted: frozenset[str] | None) -> Row | ValueError:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.validate(full=True)
            row[name] = column[0].as_py()
        except Exception as error:
            text = f"column {name!r} cannot be read: {type(error).__name__}: {error}"
            if wanted is None or name in wanted:
                return ValueError(text)
            row[name] = text
    return row


def _record_batches(path: Path) -> list[pa.RecordBatch]:
    """All record batches as views into the memory-mapped file; only their headers are read here."""
    source = pa.memory_map(str(path))
    if source.read(6) == b"ARROW1":
        file = pa.ipc.open_file(source)
        return [file.get_batch(i) for i in range(file.num_record_batches)]
    source.seek(0)
    return list(pa.ipc.open_stream(source))


Table = ParquetTable | ArrowTable | JsonTable | CsvTable | TarTable | Hdf5Table
