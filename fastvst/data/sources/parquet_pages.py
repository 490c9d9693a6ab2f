"""Where the values of a binary column are in a Parquet file that does not compress them.

Without compression, the values of a column chunk lie in its pages one after another, each with its length before it
(encoding PLAIN of the Apache Parquet format). Their places follow from the page headers and from these lengths, four
bytes for each value; pyarrow would read all of them. `datasets` (5.2) writes embedded images like this, and so does
fastvst. Dictionary pages, as pyarrow writes them by default, and both versions of data pages are read.

The format: github.com/apache/parquet-format (README, Encodings, src/main/thrift/parquet.thrift).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastvst.data.file_range import FileRange, read_at

ENCODINGS = {"PLAIN", "RLE", "BIT_PACKED", "PLAIN_DICTIONARY", "RLE_DICTIONARY"}
PLAIN = 0  # numbers of the encodings
PLAIN_DICTIONARY = 2
RLE = 3
RLE_DICTIONARY = 8
DATA_PAGE = 0  # numbers of the kinds of pages
DICTIONARY_PAGE = 2
DATA_PAGE_V2 = 3
HEADERS = (1 << 9, 1 << 14, 1 << 21)  # bytes to try for a page header; its statistics may hold two values
MOST_NESTED = 8  # structures in structures of a page header; the format has two


@dataclass(frozen=True)
class RangeColumn:
    """A column whose binary values can be found without reading them.

    Attributes:
        name: of the column.
        key: of the values in an object, "" for a column of plain values.
        listed: the column has lists of them.
        nullable: rows may be without a value or a list.
        others: paths of the column's other leaves; pyarrow reads these.
    """

    name: str
    key: str
    listed: bool
    nullable: bool
    others: tuple[str, ...]


def range_columns(file: pq.ParquetFile) -> tuple[RangeColumn, ...]:
    """The columns of which all row groups can be read by ranges."""
    if any("." in name for name in file.schema_arrow.names):
        return ()  # a path could not be told from a name
    leaves = [file.schema.column(index) for index in range(len(file.schema.names))]
    groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
    found = []
    for column in file.schema_arrow:
        shape = _shape(column.type)
        if shape is None:
            continue
        key, listed = shape
        mine = [index for index, leaf in enumerate(leaves) if leaf.path.split(".")[0] == column.name]
        values = [i for i in mine if not key or leaves[i].path.split(".")[-1] == key]
        if len(values) != 1 or not all(_is_plain(group.column(values[0])) for group in groups):
            continue
        others = tuple(leaves[index].path for index in mine if index != values[0])
        found.append(RangeColumn(column.name, key, listed, column.nullable, others))
    return tuple(found)


def _shape(kind: pa.DataType) -> tuple[str, bool] | None:
    """(key, listed) of a column of binary values, of objects with one such value and more, or of lists of these."""
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    inner = kind.value_type if listed else kind
    if _is_binary(inner):
        return "", listed
    if not pa.types.is_struct(inner) or any(pa.types.is_nested(one.type) for one in inner):
        return None
    keys = [one.name for one in inner if _is_binary(one.type)]
    return (keys[0], listed) if keys == ["bytes"] and inner.num_fields > 1 else None


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_plain(chunk: Any) -> bool:
    return chunk.compression == "UNCOMPRESSED" and set(chunk.encodings) <= ENCODINGS and not chunk.file_path


def row_values(
    descriptor: int, path: str, file: pq.ParquetFile, group: int, column: RangeColumn
) -> Iterator[RowValues]:
    """The values of every row of a row group, one after another.

    Raises:
        ValueError: the pages are damaged, or of a kind that the footer does not name.
    """
    leaves = [file.schema.column(index) for index in range(len(file.schema.names))]
    (index,) = [
        i for i, leaf in enumerate(leaves) if leaf.path.split(".")[0] == column.name and leaf.path not in column.others
    ]
    most = leaves[index].max_definition_level
    metadata = file.metadata.row_group(group)
    row: RowValues | None = None
    count = 0
    for repetition, definition, value in _Chunk(descriptor, path, metadata.column(index), leaves[index]).slots():
        if repetition == 0:
            if row is not None:
                yield row
            row = RowValues(most)
            count += 1
        elif row is None:
            raise ValueError("the first value of a column chunk continues a row")
        row.values.append(value)
        row.levels.append(definition)
    if row is not None:
        yield row
    if count != metadata.num_rows:
        raise ValueError(f"column {column.name!r} has {count} rows; expected {metadata.num_rows}")


@dataclass
class RowValues:
    """The values of one row and their definition levels, of which `most` is that of a value."""

    most: int
    values: list[FileRange | bytes | None] = field(default_factory=list)
    levels: list[int] = field(default_factory=list)

    def put_into(self, row: dict[str, Any], column: RangeColumn) -> None:
        """Put the values into the row that pyarrow has read without them.

        Raises:
            ValueError: they are not as many as the row's objects.
        """
        if not column.key:
            row[column.name] = self._plain_list(column.nullable) if column.listed else self.values[0]
            return
        objects = row.get(column.name)
        objects = objects if column.listed else [objects]
        if objects and len(objects) != len(self.values):
            raise ValueError(f"column {column.name!r} has {len(self.values)} values for {len(objects)} objects")
        for one, value in zip(objects or (), self.values, strict=False):
            if one is not None:
                one[column.key] = value

    def _plain_list(self, nullable: bool) -> list[FileRange | bytes | None] | None:
        """A list of values. Levels: no list (if the column may be without), an empty one, its elements."""
        if nullable and self.levels == [0]:
            return None
        return [] if self.levels == [int(nullable)] and int(nullable) < self.most else self.values


class _Chunk:
    """The pages of one column chunk."""

    def __init__(self, descriptor: int, path: str, chunk: Any, leaf: Any) -> None:
        self.descriptor = descriptor
        self.path = path
        starts = [chunk.data_page_offset, *([chunk.dictionary_page_offset] if chunk.has_dictionary_page else [])]
        self.begin = min(start for start in starts if start)
        self.end = self.begin + chunk.total_compressed_size
        self.count = chunk.num_values
        self.repeated = leaf.max_repetition_level
        self.most = leaf.max_definition_level
        if chunk.total_compressed_size < 0 or self.count < 0:
            raise ValueError(f"a column chunk of {chunk.total_compressed_size} bytes and {self.count} values")

    def slots(self) -> Iterator[tuple[int, int, FileRange | bytes | None]]:
        """(repetition level, definition level, value) of every slot."""
        dictionary: list[FileRange | bytes] = []
        at = self.begin
        seen = 0
        while seen < self.count:
            header, body = self._header(at)
            at = body + _field(header, 3)
            if at > self.end or at <= body:
                raise ValueError(f"a page of {_field(header, 3)} bytes in a column chunk that ends at {self.end}")
            kind = _field(header, 1)
            if kind == DICTIONARY_PAGE:
                dictionary = self._plain(body, at, min(_field(header, 7, 1), self.count))
            elif kind in (DATA_PAGE, DATA_PAGE_V2):
                count = _field(header, 5 if kind == DATA_PAGE else 8, 1)
                if not 0 < count <= self.count - seen:
                    raise ValueError(f"a page of {count} values, after {seen} of {self.count}")
                yield from self._page(header, kind, body, at, count, dictionary)
                seen += count

    def _page(
        self, header: dict[int, Any], kind: int, at: int, end: int, count: int, dictionary: list[FileRange | bytes]
    ) -> Iterator[tuple[int, int, FileRange | bytes | None]]:
        if kind == DATA_PAGE_V2:
            sizes: tuple[int | None, ...] = (_field(header, 8, 6), _field(header, 8, 5))
        else:
            sizes = (None, None)
            for most, encoding in ((self.most, _field(header, 5, 3)), (self.repeated, _field(header, 5, 4))):
                if most and encoding != RLE:
                    raise ValueError(f"levels of encoding {encoding}")
        repetitions, at = self._levels(at, end, count, self.repeated, sizes[0])
        definitions, at = self._levels(at, end, count, self.most, sizes[1])
        present = int((definitions == self.most).sum())
        encoding = _field(header, 5, 2) if kind == DATA_PAGE else _field(header, 8, 4)
        if encoding == PLAIN:
            values = self._plain(at, end, present)
        elif encoding in (RLE_DICTIONARY, PLAIN_DICTIONARY):
            data = self._read(at, end - at)
            indices = hybrid(data[1:], data[0] if data else 0, present)
            if present and not 0 <= int(indices.max()) < len(dictionary):
                raise ValueError(f"value {int(indices.max())} of a dictionary of {len(dictionary)}")
            values = [dictionary[index] for index in indices.tolist()]
        else:
            raise ValueError(f"a page of encoding {encoding}")
        left = iter(values)
        for repetition, definition in zip(repetitions.tolist(), definitions.tolist(), strict=True):
            yield repetition, definition, next(left) if definition == self.most else None

    def _levels(self, at: int, end: int, count: int, most: int, size: int | None) -> tuple[np.ndarray, int]:
        """Levels from 0 to `most`, and where the next ones begin; their size is before them if it is None."""
        if not most:
            return np.zeros(count, dtype=np.int32), at + (size or 0)
        if size is None:
            size = int.from_bytes(self._read(at, 4), "little")
            at += 4
        if not 0 <= size <= end - at:
            raise ValueError(f"levels of {size} bytes in a page that has {end - at} left")
        return hybrid(self._read(at, size), most.bit_length(), count), at + size

    def _plain(self, at: int, end: int, count: int) -> list[FileRange | bytes]:
        """The places of `count` values with their lengths before them."""
        if 4 * count > end - at:
            raise ValueError(f"{count} values in {end - at} bytes")
        found: list[FileRange | bytes] = []
        for _ in range(count):
            size = int.from_bytes(self._read(at, 4), "little")
            at += 4
            if size > end - at:
                raise ValueError(f"a value of {size} bytes in a page that has {end - at} left")
            found.append(FileRange(self.path, at, size) if size else b"")
            at += size
        return found

    def _header(self, at: int) -> tuple[dict[int, Any], int]:
        """The page header at a place, and where the page begins."""
        for size in HEADERS:
            data = self._read(at, min(size, self.end - at), whole=False)
            try:
                header, used = structure(data, 0)
                return header, at + used
            except IndexError:
                if len(data) < size:
                    break
        raise ValueError(f"no page header at byte {at}")

    def _read(self, at: int, size: int, whole: bool = True) -> bytes:
        data = read_at(self.descriptor, at, size)
        if whole and len(data) < size:
            raise ValueError(f"the file ends before byte {at + size}")
        return data


def _field(header: dict[int, Any], *path: int) -> int:
    """A number in a page header."""
    found: Any = header
    for number in path:
        found = found.get(number) if isinstance(found, dict) else None
    if not isinstance(found, int):
        raise ValueError(f"a page header without its field {path}")
    return found


def hybrid(data: bytes, width: int, count: int) -> np.ndarray:
    """(count,) int32 numbers of `width` bits in the hybrid of run lengths and packed bits.

    Raises:
        ValueError: they do not end in `data`, or have more than 32 bits.
    """
    if width > 32:
        raise ValueError(f"numbers of {width} bits")
    found = np.zeros(count, dtype=np.int64)
    if not width:
        return found.astype(np.int32)
    have = 0
    at = 0
    try:
        while have < count:
            head, at = _varint(data, at)
            number = head >> 1
            if not number:
                raise ValueError("an empty run")
            size = number * width if head & 1 else (width + 7) // 8
            if size > len(data) - at:
                raise ValueError(f"a run of {size} bytes in {len(data) - at}")
            taken = min(8 * number if head & 1 else number, count - have)
            if head & 1:
                bits = np.unpackbits(np.frombuffer(data, np.uint8, size, at), bitorder="little")
                found[have : have + taken] = bits.reshape(8 * number, width)[:taken] @ (1 << np.arange(width))
            else:
                found[have : have + taken] = int.from_bytes(data[at : at + size], "little")
            have += taken
            at += size
    except IndexError as error:
        raise ValueError(f"{have} of {count} numbers") from error
    return found.astype(np.int32)


def structure(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """A structure of Thrift's compact protocol: numbers and structures by field; and where it ends.

    Raises:
        IndexError: the data end within it.
        ValueError: it is not such a structure.
    """
    if depth > MOST_NESTED:
        raise ValueError("a page header of too many structures")
    found: dict[int, Any] = {}
    number = 0
    while kind := data[at] & 15:
        step = data[at] >> 4
        at += 1
        if step:
            number += step
        else:
            zigzag, at = _varint(data, at)
            number = (zigzag >> 1) ^ -(zigzag & 1)
        found[number], at = _value(data, at, kind, depth)
    return found, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (1, 2):  # true, false
        return kind == 1, at
    if kind == 3:
        return data[at], at + 1
    if kind in (4, 5, 6):
        zigzag, at = _varint(data, at)
        return (zigzag >> 1) ^ -(zigzag & 1), at
    if kind == 7:
        data[at + 7]
        return None, at + 8
    if kind == 8:
        size, at = _varint(data, at)
        if size:
            data[at + size - 1]
        return None, at + size
    if kind == 12:
        return structure(data, at, depth + 1)
    raise ValueError(f"a page header with a field of type {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for index in range(10):
        value |= (data[at + index] & 127) << 7 * index
        if data[at + index] < 128:
            return value, at + index + 1
    raise ValueError("a number of more than ten bytes")
