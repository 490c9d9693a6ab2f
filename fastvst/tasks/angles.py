"""Directions on the floor, seen from above: compass sectors, clock hours, sides of a person who faces an object.

All angles are clockwise, in degrees. A direction near the border of its sector is rejected: within ten degrees for the
eight compass words, within five for the twelve hours, whose sectors are only thirty degrees wide.
"""

from __future__ import annotations

import math

import numpy as np

from fastvst.scenes.scene import Scene
from fastvst.spatial.camera import Camera

COMPASS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
HOURS = tuple(f"{hour} o'clock" for hour in (12, *range(1, 12)))
BORDER = {8: 10.0, 12: 5.0}  # degrees kept free on either side of a border between sectors
MIN_REACH = 0.5  # metres on the floor; for nearer objects a few centimetres change the direction


def spot(scene: Scene, object_id: int) -> np.ndarray:
    """Centre of an object's box on the floor plane, world metres (2,)."""
    return np.array(scene.object(object_id).box[:2])


def heading(camera: Camera) -> np.ndarray:
    """Viewing direction of a camera on the floor plane (2,), not normalised (shorter for a tilted camera)."""
    return camera.rotation[2, :2]


def clockwise(start: np.ndarray, end: np.ndarray) -> float:
    """Degrees in [0, 360) by which `start` (2,) must turn clockwise, seen from above, to point along `end` (2,)."""
    left = math.atan2(float(start[0] * end[1] - start[1] * end[0]), float(start @ end))
    return -math.degrees(left) % 360


def sector(angle: float, count: int) -> int | None:
    """Which of `count` sectors (0 is centred on 0 degrees, then clockwise), or None near a border."""
    width = 360 / count
    nearest = round(angle / width)
    if abs(angle - nearest * width) > width / 2 - BORDER[count]:
        return None
    return nearest % count


def clear_direction(start: np.ndarray, end: np.ndarray) -> bool:
    """Whether two floor points (2,) are far enough apart for a direction from one to the other."""
    return float(np.linalg.norm(end - start)) >= MIN_REACH


def quadrant(angle: float) -> str | None:
    """front-right, back-right, back-left or front-left of a person; None within 10 degrees of an axis."""
    if min(angle % 90, 90 - angle % 90) < 10:
        return None
    return ("front-right", "back-right", "back-left", "front-left")[int(angle // 90) % 4]


def left_right_back(angle: float) -> str | None:
    """right (0-135), back (135-225) or left (225-360), the three of VSI-Bench; None within 10 degrees of a border."""
    if min(abs(angle - border) for border in (0, 135, 225, 360)) < 10:
        return None
    return "right" if angle < 135 else "back" if angle < 225 else "left"


def left_right(angle: float) -> str | None:
    """left or right of a person; None within 20 degrees of straight ahead or behind."""
    if min(abs(angle - border) for border in (0, 180, 360)) < 20:
        return None
    return "right" if angle < 180 else "left"
