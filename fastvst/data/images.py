"""Images to patches: size rule, decoding with limits on size and work, and the patch order of Qwen2.5-VL.

Pixel values equal those of transformers' PIL image processor bit for bit: both resize with Pillow's bicubic filter, and
`(u8 / 255 - mean) / std` in float32 equals its float64 `u8 * (1 / 255)` rounded to float32 for all 256 inputs.
`resize="torch"` gives up that equality for speed (see resize_planar). Images are seen as viewers show them: alpha on
white, EXIF orientation applied (see image_modes; both are options of the processor).
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from fastvst.data.file_range import FileRange, VideoFrame
from fastvst.data.image_modes import AS_DISPLAYED, ImageRules, shown, to_rgb
from fastvst.data.media_files import (
    MediaError,
    check_format,
    check_length,
    image_bytes,
    jpeg_scans,
    open_image,
    opened_image,
)
from fastvst.data.video_frame import decode_frame, frame_size

RESIZE = ("pillow", "torch")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP, as published with Qwen2.5-VL
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
EXPLICIT_MIN_TOKENS = 4
EXPLICIT_MAX_TOKENS = 16384  # the limits of qwen-vl-utils for a size that a row gives itself
MAX_ASPECT = 200  # as smart_resize of qwen-vl-utils and transformers
TINY_SIDE = 28  # VST enlarges an image with a shorter side until both sides have at least 56 pixels
WORK_PER_SECOND = 200_000_000  # decoded pixels that count as one second of a time limit (96 frames of 1920 x 1080)
ROWS_AT_ONCE = 64  # patches normalised at a time: 64 x 588 float32 = 150 KB fit the L2 cache (1.4 ms instead of 2.1)


@dataclass(frozen=True)
class PatchGeometry:
    """How pixels become patches: sizes in pixels; `mean` and `std` of the three channels on the 0..1 scale."""

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    @property
    def factor(self) -> int:
        """Side of a merged patch in pixels (28 as published)."""
        return self.patch_size * self.merge_size

    @property
    def patch_dim(self) -> int:
        """Length of one flattened patch (1,176 as published)."""
        return 3 * self.temporal_patch_size * self.patch_size**2


def smart_resize(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) in multiples of `factor`, area within [min_pixels, max_pixels], aspect ratio nearly kept.

    This is the rule of Qwen2.5-VL; it gives the same numbers as transformers' smart_resize.

    Raises:
        MediaError: "aspect_ratio" if one side is more than 200 times the other, "empty_image" for a zero side.
    """
    if min(height, width) < 1:
        raise MediaError("empty_image", f"the image is {width} x {height} pixels")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise MediaError("aspect_ratio", f"the image is {width} x {height}; at most {MAX_ASPECT}:1 is allowed")
    rows = round(height / factor)
    columns = round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor)
        columns = math.ceil(width * grow / factor)
    return max(rows, 1) * factor, max(columns, 1) * factor


def target_size(
    width: int, height: int, *, factor: int, min_pixels: int, max_pixels: int, explicit: tuple[int, int] | None = None
) -> tuple[int, int]:
    """(width, height) to which an image of `width` x `height` is resized.

    `explicit` is a (width, height) from the row or from the FoV unification. It is rounded to the factor, and the pixel
    limits do not apply (only 4 to 16,384 merged patches), as in VST. An image with a side below 28 pixels is first
    scaled so that both sides have at least 56, as in VST; transformers has no such rule.

    Raises:
        MediaError: see `smart_resize`.
    """
    if explicit is not None:
        width, height = explicit
        min_pixels = EXPLICIT_MIN_TOKENS * factor**2
        max_pixels = EXPLICIT_MAX_TOKENS * factor**2
    elif 0 < min(width, height) < TINY_SIDE and max(width, height) <= MAX_ASPECT * min(width, height):
        grow = 2 * TINY_SIDE / min(width, height)
        width = round(width * grow)
        height = round(height * grow)
    rows, columns = smart_resize(height, width, factor=factor, min_pixels=min_pixels, max_pixels=max_pixels)
    return columns, rows


