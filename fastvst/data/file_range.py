"""Images and videos inside larger files, which are read only when somebody needs them: FileRange, VideoFrame."""

from __future__ import annotations

import dataclasses
import io
import os
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from fastvst.data.sample import Part, Sample

HEAD = 1 << 13  # bytes that are read at a time for a header


@dataclass(frozen=True)
class FileRange:
    """`size` bytes of the file `path` from byte `offset` on; `text`: they are a text in UTF-8."""

    path: str
    offset: int
    size: int
    text: bool = False

    def read(self, size: int | None = None) -> bytes:
        """The first `size` bytes (None: all). Raises OSError if the file cannot be read or has become shorter."""
        wanted = self.size if size is None else min(size, self.size)
        with open(self.path, "rb", buffering=0) as file:
            found = read_at(file.fileno(), self.offset, wanted)
        if len(found) < wanted:
            raise OSError(f"{self.path} ends before byte {self.offset + wanted}: it has changed")
        return found

    def open(self) -> BinaryIO:
        """The range as a file of its own."""
        return cast(BinaryIO, io.BufferedReader(_RangeReader(self), HEAD))


@dataclass(frozen=True)
class VideoFrame:
    """An image: the frame of the video file `path` whose time is nearest to `seconds`, and within `tolerance` of it."""

    path: str
    seconds: float
    tolerance: float


class _RangeReader(io.RawIOBase):
    """Reads a range with random access."""

    def __init__(self, of: FileRange) -> None:
        self.of = of
        self.at = 0
        self.file = open(of.path, "rb", buffering=0)  # noqa: SIM115 - closed with this reader

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.of.size - self.at))
        found = os.pread(self.file.fileno(), count, self.of.offset + self.at)
        buffer[: len(found)] = found
        self.at += len(found)
        return len(found)

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(0, offset + (0, self.at, self.of.size)[whence])
        return self.at

    def tell(self) -> int:
        return self.at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self.file.close()
        super().close()


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` on; fewer at the end of the file."""
    pieces = []
    while size > 0 and (piece := os.pread(descriptor, size, offset)):
        pieces.append(piece)
        offset += len(piece)
        size -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def with_bytes(sample: Sample, kinds: tuple[str, ...] = ("image", "video")) -> Sample:
    """The sample with the bytes of its file ranges; itself if it has none.

    Args:
        kinds: of the parts whose bytes are read.

    Raises:
        OSError: as `FileRange.read`.
    """
    if not any(_has_range(part.get(kind)) for kind in kinds for part in sample.parts(kind)):
        return sample
    messages = [
        {**message, "content": [_read(part) if part["type"] in kinds else part for part in message["content"]]}
        for message in sample.messages
    ]
    return dataclasses.replace(sample, messages=messages)


def _has_range(media: Any) -> bool:
    return isinstance(media, FileRange) or (isinstance(media, list) and any(_has_range(one) for one in media))


def _read(part: Part) -> Part:
    return {**part, part["type"]: loaded(part[part["type"]])} if part["type"] != "text" else part


def loaded(value: Any) -> Any:
    """A value with the bytes and texts of its file ranges at all depths. Raises OSError as `FileRange.read`."""
    if isinstance(value, FileRange):
        return value.read().decode("utf-8", "surrogatepass") if value.text else value.read()
    if isinstance(value, dict):
        return {key: loaded(one) for key, one in value.items()}
    return [loaded(one) for one in value] if isinstance(value, list) else value
