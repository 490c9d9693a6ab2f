"""ScanNet's .sens files: colour, depth and poses of a scan in one file, frame by frame.

Layout (SensReader of github.com/ScanNet/ScanNet, version 4), little-endian: version u32; sensor name with its length
u64; four 4 x 4 float32 matrices: intrinsics and extrinsics of colour, then those of depth; compression of
colour i32 (0 raw, 1 PNG, 2 JPEG) and of depth i32 (0 raw u16, 1 zlib u16); width and height of colour, then of depth,
u32; depth units in a metre f32; frames u64. A frame: camera-to-world 4 x 4 float32, two timestamps u64, bytes of colour
u64 and of depth u64, then the data. Only the frames that are asked for are decoded.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np

from fastvst.scenes.adapters.depth import metres
from fastvst.scenes.adapters.images import StoredImage, stored_image

MAX_FRAMES = 1_000_000
MAX_BYTES = 1 << 28  # of one frame's colour or depth


class SensFile:
    """An open .sens file. `poses` (N, 4, 4) camera to world; `color_intrinsics`, `depth_intrinsics` (3, 3).

    Raises:
        ValueError: another version, an absurd size, or a file that is cut; names the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.stream = open(self.path, "rb")  # noqa: SIM115
        try:
            self._read_header()
            self._read_index()
        except BaseException:
            self.stream.close()
            raise

    def __enter__(self) -> SensFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def _take(self, pattern: str) -> tuple:
        size = struct.calcsize(pattern)
        data = self.stream.read(size)
        if len(data) != size:
            raise ValueError(f"{self.path}: the file ends at byte {self.stream.tell()}; it is cut")
        return struct.unpack(pattern, data)

    def _read_header(self) -> None:
        (version,) = self._take("<I")
        (length,) = self._take("<Q")
        if version != 4 or length > 4096:
            raise ValueError(f"{self.path}: version {version}; expected a .sens file of version 4")
        self.stream.seek(length, io.SEEK_CUR)
        matrices = np.array(self._take("<64f"), dtype=np.float64).reshape(4, 4, 4)
        self.color_intrinsics = matrices[0, :3, :3]
        self.depth_intrinsics = matrices[2, :3, :3]
        self.color_compression, self.depth_compression = self._take("<2i")
        if self.color_compression not in (0, 1, 2) or self.depth_compression not in (0, 1):
            raise ValueError(
                f"{self.path}: compression {self.color_compression} of colour and {self.depth_compression} of depth; "
                "expected raw, PNG or JPEG, and raw or zlib"
            )
        self.color_size = self._take("<2I")
        self.depth_size = self._take("<2I")
        (self.units,) = self._take("<f")
        (self.count,) = self._take("<Q")
        if self.count > MAX_FRAMES or not self.units > 0:
            raise ValueError(f"{self.path}: {self.count} frames, {self.units} depth units in a metre")

    def _read_index(self) -> None:
        """Where the data of every frame are; seeks over them."""
        end = self.path.stat().st_size
        self.poses = np.zeros((self.count, 4, 4))
        self.places: list[tuple[int, int, int]] = []
        for k in range(self.count):
            values = self._take("<16f4Q")
            self.poses[k] = np.array(values[:16], dtype=np.float64).reshape(4, 4)
            color, depth = values[18:]
            here = self.stream.tell()
            if max(color, depth) > MAX_BYTES or here + color + depth > end:
                raise ValueError(f"{self.path}: frame {k} of {self.count} ends behind the file: it is cut or damaged")
            self.places.append((here, color, depth))
            self.stream.seek(color + depth, io.SEEK_CUR)

    def frame(self, k: int, longest: int = 1 << 16) -> tuple[np.ndarray, np.ndarray]:
        """Image (H, W, 3) uint8 and planar depth (h, w) in metres of frame `k`, 0 where it is missing.

        longest: the longer side that the caller needs; a much larger JPEG is decoded smaller, see `stored_image`.
        """
        image, depth = self.shot(k, longest)
        return (image() if isinstance(image, StoredImage) else image), depth

    def shot(self, k: int, longest: int) -> tuple[np.ndarray | StoredImage, np.ndarray]:
        """As `frame`, with an image that is not decoded yet unless it is stored raw."""
        place, color, depth = self.places[k]
        self.stream.seek(place)
        data = self.stream.read(color)
        width, height = self.color_size
        if self.color_compression == 0:
            image: np.ndarray | StoredImage = np.frombuffer(data, np.uint8).reshape(height, width, 3)
        else:
            image = stored_image(data, longest, f"{self.path}: frame {k}")
            if image.stored != self.color_size:
                raise ValueError(
                    f"{self.path}: frame {k}: colour of {image.stored} pixels; the header says {self.color_size}"
                )
        data = self.stream.read(depth)
        width, height = self.depth_size
        if self.depth_compression == 1:
            inflate = zlib.decompressobj()
            data = inflate.decompress(data, 2 * width * height + 1)
        if len(data) != 2 * width * height:
            raise ValueError(f"{self.path}: frame {k}: {len(data)} bytes of depth; expected {2 * width * height}")
        stored = np.frombuffer(data, "<u2").reshape(height, width)
        return image, metres(stored, self.units)
