"""Checksums against zlib of the whole file, and markers that were cut or changed."""

import json
import zlib

import pytest

from fastvst import checksum
from fastvst.checksum import MARKER, Damaged


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(checksum, "BLOCK", 1000)
    monkeypatch.setattr(checksum, "READ", 64)


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 999, 1000, 1001, 5000])
def test_every_block_has_the_crc_of_zlib(tmp_path, small_blocks, size):
    data = bytes(i * 7 % 251 for i in range(size))
    (tmp_path / "a").write_bytes(data)
    found = checksum.measure(tmp_path, ["a"])
    blocks = [data[i : i + 1000] for i in range(0, max(1, size), 1000)]
    assert found == {"a": {"size": size, "crc32": [f"{zlib.crc32(block):08x}" for block in blocks]}}


def test_every_flipped_bit_is_found_and_placed(tmp_path, small_blocks):
    data = bytearray(i % 256 for i in range(2500))
    (tmp_path / "a").write_bytes(data)
    checksum.write_marker(tmp_path, checksum.measure(tmp_path, ["a"]), serial=3)
    marker = checksum.read_marker(tmp_path)
    assert marker["serial"] == 3
    blocks = checksum.blocks_of(marker)
    for bit in (0, 7, 8000, 12345, 19999):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a").write_bytes(changed)
        found = checksum.checksums(tmp_path, [(name, number) for name, number, _ in blocks])
        wrong = [block for block, crc in zip(blocks, found) if crc != block[2]]
        assert [number for _, number, _ in wrong] == [bit // 8000]
    assert "between byte 2000 and 3000" in checksum.describe(tmp_path, wrong[0])


def test_a_damaged_marker_is_named(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    checksum.write_marker(tmp_path, checksum.measure(tmp_path, ["a"]), branch=1)
    text = (tmp_path / MARKER).read_text()
    hostile = [text[:end] for end in range(0, len(text), 7)] + [text.replace('"branch": 1', '"branch": 2')]
    hostile += ["[]", "null", "{}", '{"files": 1}', "[" * 100_000, '{"files": {"a": 1}, "files": {"a": {}}}']
    for content in hostile:
        (tmp_path / MARKER).write_text(content)
        with pytest.raises(Damaged, match=MARKER):
            checksum.read_marker(tmp_path)
    (tmp_path / MARKER).unlink()
    with pytest.raises(Damaged, match="no COMPLETE marker"):
        checksum.read_marker(tmp_path)


def test_a_marker_of_sizes_alone_is_read(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    (tmp_path / MARKER).write_text(json.dumps({"files": {"a": 100}}))
    marker = checksum.read_marker(tmp_path)
    checksum.check_sizes(tmp_path, marker)
    assert checksum.blocks_of(marker) == []
    (tmp_path / "a").write_bytes(b"x" * 99)
    with pytest.raises(Damaged, match="has 99 bytes, but 100"):
        checksum.check_sizes(tmp_path, marker)
