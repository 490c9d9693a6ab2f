"""Checks of what data sets say about geometry, and the convention of their poses found from the data.

Every check returns a sentence that says what is wrong, or None. The readers decide what to leave out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fastvst.spatial.boxes import rotations

Report = Callable[[str], None]
MARGIN = 0.05  # metres that a measured surface may lie outside its box, and the same share of the box's size
FITS = 0.8  # a convention is taken for the right one if this share of the surface points lies in the boxes
MISFIT = 0.5  # below this share, boxes and depth do not belong together


class Problems:
    """What a reader found wrong: passed to `report` at once, or collected and raised at the end.

    One bad object or frame never ends a file: the reader leaves it out, reads on, and calls `finish`.
    """

    def __init__(self, report: Report | None) -> None:
        self.report = report
        self.found: list[Exception] = []

    def add(self, error: Exception) -> None:
        """Note what was left out and why."""
        if self.report is not None:
            self.report(str(error))
        else:
            self.found.append(error)

    def leave_out(self, where: str, error: Exception) -> None:
        """Note that `error` cost what `where` names; a missing file stays a FileNotFoundError."""
        what = repr(error) if isinstance(error, (KeyError, TypeError)) else str(error)
        text = f"{where}: {what}; it is left out"
        self.add(FileNotFoundError(text) if isinstance(error, FileNotFoundError) else ValueError(text))

    def finish(self) -> None:
        """Raise the first problem if there are any and nobody was told; the message counts the others."""
        if self.found:
            first = self.found[0]
            more = len(self.found) - 1
            rest = f" (and {more} more problems; pass `report` to list all and to keep the rest)" if more else ""
            raise type(first)(f"{first}{rest}")


def box_problem(box: Sequence[float]) -> str | None:
    """What is wrong with a box of nine numbers."""
    if len(box) != 9 or not np.isfinite(np.asarray(box, dtype=np.float64)).all():
        return f"box {tuple(box)}; expected nine finite numbers"
    if min(box[3:6]) <= 0:
        return f"sizes {tuple(box[3:6])}; expected sizes > 0"
    return None


def rotation_problem(matrix: Any) -> str | None:
    """What is wrong with a rotation (3, 3): shape, NaN, not orthogonal by more than 1 %, or mirrored."""
    r = np.asarray(matrix, dtype=np.float64)
    if r.shape != (3, 3) or not np.isfinite(r).all():
        return f"rotation of shape {r.shape} or with NaN; expected 3 x 3 finite numbers"
    if np.abs(r @ r.T - np.eye(3)).max() > 0.02:
        return f"rotation that is not orthogonal (off by {np.abs(r @ r.T - np.eye(3)).max():.3f})"
    if np.linalg.det(r) < 0:
        return "mirrored rotation (determinant -1): the axes are left-handed"
    return None


def intrinsics_problem(matrix: Any, width: float, height: float) -> str | None:
    """What is wrong with intrinsics (3, 3 or 4, 4) of an image of this size in pixels."""
    k = np.asarray(matrix, dtype=np.float64)
    if k.ndim != 2 or min(k.shape) < 3 or not np.isfinite(k[:3, :3]).all():
        return f"intrinsics {k.tolist()}; expected 3 x 3 finite numbers"
    if k[0, 0] <= 0 or k[1, 1] <= 0:
        return f"focal lengths {k[0, 0]}, {k[1, 1]}; expected numbers > 0"
    if abs(k[0, 1]) > 0.001 * k[0, 0]:
        return f"skew {k[0, 1]}; only cameras without skew are read"
    if not 0.5 < k[0, 0] / k[1, 1] < 2:
        return f"focal lengths {k[0, 0]} and {k[1, 1]}; expected a ratio between 0.5 and 2"
    if not (0 < k[0, 2] < width and 0 < k[1, 2] < height):
        return (
            f"principal point ({k[0, 2]}, {k[1, 2]}) outside the image of {width} x {height} pixels; "
            "are the intrinsics those of another size or of the turned image?"
        )
    return None


def size_problem(stored: tuple[int, int], annotated: tuple[float, float], rounding: float = 0.02) -> str | None:
    """Whether a stored image (width, height) is a resized copy of the annotated one, within `rounding`."""
    w, h = stored
    aw, ah = annotated
    if min(aw, ah) <= 0:
        return f"annotated size {aw} x {ah}; expected numbers > 0"
    if abs(math.log((w / aw) / (h / ah))) > rounding:
        turned = " (it is turned by 90 degrees)" if abs(math.log((w / ah) / (h / aw))) <= rounding else ""
        return f"one has {w} x {h} pixels and the other {aw:g} x {ah:g}{turned}"
    return None


def up_problem(poses: Sequence[np.ndarray]) -> str | None:
    """Whether Z is not up in the world of camera-to-world poses (4, 4) with OpenCV axes: how they are held tells.

    A camera is held level: its right axis (held upright, its down axis) is perpendicular to the vertical, whatever it
    looks at. Two directions are perpendicular to that of a camera that never turns: then only cameras that all look
    along Z are refused.
    """
    turns = np.array([pose[:3, :3] for pose in poses])
    if np.median(np.abs(turns[:, 2, 2])) > math.cos(math.radians(20)):
        return "most cameras look straight up or down: is Z up?"
    spread = {
        axis: np.linalg.eigh(np.einsum("ni,nj->ij", turns[:, :, axis], turns[:, :, axis]) / len(turns))
        for axis in (0, 1)
    }
    axis = min(spread, key=lambda k: float(spread[k][0][0]))
    values, vectors = spread[axis]
    if values[0] > 0.05 or values[1] < 0.15:  # not held level, or hardly turned
        return None
    off = math.degrees(math.acos(min(1.0, abs(float(vectors[2, 0])))))
    if off > 30:
        return f"the cameras are held level about an axis that is {off:.0f} degrees from Z: is Z up?"
    if axis == 0 and float(np.mean(turns[:, 2, 1])) > 0.3:
        return "the images are upside down: does Z point down?"
    return None


def outline_of(points: Any) -> np.ndarray:
    """A room's outline (K, 2) in counter-clockwise order; a clockwise one is turned round.

    Raises:
        ValueError: fewer than three points, NaN, or no area.
    """
    polygon = np.asarray(points, dtype=np.float64)
    if polygon.ndim != 2 or polygon.shape[1] != 2 or len(polygon) < 3 or not np.isfinite(polygon).all():
        raise ValueError(f"outline of shape {polygon.shape} or with NaN; expected three or more points [x, y]")
    x, y = polygon.T
    area = float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
    if abs(area) < 1e-6:
        raise ValueError("outline without area")
    return polygon if area > 0 else polygon[::-1].copy()


# ---------------------------------------------------------------------------------------------------------------------
# The convention of poses


@dataclass(frozen=True)
class Convention:
    """How a data set writes its poses. Boxes have Z up and metres.

    Attributes:
        pose: what the 4 x 4 matrix maps.
        axes: "opencv" = x right, y down, z forward; "opengl" = x right, y up, z backward.
        up: axis of the poses' world that points up.
        unit: metres of one unit of translation.
    """

    pose: Literal["camera_to_world", "world_to_camera"] = "camera_to_world"
    axes: Literal["opencv", "opengl"] = "opencv"
    up: Literal["z", "y", "-y"] = "z"
    unit: float = 1.0

    def read(self, stored: np.ndarray) -> np.ndarray:
        """A stored pose (4, 4) as camera-to-world: OpenCV axes, Z up, metres."""
        matrix: np.ndarray = np.array(stored, dtype=np.float64)
        matrix[:3, 3] *= self.unit
        if self.pose == "world_to_camera":
            matrix = np.linalg.inv(matrix)
        if self.axes == "opengl":
            matrix = matrix @ np.diag([1.0, -1.0, -1.0, 1.0])
        return TO_Z_UP[self.up] @ matrix

    def __str__(self) -> str:
        return f"{self.pose}, {self.axes} axes, {self.up} up, {self.unit:g} m a unit"


TO_Z_UP = {
    "z": np.eye(4),
    "y": np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]),
    "-y": np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]]),
}
CONVENTIONS = tuple(
    Convention(pose, axes, up, unit)  # type: ignore[arg-type]
    for unit, pose, axes, up in itertools.product(
        (1.0, 0.01, 0.001), ("camera_to_world", "world_to_camera"), ("opencv", "opengl"), ("z", "y", "-y")
    )
)


def inside_box(points: np.ndarray, box: Sequence[float], margin: float = MARGIN) -> np.ndarray:
    """Whether world points (N, 3) lie in a box (9,), enlarged by `margin` metres and by 5 % on every side."""
    b = np.asarray(box, dtype=np.float64)
    local = np.abs((points - b[:3]) @ rotations(b[None, 6:9])[0])
    return (local <= b[3:6] / 2 * (1 + MARGIN) + margin).all(-1)


def share_in_boxes(points: Mapping[int, np.ndarray], boxes: Mapping[int, Sequence[float]]) -> float:
    """Mean over the objects of the share of their world points (N, 3) that lies in their own box."""
    shares = [inside_box(cloud, boxes[i]).mean() for i, cloud in points.items() if i in boxes and len(cloud)]
    return float(np.mean(shares)) if shares else 0.0
