"""Readers of benchmark files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastvst.evaluate.files import read_json


def test_json_lines_may_contain_unicode_line_separators(tmp_path: Path) -> None:
    rows = [{"id": "a", "question": "one\u2028line\u0085only"}, {"id": "b", "question": "?"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert read_json(path, ["id", "question"], "") == rows
    path.write_text('{"id": "a", "question": "?"}\n{"id": \n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2 is not JSON.* download it here"):
        read_json(path, ["id"], "download it here")
