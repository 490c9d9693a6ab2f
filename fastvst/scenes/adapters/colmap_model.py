"""COLMAP's sparse models, text and binary: the cameras and the posed images of a folder.

Text (colmap.github.io/format.html): cameras.txt "id model width height params...", images.txt "id qw qx qy qz tx ty
tz camera name" on every other line. Binary, little-endian: cameras.bin holds a count u64, then id u32, model i32, width
and height u64, params f64 each; images.bin a count u64, then id u32, quaternion and translation 7 f64, camera u32, the
name up to a zero byte, a count u64 of points of 24 bytes. Poses are world to camera with OpenCV axes. points3D is not
read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# By the number that a binary model stores: name and how many parameters (src/colmap/sensor/models.h).
MODELS = (
    ("SIMPLE_PINHOLE", 3),
    ("PINHOLE", 4),
    ("SIMPLE_RADIAL", 4),
    ("RADIAL", 5),
    ("OPENCV", 8),
    ("OPENCV_FISHEYE", 8),
    ("FULL_OPENCV", 12),
    ("FOV", 5),
    ("SIMPLE_RADIAL_FISHEYE", 4),
    ("RADIAL_FISHEYE", 5),
    ("THIN_PRISM_FISHEYE", 12),
)
PARAMETERS = dict(MODELS)
LONGEST_NAME = 4096
CAMERA = struct.Struct("<IiQQ")
IMAGE = struct.Struct("<I7dI")
POINT = 24  # bytes


@dataclass(frozen=True)
class ColmapCamera:
    """A camera as COLMAP stores it: `model` by name, size in pixels, its parameters."""

    model: str
    width: float
    height: float
    params: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class ColmapImage:
    """One image: its name, its camera, its camera-to-world pose (4, 4) with OpenCV axes."""

    name: str
    camera: ColmapCamera
    pose: np.ndarray


def read_model(folder: Path) -> list[ColmapImage]:
    """The images of a model, sorted by name; the text form where a folder has both.

    Raises:
        FileNotFoundError: neither form is complete.
        ValueError: a damaged line or file, an unknown camera; names the file.
    """
    if not (folder / "cameras.txt").is_file() and (folder / "cameras.bin").is_file():
        cameras = _binary_cameras(folder / "cameras.bin")
        path = folder / "images.bin"
        images = list(_binary_images(path))
    else:
        cameras = _text_cameras(folder / "cameras.txt")
        path = folder / "images.txt"
        images = list(_text_images(path))
    found = []
    for name, values, number in images:
        if number not in cameras:
            raise ValueError(f"{path}: image {name!r} has camera {number}; the model has {sorted(cameras)[:8]}")
        try:
            found.append(ColmapImage(name, cameras[number], _pose(values)))
        except ValueError as error:
            raise ValueError(f"{path}: image {name!r}: {error}") from error
    return sorted(found, key=lambda item: item.name)


def _text_cameras(path: Path) -> dict[int, ColmapCamera]:
    cameras = {}
    for line in _lines(path):
        try:
            number, model, width, height, *params = line.split()
            cameras[int(number)] = ColmapCamera(model, float(width), float(height), tuple(float(p) for p in params))
        except ValueError as error:
            raise ValueError(f"{path}: {line[:80]!r}: {error}") from error
    return cameras


def _text_images(path: Path) -> Iterator[tuple[str, tuple[float, ...], int]]:
    for line in list(_lines(path, keep_empty=True))[::2]:
        if not line.strip():
            continue
        try:
            _, *values = line.split(maxsplit=9)
            yield values[8].strip(), tuple(float(v) for v in values[:7]), int(values[7])
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path}: {line[:80]!r}: {error}") from error


def _lines(path: Path, keep_empty: bool = False) -> Iterator[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") and (keep_empty or line.strip()):
            yield line


class _Bytes:
    """A binary file that is read from front to back; every read is inside it."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing")
        self.path = path
        self.data = path.read_bytes()
        self.place = 0

    def take(self, layout: struct.Struct) -> tuple:
        self.skip(layout.size)
        return layout.unpack_from(self.data, self.place - layout.size)

    def skip(self, size: int) -> None:
        if self.place + size > len(self.data):
            raise ValueError(f"{self.path}: the file of {len(self.data)} bytes ends at byte {self.place}; it is cut")
        self.place += size

    def count(self, least: int) -> int:
        """A number of entries of at least `least` bytes each, which the rest of the file can hold."""
        (number,) = self.take(struct.Struct("<Q"))
        if number * least > len(self.data) - self.place:
            raise ValueError(f"{self.path}: {number} entries at byte {self.place} of {len(self.data)}; it is damaged")
        return int(number)

    def name(self) -> str:
        end = self.data.find(b"\0", self.place, self.place + LONGEST_NAME)
        if end < 0:
            raise ValueError(f"{self.path}: a name at byte {self.place} without an end; it is damaged")
        try:
            found = self.data[self.place : end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: a name at byte {self.place}: {error}; it is damaged") from error
        self.place = end + 1
        return found

    def finish(self) -> None:
        if self.place != len(self.data):
            raise ValueError(f"{self.path}: {len(self.data) - self.place} bytes behind the last entry; it is damaged")


def _binary_cameras(path: Path) -> dict[int, ColmapCamera]:
    data = _Bytes(path)
    cameras = {}
    for _ in range(data.count(CAMERA.size)):
        number, model, width, height = data.take(CAMERA)
        if not 0 <= model < len(MODELS):
            raise ValueError(f"{path}: camera {number} has model number {model}; expected 0 to {len(MODELS) - 1}")
        name, size = MODELS[model]
        cameras[int(number)] = ColmapCamera(name, width, height, data.take(struct.Struct(f"<{size}d")))
    data.finish()
    return cameras


def _binary_images(path: Path) -> Iterator[tuple[str, tuple[float, ...], int]]:
    data = _Bytes(path)
    for _ in range(data.count(IMAGE.size)):
        _, *values, camera = data.take(IMAGE)
        name = data.name()
        data.skip(POINT * data.count(POINT))
        yield name, tuple(values), int(camera)
    data.finish()


def _pose(values: tuple[float, ...]) -> np.ndarray:
    """Camera to world (4, 4) of a world-to-camera quaternion (w, x, y, z) and translation."""
    if not np.isfinite(values).all():
        raise ValueError(f"pose {values} is not finite")
    w, x, y, z = values[:4]
    n = w * w + x * x + y * y + z * z
    if not 0.5 < n < 2:
        raise ValueError(f"quaternion {(w, x, y, z)}; expected a unit quaternion")
    s = 2 / n
    turn = np.array(
        [
            [1 - s * (y * y + z * z), s * (x * y - w * z), s * (x * z + w * y)],
            [s * (x * y + w * z), 1 - s * (x * x + z * z), s * (y * z - w * x)],
            [s * (x * z - w * y), s * (y * z + w * x), 1 - s * (x * x + y * y)],
        ]
    )
    pose = np.eye(4)
    pose[:3, :3] = turn.T
    pose[:3, 3] = -turn.T @ np.array(values[4:])
    return pose
