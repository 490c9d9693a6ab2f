"""CSV and TSV compared with Python's csv and with `datasets`; every separator, encoding and quote."""

from __future__ import annotations

import base64
import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastvst.data.sources import open_source
from fastvst.data.sources.csv_files import CsvTable

CELLS = st.text(alphabet=st.characters(exclude_characters="\r\0", exclude_categories=["Cs"]), max_size=12)
ROWS = [["id", "question", "answer"], ["1", 'Who, "then"?', "Ann\nor Bob"], ["2", "größe 日本", "1.50"], ["3", "x", ""]]


def read(path: Path) -> list:
    table = CsvTable.open(path)
    return [row for block in range(len(table.block_rows)) for row in table.rows(block)]


def as_csv(rows: list[list[str]], separator: str = ",", end: str = "\n", quoting: int = csv.QUOTE_MINIMAL) -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=separator, lineterminator=end, quoting=quoting).writerows(rows)
    return buffer.getvalue()


def as_dicts(rows: list[list[str]]) -> list[dict[str, str | None]]:
    return [{name: cell or None for name, cell in zip(rows[0], row, strict=True)} for row in rows[1:]]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_way_to_write_a_table(tmp_path, encoding: str, separator: str, end: str) -> None:
    path = tmp_path / "rows.csv"
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        path.write_bytes(as_csv(ROWS, separator, end, quoting).encode(encoding))
        assert read(path) == as_dicts(ROWS)
    assert open_source(path).format == "csv" and [s.id for s in open_source(path)] == ["1", "2", "3"]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(CELLS, min_size=3, max_size=3).filter(any), min_size=1, max_size=30))
def test_cells_are_those_of_the_library(tmp_path_factory, rows: list[list[str]]) -> None:
    path = tmp_path_factory.mktemp("csv") / "rows.tsv"
    table = [["a", "b", "c"], *rows]
    path.write_bytes(as_csv(table, "\t", "\n", csv.QUOTE_ALL).encode())
    assert read(path) == as_dicts(table)


def test_rows_are_those_of_datasets(tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "rows.csv"
    path.write_text(as_csv([*ROWS[:3], *[[str(k), f"q{k}", f"a,{k}"] for k in range(600)]]))
    theirs = datasets.load_dataset("csv", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert read(path) == [{key: None if value is None else str(value) for key, value in row.items()} for row in theirs]


def test_damaged_rows_cost_only_themselves(tmp_path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'question,answer\nWho?,Ann\none cell\na,b,c\n\nbad \xff,x\nlast,y\n"open,z\nnever,closed\n')
    rows = read(path)
    assert [row if isinstance(row, dict) else "bad" for row in rows] == [
        {"question": "Who?", "answer": "Ann"},
        "bad",
        "bad",
        "bad",
        {"question": "last", "answer": "y"},
        "bad",
    ]
    assert "2 lines has 1 cells, the header has 2; is a quote open" in str(rows[-1])


def test_headers(tmp_path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("sep=;\nquestion;answer\na,b;c\n")
    assert read(path) == [{"question": "a,b", "answer": "c"}]
    for header in ("question,question\n", "question,,answer\n", ""):
        path.write_text(header)
        with pytest.raises(ValueError, match="header is"):
            CsvTable.open(path)


def test_images_in_cells(tmp_path) -> None:
    """VLMEvalKit's TSV has images as base64, longer than the limit of the csv module."""
    buffer = io.BytesIO()
    Image.effect_noise((400, 400), 90).save(buffer, format="PNG")
    assert len(buffer.getvalue()) > 131_072
    text = base64.b64encode(buffer.getvalue()).decode()
    (tmp_path / "rows.tsv").write_text(f"index\timage\tquestion\tanswer\n0\t{text}\tWhat?\tNoise\n")
    (sample,) = open_source(tmp_path / "rows.tsv")
    assert sample.parts("image") == [{"type": "image", "image": buffer.getvalue()}]


def test_metadata_of_an_image_folder(tmp_path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metadata.csv").write_text("file_name,question,answer\na.png,Who?,Ann\n")
    (tmp_path / "train" / "a.png").write_bytes(b"x")
    source = open_source(tmp_path)
    (sample,) = source
    assert sample.parts("image") == [{"type": "image", "image": str(tmp_path / "train" / "a.png")}]
    assert source.layout.split == "train"
