"""2,000 rows in damaged files of every format, and in columns of every Arrow type: every row is accounted for."""

from __future__ import annotations

import decimal
import io
import json
import random
import tarfile
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastvst.cli.generate_rows import read_rows
from fastvst.data import Ledger, LoaderConfig, MixtureConfig, Processor, SourceConfig
from fastvst.data.check import check_source
from fastvst.data.check_report import ACCEPTED
from fastvst.data.ledger import TooManyBadSamples
from fastvst.data.loader import make_loader
from fastvst.data.mixture import open_configured

TINY = Processor.preset("tiny", max_seq_len=512)
ROWS = [
    {"id": f"r{i}", "question": f"What {i}?", "answer": "é" * (i % 5 + 1), "type": "qa", "meta_info": "{}"}
    for i in range(40)
]
TABLE = pa.Table.from_pylist(ROWS)
FILES = 50  # of 40 rows each


def account(path: Path) -> tuple[int, int]:
    """(good, bad) rows; check, loader and generate must agree about them."""
    source = SourceConfig(str(path))
    opened = open_configured(source)
    report = check_source(path, TINY)
    rejected = sum(count for reason, count in report.counts.items() if reason not in ACCEPTED)
    assert report.rows == len(opened) and report.usable + rejected == report.rows + len(opened.problems)
    ledger = Ledger(max_fraction=1.0)
    mixture = MixtureConfig((source,), epochs=1, shuffle_buffer=0)
    try:
        packs = list(make_loader(mixture, TINY, LoaderConfig(512, num_workers=0, buffer_samples=16), ledger=ledger))
    except TooManyBadSamples:
        assert not report.usable
        packs = []
    assert sum(len(pack.sample_ids) for pack in packs) == report.usable and ledger.total == rejected
    assert sum(1 for _ in read_rows(opened, source)) == report.rows
    return report.usable, rejected


