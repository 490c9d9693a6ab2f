"""Spool: samples, and the images of samples, that wait in a file whose space is used again."""

from __future__ import annotations

from fastvst.data.file_range import FileRange, loaded, with_bytes
from fastvst.data.ledger import SampleError
from fastvst.data.sample import Sample
from fastvst.data.spool import BLOCK, Spool


def sample(seed: int) -> Sample:
    image = bytes([seed]) * (3 * BLOCK)
    parts = [
        {"type": "text", "text": "?" * 9999},
        {"type": "image", "image": image},
        {"type": "image", "image": "a.png"},
    ]
    row = {"images": [{"bytes": image}, "a.png"], "long": "é" * BLOCK, "short": b"s", "number": 1}
    return Sample(str(seed), "s", "qa", [{"role": "user", "content": parts}], row=row)


def test_light_samples_are_read_back_and_their_space_is_used_again() -> None:
    spool = Spool()
    kept = []
    for seed in range(50):
        found = spool.lighten(None, sample(seed))
        assert isinstance(found, Sample)
        (held,) = [part["image"] for part in found.parts("image") if isinstance(part["image"], FileRange)]
        assert found.row is not None and found.row["images"][0]["bytes"] is held  # written once
        assert with_bytes(found).messages == sample(seed).messages and loaded(found.row) == sample(seed).row
        kept.append(found)
        kept = kept[-5:]
        del found, held
    assert spool.end <= 7 * 6 * BLOCK
    oldest = kept[0]
    del spool  # the file lives as long as a sample in it
    assert with_bytes(oldest).messages == sample(45).messages


def test_errors_pass() -> None:
    error = SampleError("bad_row", "s", "1", "x")
    assert Spool().lighten(None, error) is error
