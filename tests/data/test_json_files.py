"""JSON files in every encoding and with every line end; one bad row costs one row. Compared with json and pandas."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from fastvst.data.sources.json_files import JsonTable

ROWS = [{"id": f"r{k}", "text": f"Zeile {k} \u2028 \x85 日本 \U0001f600", "n": [k, {"a": None}]} for k in range(600)]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"]
BYTE_ORDER_MARK = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}


def read(path: Path) -> list:
    table = JsonTable.open(path)
    return [row for block in range(len(table.block_rows)) for row in table.rows(block)]


def write(path: Path, text: str, encoding: str, mark: bool = False) -> Path:
    path.write_bytes((BYTE_ORDER_MARK.get(encoding, b"") if mark else b"") + text.encode(encoding))
    return path


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(tmp_path, encoding: str, end: str) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    texts = {
        "lines": end.join(lines) + end,
        "no end": end.join(lines),
        "blank lines": (end + end).join(lines),
        "array": json.dumps(ROWS, ensure_ascii=False, indent=2).replace("\n", end),
        "array of lines": f"[{end}" + f",{end}".join(lines) + f"{end}]{end}",
        "compact array": json.dumps(ROWS, ensure_ascii=False),
        "commas after lines": f",{end}".join(lines) + f",{end}",
        "record separators": "".join(f"\x1e{line}{end}" for line in lines),
    }
    for name, text in texts.items():
        for mark in (False, True):
            path = write(tmp_path / "rows.json", text, encoding, mark)
            assert read(path) == ROWS, name
    table = JsonTable.open(path)
    assert next(table.rows(1, 44)) == ROWS[300] and len(table.block_rows) == 3


def test_objects_over_several_lines(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps(row, indent=1) for row in ROWS), "utf-8")
    assert read(path) == ROWS
    path = write(tmp_path / "b.jsonl", "{broken\n" + "\n".join(json.dumps(row) for row in ROWS[:5]), "utf-8")
    rows = read(path)
    assert isinstance(rows[0], ValueError) and rows[1:] == ROWS[:5]


DEEP = "[" * 100_000 + "]" * 100_000
BAD = {
    "deep": DEEP,
    "deep in a row": '{"x": ' + DEEP + "}",
    "single quotes": "{'x': 1}",
    "a comma too many": '{"x": 1,}',
    "a control character": '{"x": "\t"}',
    "a bare word": '{"x": undefined}',
    "an odd escape": '{"x": "\\q ]}"}',
    "a number too long": '{"x": ' + "1" * 5000 + "}",
    "a list": "[1, 2]",
    "not an object": "17",
}


@pytest.mark.parametrize("name", BAD)
def test_one_bad_row_costs_one_row(tmp_path, name: str) -> None:
    lines = [json.dumps(row) for row in ROWS[:20]]
    lines[7] = BAD[name]
    for path in (
        write(tmp_path / "a.jsonl", "\n".join(lines), "utf-8"),
        write(tmp_path / "a.json", "[" + ",\n".join(lines) + "]", "utf-8"),
    ):
        rows = read(path)
        assert [row for row in rows if not isinstance(row, ValueError)] == ROWS[:7] + ROWS[8:20], path
        assert isinstance(rows[7], ValueError) and "expected an object" in str(rows[7])


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_bytes_of_another_encoding_cost_their_row(tmp_path, suffix: str) -> None:
    lines = [json.dumps({"t": f"caf{'é' if k == 3 else 'e'} 日"}, ensure_ascii=False) for k in range(6)]
    joined = ",\n".join(lines) if suffix == "json" else "\n".join(lines)
    data = joined.encode().replace("é".encode(), "é".encode("latin-1"))
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(b"[" + data + b"]" if suffix == "json" else data)
    rows = read(path)
    assert [isinstance(row, ValueError) for row in rows] == [k == 3 for k in range(6)]
    assert "0xe9" in str(rows[3]) and rows[5] == {"t": "cafe 日"}


def test_the_same_rows_as_pandas(tmp_path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": ["x\ny", "é", None], "b": [1, 2, 3]})
    frame.to_json(tmp_path / "lines.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "array.json", orient="records", indent=2)
    for name in ("lines.jsonl", "array.json"):
        assert read(tmp_path / name) == json.loads(frame.to_json(orient="records"))


def test_mutated_files_end_and_count_every_row(tmp_path) -> None:
    rng = random.Random(0)
    whole = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS[:30]).encode()
    path = tmp_path / "m.jsonl"
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            data[at : at + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        path.write_bytes(data)
        try:
            rows = read(path)
        except ValueError:
            continue  # the first byte says that it is an array, and the array does not end
        assert len(rows) >= 20 and sum(row in ROWS for row in rows) >= 30 - 2 * 4


def test_a_key_that_is_there_twice_costs_its_row(tmp_path) -> None:
    path = write(
        tmp_path / "a.jsonl", '{"id": 1, "id": 2}\n{"id": 3, "turns": [{"a": 1, "a": 1}]}\n{"id": 4}\n', "utf-8"
    )
    first, second, third = read(path)
    assert "the key 'id' twice" in str(first) and "the key 'a' twice" in str(second) and third == {"id": 4}


def test_the_first_row_does_not_decide_alone_what_a_file_is(tmp_path) -> None:
    rows = [{"note": "made by hand"}, {"id": 1, "messages": []}]
    table = JsonTable.open(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)), "utf-8"))
    assert table.columns == ["note", "id", "messages"]


@pytest.mark.parametrize(
    ("encoding", "end", "notes"),
    [
        ("utf-8", "\n", ()),
        ("utf-8", "\r\n", ("line ends CR LF",)),
        ("utf-8-sig", "\r", ("byte order mark", "line ends CR")),
        ("utf-16", "\n", ("encoding utf-16-le", "byte order mark")),
        ("utf-16-be", "\n\x1e", ("encoding utf-16-be", "line ends record separators")),
    ],
)
def test_what_is_unusual_in_a_file_is_noted(tmp_path, encoding: str, end: str, notes: tuple[str, ...]) -> None:
    lines = "".join(json.dumps(row) + end for row in ROWS[:3])
    assert JsonTable.open(write(tmp_path / "a.jsonl", lines, encoding)).notes == notes