@dataclass(frozen=True)
class ImageHeader:
    """An image before decoding.

    Attributes:
        size: (width, height) as displayed.
        notes: codes of the rules that change the image, see `image_modes.shown`.
    """

    size: tuple[int, int]
    notes: tuple[str, ...] = ()


def image_header(source: Any, *, max_source_pixels: int, rules: ImageRules = AS_DISPLAYED) -> ImageHeader:
    """Size and notes of an image from its header; no pixel is decoded.

    Args:
        source: PIL image, path, encoded bytes, their range in a file, or a frame of a video file.

    Raises:
        MediaError: "missing_image", "not_a_file", "unreadable_file", "empty_file", "file_too_large", "broken_image",
            "decompression_bomb", "bad_image_type", "bad_image_format", "decode_timeout"; for a frame of a video as
            `read_header`.
    """

    def read(image: Image.Image) -> ImageHeader:
        _check_bomb(image.size, max_source_pixels)
        return ImageHeader(*shown(image, rules))

    if isinstance(source, Image.Image):
        check_format(source)
        return _guarded(read, source)
    if isinstance(source, VideoFrame):
        return ImageHeader(frame_size(source, max_source_pixels=max_source_pixels, orientation=rules.orientation))
    if isinstance(source, (str, Path)):
        return _guarded(lambda path: _read_file(path, max_source_pixels, read), source)
    if isinstance(source, FileRange):
        check_length(source.size, max_source_pixels)
        return _guarded(lambda part: _read_range(part, read), source)
    data = image_bytes(source, max_source_pixels)
    return _guarded(lambda raw: read(open_image(io.BytesIO(raw))), data)


def image_size(source: Any, *, max_source_pixels: int, rules: ImageRules = AS_DISPLAYED) -> tuple[int, int]:
    """(width, height) of an image as displayed, from its header. Arguments and errors as in `image_header`."""
    return image_header(source, max_source_pixels=max_source_pixels, rules=rules).size


def load_rgb(
    source: Any, *, max_source_pixels: int, time_limit: float, rules: ImageRules = AS_DISPLAYED
) -> Image.Image:
    """Decode an image to mode RGB as `rules` say (see `image_modes.to_rgb`).

    Args:
        source: PIL image, path, encoded bytes (first frame of an animation), or a frame of a video file.
        max_source_pixels: larger images are rejected before decoding.
        time_limit: most work, in nominal seconds of WORK_PER_SECOND pixels; a progressive JPEG counts once a scan.

    Raises:
        MediaError: as `image_header`.
    """
    if isinstance(source, VideoFrame):
        limit = time_limit * WORK_PER_SECOND
        return decode_frame(source, max_source_pixels=max_source_pixels, limit=limit, orientation=rules.orientation)
    if isinstance(source, Image.Image):
        check_format(source)
        scans = 1
    else:
        data = image_bytes(source, max_source_pixels)
        scans = jpeg_scans(data)
        source = _guarded(lambda raw: open_image(io.BytesIO(raw)), data)
    _check_bomb(source.size, max_source_pixels)
    work = scans * source.size[0] * source.size[1]
    if work > time_limit * WORK_PER_SECOND:
        raise MediaError(
            "decode_timeout",
            f"{source.size[0]} x {source.size[1]} pixels in {scans} scans are {work / WORK_PER_SECOND:.3g} s at "
            f"{WORK_PER_SECOND:,} pixels a second; image_time_limit is {time_limit:g}",
        )
    image = _guarded(lambda opened: to_rgb(opened, rules), source)
    _guarded(lambda converted: converted.load(), image)
    return image


def _read_file(path: str | Path, max_source_pixels: int, read: Callable[[Image.Image], Any]) -> Any:
    with opened_image(path, max_source_pixels) as image:
        return read(image)