def parquet(**options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(TABLE, file, row_group_size=16, **options)
    return file.getvalue()


def arrow(writer: Callable[..., Any]) -> bytes:
    file = io.BytesIO()
    with writer(file, TABLE.schema) as sink:
        sink.write_table(TABLE, max_chunksize=16)
    return file.getvalue()


def table(separator: str) -> bytes:
    lines = [separator.join(row[name] for name in ("id", "question", "answer")) for row in ROWS]
    return "\n".join([separator.join(("id", "question", "answer")), *lines]).encode() + b"\n"


def archive() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for row in ROWS:
            data = json.dumps(row).encode()
            info = tarfile.TarInfo(f"{row['id']}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


FORMATS = {
    "rows.parquet": parquet(),
    "plain.parquet": parquet(use_dictionary=False, compression="zstd"),
    "stream.arrow": arrow(pa.ipc.new_stream),
    "file.arrow": arrow(pa.ipc.new_file),
    "rows.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode(),
    "rows.json": json.dumps(ROWS, ensure_ascii=False, indent=1).encode(),
    "rows.csv": table(","),
    "rows.tsv": table("\t"),
    "rows.tar": archive(),
}


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The file cut, with bytes removed or added, or with 1 to 50 other bytes."""
    at = rng.randrange(len(data))
    kind = rng.random()
    if kind < 0.2:
        return data[:at]
    if kind < 0.3:
        return data[:at] + data[at + rng.randrange(1, 200) :]
    if kind < 0.4:
        return data[:at] + rng.randbytes(rng.randrange(1, 100)) + data[at:]
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 50])):
        changed[rng.randrange(len(changed))] = rng.choice([0, 255, rng.randrange(256)])
    return bytes(changed)


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_refused_or_each_of_its_rows_has_an_account(tmp_path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(FORMATS[name])
    assert account(path) == (40, 0)
    rng = random.Random(name)
    good = bad = refused = 0
    for _ in range(FILES):
        path.write_bytes(damaged(FORMATS[name], rng))
        try:
            found = account(path)
        except ValueError as error:  # the whole file cannot be opened; the message names it
            assert path.name in str(error)
            refused += 1
            continue
        good += found[0]
        bad += found[1]
    assert good and good + bad and refused < FILES


def test_a_damaged_file_of_several_costs_only_its_rows(tmp_path) -> None:
    (tmp_path / "set").mkdir()
    for number in range(3):
        (tmp_path / "set" / f"{number}.parquet").write_bytes(FORMATS["rows.parquet"])
    (tmp_path / "set" / "1.parquet").write_bytes(FORMATS["rows.parquet"][:-100])
    assert account(tmp_path / "set") == (80, 1)
    (line,) = [x for x in open_configured(SourceConfig(str(tmp_path / "set"))).first_lines() if "unreadable_file" in x]
    assert "1.parquet" in line


def test_a_schema_that_changes_between_files(tmp_path) -> None:
    other = TABLE.rename_columns(["id", "prompt", "completion", "type", "meta_info"])
    third = pa.table({"id": ["x"], "messages": [json.dumps([{"role": "user", "content": "?"}])], "extra": [1]})
    for number, content in enumerate((TABLE, other, third)):
        pq.write_table(content, tmp_path / f"{number}.parquet")
    assert account(tmp_path) == (81, 0)
    for kind in ("stream", "file"):
        with pytest.raises(ValueError, match="'id' is there 2 times"):
            twice = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array(["?"])], names=["id", "id", "question"])
            writer = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
            with writer(str(tmp_path / "twice.arrow"), twice.schema) as sink:
                sink.write_table(twice)
            open_configured(SourceConfig(str(tmp_path / "twice.arrow")))


class Picture(pa.ExtensionType):
    """An extension type of strings, as other programs define them."""

    def __init__(self) -> None:
        super().__init__(pa.string(), "made.picture")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Picture:
        return cls()


TEXT = ["What is this?", "x", None, "é"]
COLUMNS: dict[str, pa.Array] = {
    "null": pa.nulls(4),
    "string": pa.array(TEXT),
    "large_string": pa.array(TEXT, pa.large_string()),
    "string_view": pa.array(TEXT, pa.string_view()),
    "dictionary": pa.array(TEXT).dictionary_encode(),
    "binary": pa.array([b"What?", b"\xff", None, b""]),
    "int": pa.array([1, 2, None, -1]),
    "float": pa.array([1.0, float("nan"), None, float("inf")]),
    "bool": pa.array([True, False, None, True]),
    "decimal": pa.array([decimal.Decimal("1.50"), None, decimal.Decimal("-0.25"), decimal.Decimal("9.99")]),
    "timestamp": pa.array([datetime(2020, 1, 2)] * 4),
    "nanoseconds": pa.array([1, 2, 3, None], pa.timestamp("ns")),
    "duration": pa.array([1, 2, None, 3], pa.duration("ns")),
    "date": pa.array([1, 2, None, 3], pa.date32()),
    "list": pa.array([["a"], [], None, [None]]),
    "large_list": pa.array([["a"], [], None, [None]], pa.large_list(pa.string())),
    "list_view": pa.array([["a"], [], None, [None]], pa.list_view(pa.string())),
    "fixed_list": pa.array([[1, 2], [3, 4], None, [5, 6]], pa.list_(pa.int64(), 2)),
    "struct": pa.array([{"role": "user", "content": "?"}, {}, None, {"role": None}]),
    "turns": pa.array([[{"role": "user", "content": "?"}], [], None, [None]]),
    "json": pa.array(['[{"role": "user", "content": "?"}]', "[]", None, "{}"]),
    "map": pa.array([[("a", "b")], [], None, []], pa.map_(pa.string(), pa.string())),
    "run_ends": pa.RunEndEncodedArray.from_arrays(pa.array([2, 4], pa.int32()), pa.array(["a", "b"])),
    "bytes_path": pa.array([{"bytes": b"x", "path": None}, {"bytes": None, "path": "a.png"}, None, {"bytes": b""}]),
    "uuid": pa.array([uuid.UUID(int=k).bytes for k in range(4)], pa.uuid()),
    "extension": pa.ExtensionArray.from_storage(Picture(), pa.array(TEXT)),
}
NAMES = ("id", "question", "answer", "image", "images", "messages", "conversations", "prompt", "completion", "type")
NAMES += ("meta_info", "system", "tools", "fps", "video", "thought", "answer_gt", "history", "texts", "data_source")


@pytest.mark.parametrize("writer", ["parquet", "stream", "file"])
def test_columns_of_every_type(tmp_path, writer: str) -> None:
    rng = random.Random(writer)
    rows = opened = 0
    while rows < 2000:
        names = rng.sample(NAMES, 4)
        names[0] = rng.choice(["question", "messages", "conversations", "prompt"]) if rng.random() < 0.7 else names[0]
        names = list(dict.fromkeys(names))
        columns = [COLUMNS[rng.choice(list(COLUMNS))] for _ in names]
        rows += 4
        content = pa.table(columns, names=names)
        path = tmp_path / f"rows.{'parquet' if writer == 'parquet' else 'arrow'}"
        try:
            if writer == "parquet":
                pq.write_table(content, path)
            else:
                with getattr(pa.ipc, f"new_{writer}")(str(path), content.schema) as sink:
                    sink.write_table(content)
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid):  # this pyarrow cannot write the type
            continue
        try:
            good, bad = account(path)
        except ValueError as error:
            assert "rows have the columns" in str(error)
            continue
        assert good + bad == 4
        opened += 1
    assert opened > 200


def test_more_rows_than_the_file_can_hold_are_not_counted_one_by_one(tmp_path) -> None:
    content = pa.table({"question": pa.nulls(5_000_000)})  # a column of the type null needs no bytes
    with pa.ipc.new_stream(str(tmp_path / "rows.arrow"), content.schema) as sink:
        sink.write_table(content)
    with pytest.raises(ValueError, match=r"names 5000000 rows in \d+ bytes; it is damaged"):
        open_configured(SourceConfig(str(tmp_path / "rows.arrow")))
