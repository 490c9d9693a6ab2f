"""Colour images of data sets."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from fastvst.data.media_files import open_file

FILE_BYTES = 1 << 28  # largest file of one frame; a 20-megapixel PNG has 60 MB


def read_image(source: Path | bytes, longest: int) -> tuple[np.ndarray, tuple[int, int]]:
    """A JPEG or PNG as (H, W, 3) uint8, and its stored size (width, height).

    A JPEG that is at least twice as large as needed (longer side `longest`) is decoded at a half, a quarter or an
    eighth of its size, which takes a third of the time; it is never smaller than needed.

    Raises:
        MediaError: no regular file, or one that is too long; see `open_file`. OSError: from Pillow.
    """
    if isinstance(source, bytes):
        return _decode(io.BytesIO(source), longest)
    with open_file(source, "image", FILE_BYTES) as file:
        return _decode(file, longest)


def _decode(file: BinaryIO, longest: int) -> tuple[np.ndarray, tuple[int, int]]:
    with Image.open(file, formats=["JPEG", "PNG"]) as opened:
        stored = opened.size
        scale = min(1.0, longest / max(stored))
        opened.draft("RGB", (max(1, round(stored[0] * scale)), max(1, round(stored[1] * scale))))
        return np.asarray(opened.convert("RGB")), stored
