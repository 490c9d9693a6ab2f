"""WebDataset archives compared with `datasets`; images named by JSON; archives that end early."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastvst.data.ledger import Ledger
from fastvst.data.sources import open_source
from fastvst.data.sources.tar_files import TarTable


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 28), (shade, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def write(path: Path, files: dict[str, Any], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


TALK = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "Red."}]
THREE = {
    f"{k:05}.{kind}": content
    for k in range(600)
    for kind, content in (("png", png(k % 250)), ("json", {"conversations": TALK, "number": k}))
}


def test_rows_are_those_of_datasets(tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    path = write(tmp_path / "rows-000.tar", dict(list(THREE.items())[:20]))
    theirs = datasets.load_dataset(
        "webdataset", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    ).cast_column("png", datasets.Image(decode=False))
    source = open_source(path)
    samples = list(source)
    assert source.format == "webdataset" and [s.id for s in samples] == theirs["__key__"]
    assert [s.parts("image")[0]["image"] for s in samples] == [row["bytes"] for row in theirs["png"]]
    assert samples[0].notes == ("number",)


def test_rows_are_found_by_reference(tmp_path) -> None:
    source = open_source(write(tmp_path / "rows.tar", THREE))
    assert source.block_rows == [256, 256, 88]
    assert [s.id for s in source.get([(2, 87), (0, 0), (1, 5)])] == ["00599", "00000", "00261"]


def test_captions_and_several_images(tmp_path) -> None:
    files = {"a/1.jpg": png(1), "a/1.txt": b"A cat.", "a/2.png": png(2), "a/2.txt": b"A dog."}
    first, second = open_source(write(tmp_path / "c.tar", files), question="Describe.")
    assert first.id == "a/1" and first.messages[1]["content"][0]["text"] == "A cat."
    assert first.parts("image")[0]["image"] == png(1) and second.parts("image")[0]["image"] == png(2)
    with pytest.raises(ValueError, match="data set of captions needs its `question`"):
        open_source(tmp_path / "c.tar")
    talk = [{"from": "human", "value": "<image><image>What?"}, TALK[1]]
    files = {"x.0.png": png(3), "x.1.png": png(4), "x.json": {"conversations": talk}}
    (sample,) = open_source(write(tmp_path / "m.tar", files))
    assert [p["image"] for p in sample.parts("image")] == [png(3), png(4)]
    files = {"x.0.png": png(3), "x.1.png": png(4), "x.json": {"images": ["x.1.png", "x.0.png"], "conversations": talk}}
    (sample,) = open_source(write(tmp_path / "n.tar", files))
    assert [p["image"] for p in sample.parts("image")] == [png(4), png(3)]


def test_columns_of_an_archive_can_be_named(tmp_path) -> None:
    files = {"1.jpg": png(1), "1.q.txt": b"Who?", "1.a.txt": b"Ann."}
    columns = {"image": "jpg", "question": "q.txt", "answer": "a.txt"}
    (sample,) = open_source(write(tmp_path / "c.tar", files), columns=columns)
    assert [p["type"] for p in sample.messages[0]["content"]] == ["image", "text"]
    assert sample.messages[1]["content"][0]["text"] == "Ann."


def test_what_is_damaged_is_accounted_for(tmp_path) -> None:
    files = dict(list(THREE.items())[:20])
    path = write(tmp_path / "rows.tar", files)
    whole = path.read_bytes()
    for length in range(2600, len(whole) - 11_000, 777):
        path.write_bytes(whole[:length])
        ledger = Ledger(max_fraction=1.0)
        good = sum(1 for _ in open_source(path, ledger=ledger))
        assert good + ledger.total == ledger.seen and ledger.total >= 1, length
    bad = {"1.json": b"{", "2.json": {"conversations": TALK}, "2.png": png(2), "3.txt": b"\xff", "3.png": png(1)}
    ledger = Ledger(max_fraction=1.0)
    assert [s.id for s in open_source(write(tmp_path / "b.tar", bad), ledger=ledger)] == ["2"]
    assert ledger.counts == {"bad_row": 2}


def test_other_archives(tmp_path) -> None:
    with pytest.raises(ValueError, match="compressed with gzip.*unpack"):
        open_source(write(tmp_path / "z.tar", {"1.json": {"conversations": TALK}}, "w:gz"))
    (tmp_path / "no.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(ValueError, match="not a tar archive"):
        open_source(tmp_path / "no.tar")
    odd = {
        ".hidden": b"x",
        "d/.DS_Store": b"x",
        "1.json": {"messages": [{"role": "user", "content": "?"}]},
    }
    assert TarTable.open(write(tmp_path / "o.tar", odd)).block_rows == [1]
