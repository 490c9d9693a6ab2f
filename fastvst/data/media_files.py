"""Files of images and videos, opened with care: regular files only, of a bounded size, in the formats of training data.

Data come from strangers. Pillow reads 43 formats and gives one of them to an external program; FFmpeg's playlists open
other files and sockets. Everything that opens an image or a video of a data set goes through this module. It imports
neither torch nor a decoder.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageFile, UnidentifiedImageError

from fastvst.data.file_range import FileRange

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")  # of Pillow, that training data have
BYTES_A_PIXEL = 8  # 16-bit RGBA without compression; an image file is refused if it is longer than this
BYTES_OF_A_DECODE = 32  # most memory for each pixel of an image (of 32-bit floats; RGB takes 4), without its file
VIDEO_BYTES = 64 << 30  # largest video file
MOST_READS = 250_000  # pieces that a decoder reads of one image; a PNG of 500 MB in chunks of 8 KB has 60,000

MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]", re.DOTALL)  # of a JPEG segment that has a length, or its end


class MediaError(ValueError):
    """An image or video that cannot be used: `reason` is the ledger's code, `detail` what came and was expected."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def open_file(path: str | Path, kind: str, most: int) -> BinaryIO:
    """An open regular file. No device, FIFO, socket or folder is opened, and nothing waits.

    Args:
        kind: "image" or "video", for the reason.
        most: largest size in bytes.

    Raises:
        MediaError: "missing_image" or "missing_video", "not_a_file", "unreadable_file", "empty_file", "file_too_large".
    """
    try:
        _check_regular(path, os.stat(path).st_mode)  # opening a device may already do something
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MediaError(f"missing_{kind}", f"no such file: {path}") from error
    except MediaError:
        raise
    except (OSError, ValueError) as error:  # no permission, a name that is too long, a loop of links, a NUL
        raise MediaError("unreadable_file", f"{type(error).__name__}: {error}") from error
    file = os.fdopen(handle, "rb")
    try:
        found = os.fstat(handle)
        _check_regular(path, found.st_mode)
        if found.st_size == 0:
            raise MediaError("empty_file", f"{path} has 0 bytes")
        if found.st_size > most:
            raise MediaError("file_too_large", f"{path} has {found.st_size:,} bytes; at most {most:,} are read")
    except BaseException:
        file.close()
        raise
    return file


def _check_regular(path: str | Path, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    raise MediaError("not_a_file", f"{path} is {kinds.get(stat.S_IFMT(mode), 'a device')}; expected a file")


def image_bytes(source: Any, max_source_pixels: int) -> bytes:
    """The encoded bytes of an image from a path, from bytes, or from their range in a file.

    Raises:
        MediaError: as `open_file`, and "bad_image_type".
    """
    most = BYTES_A_PIXEL * max_source_pixels + (1 << 20)
    if isinstance(source, (str, Path)):
        with open_file(source, "image", most) as file:
            try:
                return file.read(most)
            except OSError as error:
                raise MediaError("unreadable_file", f"{type(error).__name__}: {error}") from error
    if isinstance(source, FileRange):
        check_length(source.size, max_source_pixels)
        try:
            source = source.read()
        except OSError as error:
            raise MediaError("unreadable_file", str(error)) from error
    if not isinstance(source, (bytes, bytearray, memoryview)):
        raise MediaError("bad_image_type", f"got {type(source).__name__}; expected a PIL image, a path or bytes")
    data = bytes(source)
    check_length(len(data), max_source_pixels)
    return data


def check_length(size: int, max_source_pixels: int) -> None:
    """Refuse an encoded image of no or of too many bytes. Raises MediaError "empty_file" or "file_too_large"."""
    most = BYTES_A_PIXEL * max_source_pixels + (1 << 20)
    if not size:
        raise MediaError("empty_file", "the image has 0 bytes")
    if size > most:
        raise MediaError("file_too_large", f"the image has {size:,} bytes; at most {most:,} are read")


class CountedReader(io.RawIOBase):
    """A file that cannot be read in more than MOST_READS pieces: data of very many tiny chunks end as an error."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.left = MOST_READS

    def read(self, size: int = -1) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise MediaError("decode_timeout", f"the image is divided into more than {MOST_READS:,} pieces")
        return self.file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


def open_image(file: BinaryIO) -> Image.Image:
    """Pillow's image of an open file. Raises MediaError for formats not in IMAGE_FORMATS, and what Pillow raises."""
    try:
        return Image.open(CountedReader(file), formats=IMAGE_FORMATS)  # type: ignore[arg-type]
    except UnidentifiedImageError as error:
        file.seek(0)
        head = file.read(16)
        raise MediaError(
            "broken_image",
            f"it begins with {head!r}, as none of {', '.join(IMAGE_FORMATS)} does, or its header is damaged",
        ) from error


@contextlib.contextmanager
def opened_image(path: str | Path, max_source_pixels: int = 89_478_485) -> Iterator[Image.Image]:
    """The image in a file, before its pixels are decoded. Raises MediaError, and what Pillow raises.

    Args:
        max_source_pixels: the file has at most BYTES_A_PIXEL bytes for each. Pillow refuses twice the default.
    """
    with open_file(path, "image", BYTES_A_PIXEL * max_source_pixels + (1 << 20)) as file:
        try:
            image = open_image(file)
        except MediaError as error:
            raise MediaError(error.reason, f"{path}: {error.detail}") from error
        with image:
            yield image


def check_format(image: Image.Image) -> None:
    """Refuse an image of Pillow that still has to be decoded from a format that is not in IMAGE_FORMATS.

    Raises:
        MediaError: "bad_image_format".
    """
    if isinstance(image, ImageFile.ImageFile) and image.tile and image.format not in (*IMAGE_FORMATS, "MPO"):  # JPEGs
        expected = ", ".join(IMAGE_FORMATS)
        raise MediaError("bad_image_format", f"the image is of format {image.format}; expected one of {expected}")


def jpeg_scans(data: bytes) -> int:
    """How often the decoder passes over the pixels of a JPEG: the number of its scans; 1 for any other data.

    A progressive file may have thousands of scans, each over all pixels, in some KB. Segments are walked as in
    ITU T.81, annex B; in the data of a scan 0xFF is followed by 0 or a restart marker.
    """
    if data[:2] != b"\xff\xd8":
        return 1
    scans = 0
    at = 2
    while (found := MARKER.search(data, at)) and found[0] != b"\xff\xd9":  # the end of the image
        scans += found[0] == b"\xff\xda"
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return max(scans, 1)
