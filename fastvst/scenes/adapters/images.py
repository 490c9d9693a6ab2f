"""Colour images of data sets, decoded when a question shows them: of most frames only depth and pose are needed."""

from __future__ import annotations

import dataclasses
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastvst.data.media_files import MediaError, open_file, open_image

FILE_BYTES = 1 << 28  # largest file of one frame; a 20-megapixel PNG has 60 MB
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xae\x42\x60\x82"}  # last bytes of a file that nobody cut
PADDING = 64  # zero bytes behind the end that some cameras write


class LateImageError(OSError):
    """An image that seemed whole when its frame was read cannot be decoded."""


@dataclass(frozen=True, eq=False)
class StoredImage:
    """A colour image: encoded bytes, and what is done with its pixels when it is called.

    Attributes:
        name: of the file, for errors.
        stored: width and height in the file. size: width and height of what a call returns before `quarters`.
        quarters: turns of 90 degrees anticlockwise.
    """

    name: str
    data: bytes
    longest: int
    stored: tuple[int, int]
    size: tuple[int, int]
    quarters: int = 0

    def __call__(self) -> np.ndarray:
        """The pixels (H, W, 3) uint8.

        Raises:
            LateImageError: they cannot be decoded.
        """
        try:
            image = _decoded(self.data, self.longest)
        except (OSError, ValueError, SyntaxError) as error:
            raise LateImageError(f"{self.name}: {error}") from error
        if image.size != self.size:
            image = image.resize(self.size, Image.Resampling.LANCZOS)
        return np.ascontiguousarray(np.rot90(np.asarray(image), self.quarters))

    def resized(self, size: tuple[int, int]) -> StoredImage:
        """The image at another size (width, height), before it is turned."""
        return dataclasses.replace(self, size=size)

    def turned(self) -> StoredImage:
        """The image turned by 90 degrees anticlockwise."""
        return dataclasses.replace(self, quarters=(self.quarters + 1) % 4)


def stored_image(source: Path | bytes, longest: int, name: str = "image") -> StoredImage:
    """The image of a file or of its bytes. Its header is read; its pixels are decoded only where its end is missing.

    A JPEG that is at least twice as large as needed (longer side `longest`) is decoded at a half, a quarter or an
    eighth of its size, which takes a third of the time; it is never smaller than needed.

    Raises:
        MediaError: no regular file, one that is too long, or no image. OSError: from Pillow, for a damaged one.
    """
    if isinstance(source, bytes):
        data = source
    else:
        name = str(source)
        with open_file(source, "image", FILE_BYTES) as file:
            data = file.read()
    try:
        opened = open_image(io.BytesIO(data))
    except MediaError as error:
        raise MediaError(error.reason, f"{name}: {error.detail}") from error
    end = ENDS.get(opened.format or "")
    if end is None or end not in data[-len(end) - PADDING :]:
        _decoded(data, longest)
    stored = opened.size
    _drafted(opened, longest)
    return StoredImage(name, data, longest, stored, opened.size)


def read_image(source: Path | bytes, longest: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The pixels (H, W, 3) uint8 of `stored_image`, and the stored size (width, height)."""
    found = stored_image(source, longest)
    return found(), found.stored


def _decoded(data: bytes, longest: int) -> Image.Image:
    with open_image(io.BytesIO(data)) as opened:
        _drafted(opened, longest)
        opened.load()
        return opened if opened.mode == "RGB" else opened.convert("RGB")


def _drafted(opened: Image.Image, longest: int) -> None:
    scale = min(1.0, longest / max(opened.size))
    opened.draft("RGB", (max(1, round(opened.size[0] * scale)), max(1, round(opened.size[1] * scale))))
