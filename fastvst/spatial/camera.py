"""Pinhole cameras and the field-of-view unification of Visual Spatial Tuning.

Frames: the world has Z up; the camera has X right, Y down, Z forward (as in Omni3D and VST). Pixel coordinates are
continuous: the image spans [0, width] x [0, height], and the centre of the pixel in column i is at u = i + 0.5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# VST's virtual camera: the field of view of SUN RGB-D's Kinect v2 at a width of 960 pixels.
BASE_WIDTH = 960
BASE_HFOV = 69.16


@dataclass(frozen=True, eq=False)
class Camera:
    """A pinhole camera. `rotation` (3, 3) and `translation` (3,), float64, map world metres to the camera frame:
    x_cam = rotation @ x_world + translation. fx, fy, cx, cy are pixels."""

    width: int
    height: int
    fx: float
    fy: float
    cx: float
    cy: float
    rotation: np.ndarray
    translation: np.ndarray

    @property
    def position(self) -> np.ndarray:
        """Camera centre in the world, (3,)."""
        return -self.rotation.T @ self.translation


def look(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """World-to-camera rotation (3, 3) of a camera that starts level and faces world +Y; angles in degrees.

    Positive yaw turns left (counter-clockwise from above), negative pitch looks down, positive roll turns the camera
    clockwise about its viewing direction.
    """
    y, p, r = (math.radians(a) for a in (yaw, pitch, roll))
    forward = np.array([-math.sin(y) * math.cos(p), math.cos(y) * math.cos(p), math.sin(p)])
    right = np.array([math.cos(y), math.sin(y), 0.0])
    down = np.cross(forward, right)
    level = np.stack([right, down, forward])
    turn = np.array([[math.cos(r), math.sin(r), 0.0], [-math.sin(r), math.cos(r), 0.0], [0.0, 0.0, 1.0]])
    return turn @ level


def place(camera: Camera, position: np.ndarray, rotation: np.ndarray) -> Camera:
    """A camera with the same intrinsics at world `position` (3,) with world-to-camera `rotation` (3, 3)."""
    return Camera(
        camera.width, camera.height, camera.fx, camera.fy, camera.cx, camera.cy, rotation, -rotation @ position
    )


def to_camera(camera: Camera, points: np.ndarray) -> np.ndarray:
    """World points (..., 3) -> camera frame (..., 3), metres."""
    return points @ camera.rotation.T + camera.translation


def project(camera: Camera, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """World points (..., 3) -> pixel coordinates (..., 2) and depth (...) along Z in metres.

    Points with depth <= 0 are behind the camera; their pixel coordinates are finite but meaningless.
    """
    local = to_camera(camera, points)
    depth = local[..., 2]
    safe = np.where(np.abs(depth) < 1e-9, 1e-9, depth)
    u = camera.fx * local[..., 0] / safe + camera.cx
    v = camera.fy * local[..., 1] / safe + camera.cy
    return np.stack([u, v], -1), depth


def unproject(camera: Camera, pixels: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Pixel coordinates (..., 2) and planar depth (...) in metres -> world points (..., 3)."""
    x = (pixels[..., 0] - camera.cx) / camera.fx * depth
    y = (pixels[..., 1] - camera.cy) / camera.fy * depth
    return (np.stack([x, y, depth], -1) - camera.translation) @ camera.rotation


def fov(width: int, height: int, fx: float) -> tuple[float, float]:
    """Horizontal and vertical field of view in degrees, both from `fx`: VST ignores f_y and the principal point."""
    return math.degrees(2 * math.atan(width / (2 * fx))), math.degrees(2 * math.atan(height / (2 * fx)))


def unify_fov(
    width: int, height: int, fx: float, *, base_width: int = BASE_WIDTH, base_hfov: float = BASE_HFOV
) -> tuple[int, int, float, float]:
    """Image size that gives the focal length of VST's virtual camera, and the field of view of the image.

    The target focal length is f* = base_width / (2 tan(base_hfov / 2)), 696.32 px by default. The new size is
    int(width f* / fx), int(height f* / fx), truncated as in VST. Metric labels stay valid. A smaller `base_width`
    scales all images down by one factor (for small models); the angles do not depend on it.

    Returns:
        (new_width, new_height, hfov_deg, vfov_deg).

    Raises:
        ValueError: a size or focal length that is not positive.
    """
    if width <= 0 or height <= 0 or not fx > 0 or base_width <= 0 or not 0 < base_hfov < 180:
        raise ValueError(
            f"unify_fov: width {width}, height {height}, fx {fx}, base_width {base_width} must be positive "
            f"and base_hfov {base_hfov} in (0, 180)"
        )
    target = base_width / (2 * math.tan(math.radians(base_hfov) / 2))
    hfov, vfov = fov(width, height, fx)
    return int(width * target / fx), int(height * target / fx), hfov, vfov
