"""Which pixels of a depth map lie in the boxes of a scan, for data sets without masks.

All boxes of a scan are projected at once, and a box is compared with the pixels of those blocks of the depth map only
that reach into its range of depth: this is most of the time that a frame without masks takes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastvst.scenes.adapters.checks import MARGIN
from fastvst.scenes.scene import SceneObject, Sighting
from fastvst.spatial.boxes import corners, rotations
from fastvst.spatial.camera import Camera

NEAR = 0.05  # metres; a smaller depth is a hole
BLOCK = 16  # pixels; side of the blocks of which the least and the greatest depth are known


@dataclass(frozen=True, eq=False)
class Boxes:
    """The known boxes of a scan, the largest first: `ids` (N,), `centres` and `half` sizes (N, 3) in metres, `axes`
    (N, 3, 3) as columns, `corners` (N, 8, 3)."""

    ids: np.ndarray
    centres: np.ndarray
    half: np.ndarray
    axes: np.ndarray
    corners: np.ndarray

    def places(self, camera: Camera) -> list[tuple[int, slice, slice, float, float]]:
        """Where boxes may show in the image: index, rows, columns, nearest and farthest depth in metres.

        A box behind the camera or outside the image is left out. A box with a corner behind the camera may reach any
        pixel.
        """
        local = self.corners @ camera.rotation.T + camera.translation
        ahead = local[..., 2]
        front = (ahead > NEAR).all(1)
        safe = np.maximum(ahead, NEAR)
        size = np.array([camera.width, camera.height])
        low = np.zeros((len(self.ids), 2), int)
        high = np.broadcast_to(size, low.shape).copy()
        for axis, (focal, middle) in enumerate(((camera.fx, camera.cx), (camera.fy, camera.cy))):
            along = np.clip(focal * local[..., axis] / safe + middle, -1, size[axis] + 1)
            low[front, axis] = np.floor(along.min(1)).clip(0, size[axis])[front]
            high[front, axis] = np.ceil(along.max(1)).clip(0, size[axis])[front]
        near = np.maximum(ahead.min(1), NEAR)
        far = ahead.max(1)
        shown = (far > NEAR) & (low < high).all(1)
        return [
            (int(k), slice(int(low[k, 1]), int(high[k, 1])), slice(int(low[k, 0]), int(high[k, 0])), *spans)
            for k, spans in zip(np.flatnonzero(shown), np.stack([near, far], 1)[shown].tolist(), strict=True)
        ]

    def own_space(self, k: int, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the visible surface of box `k` itself lies in it: lowest and highest local coordinates (3,), metres.

        It lies at the faces that the camera at `position` (3,) looks at, with 1 cm to spare. At the other faces are
        the wall behind the object and the floor under it: 2 cm there are left out, 4 cm at the bottom, but at most a
        fifth of the box.
        """
        half = self.half[k]
        place = (position - self.centres[k]) @ self.axes[k]
        cut = np.minimum(0.02, 0.4 * half)
        low = np.where(place < -half, -half - 0.01, -half + cut)
        high = np.where(place > half, half + 0.01, half - cut)
        if place[1] <= half[1]:  # local Y points down
            high[1] = half[1] - min(0.04, 0.4 * half[1])
        return low, high


@functools.lru_cache(8)
def boxes_of(objects: tuple[SceneObject, ...]) -> Boxes:
    """The known boxes of these objects, computed once for all frames of a scan."""
    known = sorted((o for o in objects if o.known), key=lambda o: -float(np.prod(o.box[3:6])))
    table = np.array([o.box for o in known], dtype=np.float64).reshape(-1, 9)
    return Boxes(
        np.array([o.id for o in known], dtype=np.int32),
        table[:, :3],
        table[:, 3:6] / 2,
        rotations(table[:, 6:9]).reshape(-1, 3, 3),
        corners(table).reshape(-1, 8, 3),
    )


