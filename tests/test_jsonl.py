"""JSON Lines files: torn lines, line separators inside strings, rows of steps that are made again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastvst import jsonl

SEPARATORS = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\rh\ni"  # str.splitlines() splits at each of them


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    assert jsonl.append(path, []) == 0 and jsonl.read(path) == []
    assert jsonl.append(path, [{"a": 1}, {"b": [1.5, None, "é"]}]) == path.stat().st_size
    assert jsonl.append(path, [{"c": "é"}], ensure_ascii=False) == path.stat().st_size
    assert jsonl.read(path) == [{"a": 1}, {"b": [1.5, None, "é"]}, {"c": "é"}]
    assert path.read_bytes().split(b"\n")[1:3] == [b'{"b": [1.5, null, "\\u00e9"]}', '{"c": "é"}'.encode()]
    jsonl.write(path, [{"z": 0}])
    assert path.read_text() == '{"z": 0}\n' and [p.name for p in path.parent.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_only_a_line_feed_ends_a_line(tmp_path: Path, ensure_ascii: bool) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"step": 0, "text": SEPARATORS}, {"step": 1, SEPARATORS: 2}]
    jsonl.append(path, rows, ensure_ascii=ensure_ascii)
    assert jsonl.read(path) == rows == jsonl.parse(path.read_text(encoding="utf-8"), path)
    jsonl.drop_from_step(path, 1)
    assert jsonl.read(path) == rows[:1]


def test_a_torn_line_is_left_out_and_the_next_append_cuts_it_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    jsonl.append(path, [{"a": 1}, {"text": "zwölf"}], ensure_ascii=False)
    whole = path.read_bytes()
    for length in range(whole.index(b"\n") + 1, len(whole)):  # a kill after any byte, in the middle of a letter too
        path.write_bytes(whole[:length])
        assert jsonl.read(path) == [{"a": 1}]
        jsonl.append(path, [{"b": 2}])
        assert jsonl.read(path) == [{"a": 1}, {"b": 2}]
        path.write_bytes(whole[:length])
        jsonl.drop_torn_line(path)
        assert path.read_text() == '{"a": 1}\n'
    path.write_bytes(b'{"a"')
    jsonl.drop_torn_line(path)
    assert path.read_bytes() == b""
    jsonl.drop_torn_line(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


KILLED = """
import itertools, sys
from fastvst import jsonl
for number in itertools.count():
    jsonl.append(sys.argv[1], [{"number": number, "text": "x" * 100_000}])
    print(number, flush=True)
"""


def test_a_killed_writer_loses_at_most_the_row_it_was_writing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(20):
            reported = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    rows = jsonl.read(path)
    assert [row["number"] for row in rows] == list(range(len(rows))) and len(rows) > reported
    jsonl.append(path, [{"number": -1}])
    assert jsonl.read(path) == [*rows, {"number": -1}]


def test_a_complete_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 0}\n\n{"step": 1\n{"step": 2}\n')
    for call in (jsonl.read, lambda p: jsonl.drop_from_step(p, 5)):
        with pytest.raises(ValueError, match=r"rows.jsonl, line 3 is not JSON"):
            call(path)


def test_foreign_text_may_lack_the_last_line_feed() -> None:
    assert jsonl.parse('\n{"a": 1}\r\n  \n[2]', "text") == [{"a": 1}, [2]]


def test_steps_that_are_made_again_are_dropped_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "metrics.jsonl"
    jsonl.drop_from_step(path, 3)
    assert path.read_bytes() == b""
    lines = [f'{{"step":{step},  "loss": 1e-07}}\n' for step in range(4)]  # not the spacing of json.dumps
    path.write_text("".join(lines) + '{"step": 1, "to')
    jsonl.drop_from_step(path, 2)
    assert path.read_text() == "".join(lines[:2])
    jsonl.drop_from_step(path, 0)
    assert path.read_bytes() == b""


def test_default_turns_strange_values_into_json(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        jsonl.append(tmp_path / "rows.jsonl", [{"path": Path("x")}])
    jsonl.append(tmp_path / "rows.jsonl", [{"path": Path("x")}], default=str)
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == {"path": "x"}


@pytest.mark.parametrize("open_, close", [("[", "]"), ('{"a":', "}")])
def test_nesting_has_a_limit_that_is_said(open_: str, close: str) -> None:
    def nested(depth: int) -> str:
        return open_ * depth + "1" + close * depth

    value = jsonl.loads(nested(jsonl.MOST_DEPTH))
    for _ in range(jsonl.MOST_DEPTH):
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
    assert value == 1
    for depth in (jsonl.MOST_DEPTH + 1, 900, 100_000):
        for text in (nested(depth), nested(depth).encode()):
            with pytest.raises(ValueError, match=f"nested more than {jsonl.MOST_DEPTH} deep"):
                jsonl.loads(text)
    assert jsonl.loads("[" + "[]," * 1000 + "{}]") == [[]] * 1000 + [{}]  # many, not deep
    with pytest.raises(ValueError, match=r"x, line 2 is not JSON: .* nested more than"):
        jsonl.parse(f"1\n{nested(200)}\n", "x")
