"""Depth maps of data sets: from what is stored to planar metres, 0 where nothing was measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastvst.data.media_files import opened_image

SATURATED = 65535  # of 16-bit depth


def metres(stored: np.ndarray, units: float = 1000.0) -> np.ndarray:
    """16-bit depth (H, W) with `units` in a metre -> float32 metres; saturated depth becomes 0."""
    depth = stored * np.float32(1 / units)
    depth[stored >= SATURATED] = 0
    return depth


def read_depth(path: Path) -> np.ndarray:
    """A depth map in metres (H, W) float32, 0 where it is missing: 16-bit PNG in millimetres, or .npy in metres.

    Raises:
        ValueError: several channels, or 8-bit depth.
    """
    if path.suffix == ".npy":
        depth = np.load(path, allow_pickle=False).astype(np.float32)
    else:
        with opened_image(path) as opened:
            stored = np.asarray(opened)
        if stored.dtype == np.uint8:
            raise ValueError(f"{path}: 8-bit depth (a picture of depth?); expected 16 bits")
        depth = metres(stored)
    if depth.ndim != 2:
        raise ValueError(f"{path}: depth of shape {depth.shape}; expected one channel")
    return np.where(np.isfinite(depth) & (depth > 0), depth, 0)


def planar_depth(along_ray: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """Distances along the rays (H, W) -> planar depth (H, W), by the intrinsics (3, 3) in pixels."""
    height, width = along_ray.shape
    x = (np.arange(width) + 0.5 - intrinsics[0, 2]) / intrinsics[0, 0]
    y = (np.arange(height) + 0.5 - intrinsics[1, 2]) / intrinsics[1, 1]
    return along_ray / np.sqrt(1 + x[None] ** 2 + y[:, None] ** 2)


def nearest(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map (h, w) at another size (width, height): each pixel takes the value of the pixel below its centre."""
    height, width = values.shape
    if (width, height) == size:
        return values
    columns = ((np.arange(size[0]) + 0.5) * width / size[0]).astype(int)
    rows = ((np.arange(size[1]) + 0.5) * height / size[1]).astype(int)
    return values.take(rows, 0).take(columns, 1)