def _read_range(source: FileRange, read: Callable[[Image.Image], Any]) -> Any:
    with source.open() as file, open_image(file) as image:
        return read(image)


def _guarded(step: Callable[[Any], Any], source: Any) -> Any:
    """Run one step of reading an image; every exception becomes a MediaError with a reason code."""
    try:
        return step(source)
    except MediaError:
        raise
    except Image.DecompressionBombError as error:
        raise MediaError("decompression_bomb", str(error)) from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ... on damaged data
        raise MediaError("broken_image", f"{type(error).__name__}: {error}") from error


def _check_bomb(size: tuple[int, int], max_source_pixels: int) -> None:
    if size[0] * size[1] > max_source_pixels:
        raise MediaError(
            "decompression_bomb",
            f"the image is {size[0]} x {size[1]} pixels; max_source_pixels allows {max_source_pixels}",
        )


def resize_planar(image: Image.Image, size: tuple[int, int], method: str = "pillow") -> np.ndarray:
    """Bicubic, antialiased resize of an RGB image to `size` (width, height): (3, height, width) uint8.

    Args:
        method: "pillow", as VST and qwen-vl-utils resize, or "torch", torchvision's operator. It is three times as fast
            and within 2 of 255 levels of Pillow's on smooth images that no pass clips (its weights have 16 bits instead
            of 22). At edges from black to white both passes overshoot and only Pillow always clips between them; there
            the difference is up to 32 levels.
    """
    if method == "torch" and image.size != size:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        return interpolate(pixels, (size[1], size[0]), mode="bicubic", antialias=True)[0].contiguous().numpy()
    resized = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
    return np.stack([np.asarray(band) for band in resized.split()])


def patchify(
    frames: Sequence[np.ndarray] | np.ndarray, geometry: PatchGeometry, out: np.ndarray | None = None
) -> np.ndarray:
    """Patches of one image (one frame) or one video (an even number of frames).

    Args:
        frames: F arrays (3, H, W) uint8, H and W multiples of the merged patch. A single frame fills every temporal
            slot of its patches, as in transformers; several frames are taken `temporal_patch_size` at a time.
        out: (P, patch_dim) to write into: float32 for normalised values, uint8 for the pixels as they are; float32 is
            allocated if not given.

    Returns:
        (P, patch_dim), `out`. P runs over (t, block row, block column, row in block, column in block), the elements of
        a patch over (channel, time, row, column).
    """
    p = geometry.patch_size
    m = geometry.merge_size
    times = geometry.temporal_patch_size
    height, width = frames[0].shape[1:]
    rows = height // p
    columns = width // p
    steps = 1 if len(frames) == 1 else len(frames) // times
    if out is None:
        out = np.empty((steps * rows * columns, geometry.patch_dim), dtype=np.float32)
    mean = np.asarray(geometry.mean, dtype=np.float32)[:, None]
    std = np.asarray(geometry.std, dtype=np.float32)[:, None]
    slots = out.reshape(steps, rows * columns, 3, times, p * p)
    for index, frame in enumerate(frames):
        # A void type of patch_size bytes lets numpy copy a whole patch row at a time instead of single bytes.
        cells = frame.view(np.dtype((np.void, p))).reshape(3, rows // m, m, p, columns // m, m)
        ordered = np.ascontiguousarray(cells.transpose(1, 4, 2, 5, 0, 3)).view(np.uint8).reshape(-1, 3, p * p)
        step, time_slot = divmod(index, times)
        for at in range(0, rows * columns, ROWS_AT_ONCE):
            values: Any = ordered[at : at + ROWS_AT_ONCE]
            if out.dtype != np.uint8:
                values = values.astype(np.float32)
                values /= np.float32(255)
                values -= mean
                values /= std
            if len(frames) == 1:
                slots[0, at : at + ROWS_AT_ONCE] = values[:, :, None]
            else:
                slots[step, at : at + ROWS_AT_ONCE, :, time_slot] = values
    return out
