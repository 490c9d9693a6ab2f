"""FileRange: a part of a file that reads like a file, and samples whose images are such parts."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvst.data.file_range import FileRange, with_bytes
from fastvst.data.images import image_header
from fastvst.data.media_files import MediaError
from fastvst.data.sample import Sample


def written(path: Path, content: bytes, before: int = 1000) -> FileRange:
    path.write_bytes(b"x" * before + content + b"y" * 3000)
    return FileRange(str(path), before, len(content))


def test_a_range_reads_like_a_file_of_its_own(tmp_path) -> None:
    rng = np.random.default_rng(0)
    content = rng.bytes(50_000)
    part = written(tmp_path / "a", content)
    assert part.read() == content and part.read(7) == content[:7]
    plain = io.BytesIO(content)
    with part.open() as file:
        for _ in range(300):
            size = int(rng.integers(-1, 9000))
            offset = int(rng.integers(60_000))
            whence = int(rng.integers(3))
            offset = (offset, offset // 9 - 2000, -min(offset, 50_000))[whence]
            if whence == 1 and plain.tell() + offset < 0:
                continue
            assert file.seek(offset, whence) == plain.seek(offset, whence)
            assert file.read(size) == plain.read(size)
            assert file.tell() == plain.tell()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_the_header_of_a_range_is_that_of_its_bytes(kind, tmp_path) -> None:
    buffer = io.BytesIO()
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (120, 310, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(buffer, kind, **({"exif": exif} if kind not in ("GIF", "BMP") else {}))
    part = written(tmp_path / "a", buffer.getvalue())
    found = image_header(part, max_source_pixels=10**8)
    assert found == image_header(buffer.getvalue(), max_source_pixels=10**8)
    assert found.size == ((310, 120) if kind in ("GIF", "BMP") else (120, 310))
    with pytest.raises(MediaError, match="file_too_large"):
        image_header(FileRange(part.path, part.offset, 9 << 20), max_source_pixels=100)
    with pytest.raises(MediaError, match="broken_image"):
        image_header(FileRange(part.path, 0, 900), max_source_pixels=10**8)


def test_a_file_that_has_become_shorter_is_an_error(tmp_path) -> None:
    part = written(tmp_path / "a", b"z" * 5000)
    (tmp_path / "a").write_bytes(b"x" * 3000)
    with pytest.raises(OSError, match="ends before byte 6000"):
        part.read()


def test_samples_with_bytes(tmp_path) -> None:
    one = written(tmp_path / "a", b"image")
    parts = [{"type": "text", "text": "?"}, {"type": "image", "image": one, "max_pixels": 9}]
    sample = Sample("0", "s", "qa", [{"role": "user", "content": [*parts, {"type": "video", "video": [one, "p.png"]}]}])
    found = with_bytes(sample).messages[0]["content"]
    assert found[0] == parts[0] and found[1] == {"type": "image", "image": b"image", "max_pixels": 9}
    assert found[2]["video"] == [b"image", "p.png"] and sample.messages[0]["content"][1]["image"] is one
    assert with_bytes(sample, ("video",)).messages[0]["content"][1]["image"] is one
    plain = with_bytes(sample)
    assert with_bytes(plain) is plain
