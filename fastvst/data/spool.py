"""Spool: samples that wait between planning and decoding, in a file without a name on the local disk.

A row of Parquet cannot be read alone: it is compressed together with the rows of its page or dictionary, up to a whole
row group. The planner therefore reads every row group once, in order, and leaves the samples that it keeps here; a
worker reads back those of its own packs, each once. So a shuffle buffer of 10,000 rows of 1 MB takes 10 GB of this file
and none of the processes' memory. The kernel frees the file when the processes are gone, also after SIGKILL.

The file is written and read by the processes of one run only, as a pipe between them would be.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import sys
import tempfile
import uuid
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

from fastvst.data.file_range import FileRange
from fastvst.data.ledger import SampleError
from fastvst.data.sample import Sample

BLOCK = 4096  # bytes; pieces of the file are multiples of it


class Place(NamedTuple):
    """Where a sample is: path of the file, random name of the spool, first byte and length."""

    path: str
    spool: str
    offset: int
    size: int


class Spool:
    """The writing side; it belongs to one planner."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile(prefix="fastvst-rows-", buffering=0)  # noqa: SIM115 - lives with the planner
        self.path = f"/proc/{os.getpid()}/fd/{self.file.fileno()}"
        self.name = uuid.uuid4().hex  # a later spool of this process may have the same path
        self.end = 0
        self._free: dict[int, list[int]] = {}  # length of a piece -> offsets of the free pieces of this length

    def put(self, sample: Sample) -> Place:
        """Write a sample. Raises RuntimeError if the disk is full."""
        return self._write(memoryview(pickle.dumps(sample, protocol=5)))

    def lighten(self, ref: Any, sample: Sample | SampleError) -> Sample | SampleError:
        """The sample with `FileRange`s of this file in place of its encoded images, videos and long texts of its row.

        Space is used again when nothing refers to such a range any more. For `Mixture.kept`.
        """
        if isinstance(sample, SampleError) or sys.platform != "linux":
            return sample
        known: dict[int, FileRange] = {}
        for message in sample.messages:
            message["content"] = [
                part if part["type"] == "text" else {**part, part["type"]: self._held(part[part["type"]], known)}
                for part in message["content"]
            ]
        sample.row = self._held(sample.row, known)
        return sample

    def _held(self, value: Any, known: dict[int, FileRange]) -> Any:
        """A value with ranges in place of long bytes and texts at all depths; the same bytes are written once."""
        if isinstance(value, dict):
            return {key: self._held(one, known) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._held(one, known) for one in value]
        if not isinstance(value, (bytes, str)) or len(value) < BLOCK:
            return value
        if id(value) not in known:
            data = value if isinstance(value, bytes) else value.encode("utf-8", "surrogatepass")
            place = self._write(memoryview(data))
            held = FileRange(self.path, place.offset, place.size, isinstance(value, str))
            weakref.finalize(held, self.free, [place]).atexit = False
            known[id(value)] = held
        return known[id(value)]

    def _write(self, data: memoryview) -> Place:
        length = _piece(len(data))
        known = self._free.get(length)
        offset = known.pop() if known else self.end
        self.end = max(self.end, offset + length)
        at = 0
        try:
            while at < len(data):
                at += os.pwrite(self.file.fileno(), data[at:], offset + at)
        except OSError as error:
            raise RuntimeError(
                f"rows wait in a file in {tempfile.gettempdir()}, which cannot grow over "
                f"{self.end / 1e9:.3g} GB: {error}. Set TMPDIR to a folder on a larger local disk, or lower "
                "data.shuffle_buffer"
            ) from error
        return Place(self.path, self.name, offset, len(data))

    def free(self, places: Iterable[Place]) -> None:
        """Their samples have been read; the space is used again."""
        for place in places:
            self._free.setdefault(_piece(place.size), []).append(place.offset)


def read(place: Place) -> Sample:
    """The sample at a place, in any process of this user on this machine."""
    descriptor = _opened(place.path, place.spool).fileno()
    pieces = []
    at = 0
    while at < place.size:
        piece = os.pread(descriptor, place.size - at, place.offset + at)
        if not piece:
            raise RuntimeError(f"the planner's file of rows ends {place.size - at} bytes early")
        pieces.append(piece)
        at += len(piece)
    sample = pickle.loads(pieces[0] if len(pieces) == 1 else b"".join(pieces))
    assert isinstance(sample, Sample)
    return sample


@functools.lru_cache(maxsize=4)
def _opened(path: str, spool: str) -> io.FileIO:
    return io.FileIO(path)


def _piece(size: int) -> int:
    """`size` rounded up by at most an eighth (at least to BLOCK), so that pieces of few lengths are used again."""
    step = max(BLOCK, 1 << max(size.bit_length() - 4, 0))
    return -(-size // step) * step
