"""The images and videos of a row: encoded bytes, base64 in any of its forms, or a path.

No image is opened here and nothing is downloaded. A path that is written for another system (backslashes, `~`,
percent-encoding, blanks at its ends) is read as it was meant, unless a file of exactly that name exists.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import Image

from fastvst.data.file_range import FileRange, VideoFrame
from fastvst.data.sources.row_context import RowContext, short
from fastvst.data.sources.values import is_absent, parsed

# First bytes of image files: PNG, JPEG, GIF, BMP, TIFF (both byte orders); WebP is RIFF....WEBP.
IMAGE_MAGIC = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv")
MEDIA_KEYS = ("path", "url", "image", "video", "file_name", "base64")  # of an object in place of an image
BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{60,}={0,2}\s*")  # at least 45 bytes; the least PNG has 67
URL = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+)://")
DRIVE = re.compile(r"/?[A-Za-z]:[\\/]|\\\\")
EXPECTED = "expected bytes, {bytes, path}, a path, a data URI or base64"


def payload(item: Any, row: RowContext) -> Any:
    """The value of an image or video in a row -> encoded bytes, an image, a path, or a list of these (frames).

    Accepted: bytes or their range in a file; {bytes, path}; a path, relative to the row's folder; a file:// URL; a data
    URI; base64; {"url": any of these}; an array of pixels (height, width, 1, 3 or 4) uint8; an image of Pillow; a list
    of frames.

    Raises:
        SampleError: "bad_schema", "bad_base64", "bad_path", "outside_path", "remote_media".
    """
    if isinstance(item, dict):
        found = item.get("bytes")
        if not is_absent(found) and found != b"":
            return _bytes_of(found, row)
        inner = next((item[key] for key in MEDIA_KEYS if not is_absent(item.get(key))), None)
        if inner is not None or found == b"":
            return b"" if inner is None else payload(inner, row)
    if isinstance(item, VideoFrame):
        _inside(item.path, row)
        return item
    if isinstance(item, (bytes, bytearray, FileRange)):
        return bytes(item) if isinstance(item, bytearray) else item
    if isinstance(item, (Image.Image, np.ndarray)):
        return item if isinstance(item, Image.Image) else _from_pixels(item, row)
    if isinstance(item, (list, tuple)):
        if _has_numbers(item):
            return _from_pixels(item, row)
        return [payload(frame, row) for frame in item]
    if isinstance(item, Path):
        item = str(item)
    if not isinstance(item, str) or not item.strip():
        raise row.fail("bad_schema", f"an image is {short(item)}; {EXPECTED}")
    return _from_text(item, row)


def media_list(value: Any, key: str, row: RowContext) -> list[Any]:
    """The images of a column: none, one, a list of them, or the JSON text of a list."""
    if is_absent(value):
        return []
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        found = parsed(value)
        if found is not value and not _exists(value, row):
            row.changed("json_text", f"{key} is the text {short(value)}")
            value = found
    if isinstance(value, (list, tuple)) and not _has_numbers(value):
        return [one for one in value if not is_absent(one)] if len(value) == 1 else list(value)
    return [value]


def is_image(media: Any) -> bool:
    """Whether a payload is an image, by the first bytes of its data or the end of its path."""
    if isinstance(media, FileRange):
        media = media.read(16)
    if isinstance(media, bytes):
        return media.startswith(IMAGE_MAGIC) or (media[:4] == b"RIFF" and media[8:12] == b"WEBP")
    return isinstance(media, (Image.Image, VideoFrame)) or str(media).lower().endswith(IMAGE_SUFFIXES)


def looks_like_media(value: Any) -> bool:
    """Whether a value of an unknown column holds an image or a video: encoded bytes, or a path with such an ending."""
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    if isinstance(value, dict):
        value = next((value[key] for key in ("bytes", *MEDIA_KEYS) if not is_absent(value.get(key))), None)
    if isinstance(value, str):
        return value.lower().endswith(IMAGE_SUFFIXES + VIDEO_SUFFIXES) or value.startswith("data:image")
    return isinstance(value, Image.Image) or (isinstance(value, bytes) and is_image(value))


def _bytes_of(value: Any, row: RowContext) -> Any:
    if isinstance(value, str):
        return _from_base64(value, row)
    if isinstance(value, (list, tuple)) and all(type(one) is int and 0 <= one < 256 for one in value):
        return bytes(value)
    if isinstance(value, (bytes, FileRange)):
        return value
    raise row.fail("bad_schema", f"the bytes of an image are {short(value)}; {EXPECTED}")


def _has_numbers(value: Any) -> bool:
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _from_pixels(value: Any, row: RowContext) -> Image.Image:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise row.fail("bad_schema", f"an image is a list of numbers of unequal lengths: {error}") from error
    whole = array.dtype.kind in "iu" and array.size > 0 and array.min() >= 0 and array.max() <= 255
    if not whole or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise row.fail(
            "bad_schema",
            f"an image is an array {array.shape} of {array.dtype}; expected (height, width), or (height, width, 1, 3 "
            "or 4), of 0 to 255",
        )
    row.changed("array_of_pixels", f"an image is an array {array.shape}")
    return Image.fromarray(
        np.ascontiguousarray(array.astype(np.uint8).squeeze(2) if array.shape[2:] == (1,) else array.astype(np.uint8))
    )


def _from_text(text: str, row: RowContext) -> Any:
    if text.lstrip()[:5].lower() == "data:":
        return _from_data_uri(text.strip(), row)
    url = URL.match(text.strip())
    if url and url[1].lower() != "file":
        raise row.fail(
            "remote_media", f"{text.strip()[:120]}: nothing is fetched while training; download it and give its path"
        )
    if BASE64.fullmatch(text):
        try:
            data = base64.b64decode(_regular(text), validate=True)
        except binascii.Error:
            data = b""
        if is_image(data) or data[4:8] == b"ftyp" or data[:4] == b"\x1aE\xdf\xa3":
            row.changed("bare_base64", f"{text[:24]}... is base64 without data:")
            return data
    return _path(text, row)


def _from_data_uri(uri: str, row: RowContext) -> bytes:
    """RFC 2397: data:[type][;base64],content. Content that is not base64 is percent-encoded."""
    head, comma, body = uri.partition(",")
    if not comma:
        raise row.fail("bad_base64", f"{uri[:40]!r} is a data URI without a comma")
    if head.lower().replace(" ", "").endswith(";base64"):
        return _from_base64(body, row)
    row.changed("percent_encoded_data", f"{head[:40]!r} is not base64")
    return unquote_to_bytes(body)


def _from_base64(text: str, row: RowContext) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        pass
    try:
        data = base64.b64decode(_regular(unquote(text)), validate=True)
    except (binascii.Error, ValueError) as error:
        raise row.fail("bad_base64", f"{short(text[:40])}...: {error}") from error
    row.changed("base64_repaired", f"{text[:24]!r}... has line breaks, no padding, or the alphabet of URLs")
    return data


def _regular(text: str) -> str:
    """Base64 in its regular form, from text with blanks, without padding, or in the alphabet of URLs (RFC 4648)."""
    compact = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    return compact + "=" * (-len(compact) % 4)


def _path(text: str, row: RowContext) -> str:
    encoded = text.encode("utf-8", "replace")
    longest = max(len(part) for part in encoded.split(b"/"))
    if "\0" in text or longest > 255 or len(encoded) > 4000 or encoded.decode("utf-8") != text:
        raise row.fail(
            "bad_path",
            f"{ascii(text[:80])} is no path: a part of {longest} bytes, a NUL, or half of a surrogate pair",
        )
    meant = text.strip()
    if meant[:5].lower() == "file:":
        meant = meant[5:]
        meant = meant[2:] if meant.startswith("//") else meant
        meant = meant.removeprefix("localhost") if meant.startswith("localhost/") else meant
        if "%" in meant and not _exists(meant, row):
            meant = unquote(meant)
            row.changed("percent_encoded_path", f"{text!r} is {meant!r}")
    elif meant != text and _exists(text, row):
        meant = text
    elif meant != text:
        row.changed("blanks_around_path", f"{text!r} is {meant!r}")
    found = _unix(meant, row)
    path = str(_placed(found, row))
    return path if row.absolute and Path(found).is_absolute() else _inside(path, row)


def _inside(path: str, row: RowContext) -> str:
    """The path, if it leads into one of the row's folders when `..` and symbolic links are followed."""
    if row.roots is None:
        return path
    try:
        real = os.path.realpath(path)
    except (OSError, ValueError) as error:
        raise row.fail("bad_path", f"{ascii(path[:120])}: {error}") from error
    if not any(real == root or real.startswith(root.rstrip("/") + "/") for root in row.roots):
        raise row.fail(
            "outside_path",
            f"{path!r} leads to {real!r}, outside of {' and '.join(row.roots)}; if you trust the rows, set "
            'outside_paths = "always" of the source, or image_folder to a folder that holds the images',
        )
    return path


def _unix(path: str, row: RowContext) -> str:
    """A path with `~` or backslashes as a path of this system, unless a file of exactly that name exists."""
    if not (path.startswith("~") or "\\" in path or DRIVE.match(path)) or _exists(path, row):
        return path
    if DRIVE.match(path):
        raise row.fail(
            "bad_path",
            f"{path!r} is on a Windows drive; write paths relative to the file, or to image_folder of the source",
        )
    meant = path.replace("\\", "/")
    if meant.startswith("~"):
        try:
            meant = str(Path(meant).expanduser())
        except RuntimeError as error:
            raise row.fail("bad_path", f"{path!r}: {error}") from error
    row.changed("path_of_another_system", f"{path!r} is {meant!r}")
    return meant


def _placed(path: str, row: RowContext) -> Path:
    return Path(path) if Path(path).is_absolute() else row.folder / path


def _exists(path: str, row: RowContext) -> bool:
    try:
        return _placed(path, row).exists()
    except (OSError, ValueError):
        return False


def all_images(items: Sequence[Any]) -> bool:
    """Whether every payload is an image."""
    return bool(items) and all(is_image(item) for item in items)