def ids_from_boxes(camera: Camera, depth: np.ndarray, objects: Sequence[SceneObject]) -> np.ndarray:
    """Object ids (H, W) for data sets without masks: the smallest known box in which a pixel's surface lies.

    The floor and the wall at its faces are not the object: see `Boxes.own_space`. Computed in float32.
    """
    ids = np.zeros(depth.shape, np.int32)
    boxes = boxes_of(tuple(objects))
    places = boxes.places(camera)
    if not places:
        return ids
    lowest, highest = _blocks(depth)
    x = ((np.arange(camera.width) + (0.5 - camera.cx)) / camera.fx).astype(np.float32)
    y = ((np.arange(camera.height) + (0.5 - camera.cy)) / camera.fy).astype(np.float32)
    position = camera.position
    for k, rows, columns, near, far in places:
        part = (
            slice(rows.start // BLOCK, -(-rows.stop // BLOCK)),
            slice(columns.start // BLOCK, -(-columns.stop // BLOCK)),
        )
        reaches = (lowest[part] < far) & (highest[part] > near)
        if not reaches.any():
            continue
        rows = _narrowed(rows, np.any(reaches, axis=1))
        columns = _narrowed(columns, np.any(reaches, axis=0))
        window = depth[rows, columns]
        low, high = boxes.own_space(k, position)
        inside = in_space(camera, boxes.centres[k], boxes.axes[k], low, high, x[columns], y[rows, None], window)
        inside &= window > NEAR
        ids[rows, columns][inside] = boxes.ids[k]
    return ids


def _blocks(depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest measured depth of blocks of BLOCK x BLOCK pixels; inf and 0 where there is none."""
    measured = np.where(depth > NEAR, depth, np.float32(np.inf))
    return _every(np.minimum, measured), _every(np.maximum, depth)


def _every(combine: np.ufunc, values: np.ndarray) -> np.ndarray:
    """`combine` over blocks; twice as fast as its `reduceat`."""
    for axis in (0, 1):
        turned = values if axis == 0 else values.T
        found = turned[::BLOCK].copy()
        for k in range(1, min(BLOCK, len(turned))):
            part = turned[k::BLOCK]
            combine(found[: len(part)], part, out=found[: len(part)])
        values = found if axis == 0 else found.T
    return values


def _narrowed(span: slice, blocks: np.ndarray) -> slice:
    """The part of a span of pixels from the first to the last of its blocks that is True."""
    first = span.start // BLOCK
    found = np.flatnonzero(blocks)
    return slice(max(span.start, int(first + found[0]) * BLOCK), min(span.stop, int(first + found[-1] + 1) * BLOCK))


def in_space(
    camera: Camera,
    centre: np.ndarray,
    axes: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    depth: np.ndarray,
) -> np.ndarray:
    """Whether surface points have local coordinates of a box between two (3,).

    Args:
        centre: (3,) and axes: (3, 3) as columns, of the box.
        x, y: float32 coordinates at depth 1, and depth: float32; their shapes are broadcast to that of the result.
    """
    turn = camera.rotation @ axes
    offset = (camera.rotation @ centre + camera.translation) @ turn
    inside = None
    for axis in range(3):
        a, b, c = turn[:, axis].astype(np.float32)
        along = (a * x + (b * y + c)) * depth
        kept = along >= np.float32(low[axis] + offset[axis])
        kept &= along <= np.float32(high[axis] + offset[axis])
        inside = kept if inside is None else inside & kept
    assert inside is not None
    return inside


def hints(camera: Camera, depth: np.ndarray, objects: Sequence[SceneObject], sure: set[int]) -> list[Sighting]:
    """Sightings without visibility of objects that a frame may show although hardly a pixel is known to be theirs.

    A ray into the box of such an object is not blocked before it, or its depth is missing. No question is about them,
    but no answer says that they are not to be seen.

    Args:
        sure: ids that are left out.
    """
    found = []
    boxes = boxes_of(tuple(objects))
    for k, rows, columns, near, _ in boxes.places(camera):
        if int(boxes.ids[k]) in sure:
            continue
        window = depth[rows, columns]
        free = int(np.count_nonzero(window >= max(near - MARGIN, NEAR)) + np.count_nonzero(window <= NEAR))
        if free:
            box = (float(columns.start), float(rows.start), float(columns.stop), float(rows.stop))
            centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
            found.append(Sighting(int(boxes.ids[k]), 0.0, free, box, centre, 0.0, (0.0, math.inf)))
    return found
