"""Binary values by their ranges in the file: the same rows as pyarrow reads, and errors for damaged pages."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvst.data.file_range import FileRange
from fastvst.data.sources.files import ParquetTable
from fastvst.data.sources.parquet_pages import hybrid, structure

NAMES = frozenset(("image", "images", "raw", "raws"))
WRITERS: tuple[dict[str, Any], ...] = (
    {},
    {"use_dictionary": False},
    {"use_dictionary": False, "data_page_version": "2.0"},
    {"data_page_version": "2.0", "data_page_size": 500, "write_batch_size": 8},
    {"dictionary_pagesize_limit": 2000, "write_batch_size": 8},  # a dictionary first, then plain pages
    {"use_content_defined_chunking": True, "write_page_index": True},
)
TYPES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
SCHEMAS = (
    pa.schema([("id", pa.int64()), ("image", TYPES), ("images", pa.list_(TYPES)), ("raw", pa.binary())]),
    pa.schema([("raw", pa.large_binary()), ("raws", pa.list_(pa.binary())), ("images", pa.large_list(TYPES))]),
    pa.schema([pa.field("raw", pa.binary(), nullable=False), pa.field("raws", pa.list_(pa.binary()), nullable=False)]),
    pa.schema([("raws", pa.list_(pa.field("element", pa.binary(), nullable=False)))]),
    pa.schema([pa.field("images", pa.list_(pa.field("element", TYPES, nullable=False)), nullable=False)]),
)


def value(rng: np.random.Generator, kind: pa.DataType, nullable: bool = True) -> Any:
    if nullable and rng.random() < 0.2:
        return None
    if pa.types.is_integer(kind):
        return int(rng.integers(1000))
    if pa.types.is_string(kind):
        return f"p{rng.integers(3)}"
    if pa.types.is_struct(kind):
        return {one.name: value(rng, one.type) for one in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [value(rng, kind.value_type, kind.value_field.nullable) for _ in range(rng.integers(4))]
    return rng.bytes(int(rng.integers(0, 400))) if rng.random() < 0.7 else b"again"


def table(schema: pa.Schema, seed: int, count: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    rows = [{one.name: value(rng, one.type, one.nullable) for one in schema} for _ in range(count)]
    return pa.Table.from_pylist(rows, schema=schema)


def real(found: Any) -> Any:
    """A row with the bytes of its ranges."""
    if isinstance(found, FileRange):
        return found.read()
    if isinstance(found, dict):
        return {key: real(one) for key, one in found.items()}
    return [real(one) for one in found] if isinstance(found, list) else found


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("options", WRITERS)
def test_rows_with_ranges_are_those_of_pyarrow(options, schema, tmp_path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table(schema, 3, 300), path, row_group_size=130, compression="none", **options)
    plain = ParquetTable.open(path)
    assert {column.name for column in plain.binary} == NAMES & set(schema.names)
    ranged = dataclasses.replace(plain, by_range=NAMES)
    for block, count in enumerate(plain.block_rows):
        for start, stop in ((0, None), (3, 5), (count - 1, count), (64, 66) if count > 66 else (0, 0)):
            expected = list(plain.rows(block, start, stop))
            found = list(ranged.rows(block, start, stop))
            assert [real(row) for row in found] == expected
    assert not any(isinstance(one, bytes) and one for row in ranged.rows(0) for one in row.values())
    only = dataclasses.replace(ranged, wanted=frozenset((schema.names[-1],)))
    assert [real(row) for row in only.rows(0)] == [{schema.names[-1]: row[schema.names[-1]]} for row in plain.rows(0)]


def test_columns_that_cannot_be_read_by_ranges(tmp_path) -> None:
    path = tmp_path / "a.parquet"
    data = table(SCHEMAS[0], 0, 20)
    for options in ({"compression": "snappy"}, {"compression": "none", "column_encoding": "DELTA_BYTE_ARRAY"}):
        options = {**options, "use_dictionary": False}
        if "column_encoding" in options:
            options["column_encoding"] = {"image.bytes": "DELTA_BYTE_ARRAY", "raw": "DELTA_LENGTH_BYTE_ARRAY"}
        pq.write_table(data, path, **options)
        found = ParquetTable.open(path)
        assert {column.name for column in found.binary} == ({"images"} if "column_encoding" in options else set())
        assert list(dataclasses.replace(found, by_range=NAMES).rows(0))[0]["raw"] == data.to_pylist()[0]["raw"]
    deep = pa.table({"a": [[[{"bytes": b"x", "path": "p"}]]], "b": [{"bytes": b"x"}], "c.bytes": [b"x"]})
    pq.write_table(deep, path, compression="none")
    assert ParquetTable.open(path).binary == ()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=60), st.integers(3, 9), st.booleans())
def test_hybrid_reads_runs_and_packed_numbers(numbers: list[int], width: int, packed: bool) -> None:
    data = b""
    if packed and numbers:
        padded = numbers + [0] * (-len(numbers) % 8)
        bits = [(number >> bit) & 1 for number in padded for bit in range(width)]
        data = bytes([len(padded) // 8 << 1 | 1]) + np.packbits(bits, bitorder="little").tobytes()
    else:
        for number in numbers:
            data += bytes([1 << 1]) + number.to_bytes((width + 7) // 8, "little")
    assert hybrid(data, width, len(numbers)).tolist() == numbers
    with pytest.raises(ValueError):
        hybrid(data[:-1], width, len(numbers) + 8)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40))
def test_any_bytes_as_a_page_header_end(data: bytes) -> None:
    try:
        _, end = structure(data, 0)
        assert end <= len(data)
    except (IndexError, ValueError):
        pass


@pytest.mark.parametrize("options", WRITERS[:4])
def test_damaged_pages_cost_rows_and_nothing_else(options, tmp_path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table(SCHEMAS[0], 1, 90), path, row_group_size=30, compression="none", **options)
    whole = path.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    ranged = dataclasses.replace(ParquetTable.open(path), by_range=NAMES)
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole)
        for at in rng.integers(4, len(whole) - footer, 3):
            data[at] = int(rng.integers(256))
        path.write_bytes(data)
        for block in range(3):
            found = list(ranged.rows(block))
            assert len(found) == 30 and all(isinstance(row, (dict, ValueError)) for row in found)
    path.write_bytes(whole[: len(whole) // 4])  # the footer is gone
    assert all(isinstance(row, ValueError) for row in ranged.rows(2))
