"""The page of wrong answers is written whatever the media are."""

from __future__ import annotations

import base64
import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvst.cli.evaluate import save
from fastvst.evaluate import realworldqa
from fastvst.evaluate.errors import write_errors
from fastvst.evaluate.files import Row


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


NOISE = jpeg(Image.fromarray(np.random.RandomState(0).randint(0, 255, (200, 200, 3), dtype=np.uint8)))
HEAD = chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 1, 0, 0, 0, 0))
BROKEN = {
    "truncated": NOISE[:-3000],
    "bomb": b"\x89PNG\r\n\x1a\n" + HEAD + chunk(b"IDAT", zlib.compress(bytes(100))),
    "empty": b"",
    "text": b"no image",
    "missing": Path("/nowhere/a.png"),
    "folder": Path("/"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_costs_itself_and_nothing_else(name: str, tmp_path: Path) -> None:
    rows = [
        Row("1", "q", "A", "c", (BROKEN[name], NOISE), None, {"A": "x", "B": "y"}),
        Row("2", "q", "A", "c", (), Path("/nowhere/video.mp4"), {"A": "x", "B": "y"}),
    ]
    save(realworldqa.score(rows, [None, "B"], failures={"1": "broken_image"}), rows, tmp_path)
    page = (tmp_path / "errors.html").read_text()
    assert page.count("no image:") == 1 and page.count("<img") == 1, "the other image of the row is shown"
    assert page.count("no video:") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["errors.html", "results.json", "results.md"]


def test_images_are_shown_as_viewers_show_them(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying
    lying = jpeg(Image.new("RGB", (64, 48), "red"), exif=exif)
    rows = [Row("1", "q", "A", "c", (lying,), None, {"A": "x", "B": "y"})]
    write_errors(tmp_path / "errors.html", realworldqa.score(rows, ["B"]), rows)
    (data,) = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', (tmp_path / "errors.html").read_text())
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (48, 64)


def test_results_are_whole_files_and_hold_any_text(tmp_path: Path, monkeypatch) -> None:
    rows = [Row("1", "q", "A", "c \ud83d", (), None, {"A": "x", "B": "y"})]
    report = realworldqa.score(rows, ["B half an emoji \ud83d"])
    save(report, rows, tmp_path)
    assert "half an emoji \\ud83d" in (tmp_path / "results.json").read_text(encoding="utf-8")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        save(realworldqa.score(rows, ["A"]), rows, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
