"""The annotation schema that every task reads: objects with oriented boxes, room outline, posed views.

Nothing here knows of our renderer. An adapter for RGB-D scans or for Omni3D-style JSON fills the same classes: depth
and instance ids are optional, and a single image without a world uses the identity pose (world = camera frame).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fastvst.spatial.boxes import to_camera_frame
from fastvst.spatial.camera import Camera


@dataclass(frozen=True)
class SceneObject:
    """One annotated thing. `id` > 0 is unique in the scene (0 is walls, floor and whatever has no annotation).

    `box`: nine numbers in the world frame, metres and degrees (see boxes.py). In the local frame of the box X is width,
    Y points down (its size is the height) and Z goes from front to back, so a piece that faces a level camera squarely
    has zero angles in that camera's frame.
    """

    id: int
    name: str
    box: tuple[float, ...]

    @property
    def height(self) -> float:
        return self.box[4]

    @property
    def length(self) -> float:
        """The longer horizontal side, metres."""
        return max(self.box[3], self.box[5])

    @property
    def width(self) -> float:
        """The shorter horizontal side, metres."""
        return min(self.box[3], self.box[5])


@dataclass(frozen=True)
class Sighting:
    """How one object appears in one view.

    `visibility` in [0, 1]: share of the object's surface points that land on a pixel showing the object (occlusion and
    truncation both count). `pixels`: visible pixel count. `box_2d`: x1, y1, x2, y2 of the visible pixels. `point`: a
    pixel (u, v) well inside the visible part, where a dot can be drawn. `depth`: planar depth at `point`, metres.
    """

    object_id: int
    visibility: float
    pixels: int
    box_2d: tuple[float, float, float, float]
    point: tuple[float, float]
    depth: float


@dataclass(frozen=True, eq=False)
class View:
    """One picture: `image` (H, W, 3) uint8; `depth` (H, W) float32 planar metres, 0 or inf where unknown, or None;
    `ids` (H, W) int32 object ids, or None; `sightings` of the objects in it."""

    camera: Camera
    image: np.ndarray
    sightings: tuple[Sighting, ...]
    depth: np.ndarray | None = None
    ids: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Scene:
    """A room: `name` unique in its data set; `polygon` (K, 2) counter-clockwise outline on the floor in metres, or
    None; `pairs`: indices of views worth comparing, as (first, second, kind) with kind "motion", "overlap" or "wide";
    `walk`: indices of the frames of a video in order, taken `fps` times a second.

    Directions, routes and videos need a world with Z up. A single picture with the identity pose has neither `pairs`
    nor `walk`, so it is never asked about these.
    """

    name: str
    objects: tuple[SceneObject, ...]
    views: tuple[View, ...]
    polygon: np.ndarray | None = None
    height: float | None = None
    pairs: tuple[tuple[int, int, str], ...] = ()
    walk: tuple[int, ...] = ()
    fps: float = 2.0
    metadata: dict = field(default_factory=dict)

    def object(self, object_id: int) -> SceneObject:
        """The object with this id; KeyError names the scene."""
        for item in self.objects:
            if item.id == object_id:
                return item
        raise KeyError(f"scene {self.name!r} has no object with id {object_id}")

    def stills(self) -> list[int]:
        """Indices of the views that are neither the second of a pair nor in the video: for single-image questions."""
        seconds = {second for _, second, _ in self.pairs} | set(self.walk)
        return [k for k in range(len(self.views)) if k not in seconds]

    def boxes_in_view(self, view: View, object_ids: list[int]) -> np.ndarray:
        """(N, 9) boxes of these objects in the camera frame of `view`, metres and degrees."""
        return to_camera_frame([self.object(i).box for i in object_ids], view.camera)


def observe(camera: Camera, depth: np.ndarray, ids: np.ndarray, surface: dict[int, np.ndarray]) -> tuple[Sighting, ...]:
    """Sightings from a depth map and an id map.

    `surface`: world points (S, 3) spread over each object's surface, by object id. The dot goes to the visible pixel
    that is deepest inside the object's mask (erosion by a cross, so dots never sit on the rim of anything that has an
    inside).
    """
    sightings = []
    height, width = ids.shape
    for object_id in np.unique(ids):
        if object_id <= 0 or int(object_id) not in surface:
            continue
        mask = ids == object_id
        rows, columns = np.nonzero(mask)
        local = surface[int(object_id)] @ camera.rotation.T + camera.translation
        z = np.maximum(local[:, 2], 1e-6)
        u = np.floor(camera.fx * local[:, 0] / z + camera.cx)
        v = np.floor(camera.fy * local[:, 1] / z + camera.cy)
        inside = (local[:, 2] > 0.01) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
        seen = mask[v[inside].astype(int), u[inside].astype(int)].sum()
        top = rows.min()
        left = columns.min()
        row, column = _deepest(mask[top : rows.max() + 1, left : columns.max() + 1])
        row = row + top
        column = column + left
        sightings.append(
            Sighting(
                object_id=int(object_id),
                visibility=float(seen) / len(local),
                pixels=len(rows),
                box_2d=(float(left), float(top), float(columns.max() + 1), float(rows.max() + 1)),
                point=(column + 0.5, row + 0.5),
                depth=float(depth[row, column]),
            )
        )
    return tuple(sightings)


def wide_pairs(
    views: list[View], frames: tuple[int, ...], rng: np.random.Generator, count: int
) -> list[tuple[int, int, str]]:
    """Up to `count` pairs of frames, each (index, index, "wide"), turned by 35-100 degrees, that share at least two
    well seen things."""
    seen = {k: {s.object_id for s in views[k].sightings if s.visibility >= 0.3 and s.pixels >= 60} for k in frames}
    found: list[tuple[int, int, str]] = []
    for k in rng.permutation(len(frames) ** 2):
        if len(found) == count:
            break
        a = frames[int(k) // len(frames)]
        b = frames[int(k) % len(frames)]
        cosine = float(views[a].camera.rotation[2] @ views[b].camera.rotation[2])
        if -0.17 < cosine < 0.82 and len(seen[a] & seen[b]) >= 2 and not any(a in p or b in p for p in found):
            found.append((a, b, "wide"))
    return found


def _deepest(mask: np.ndarray) -> tuple[int, int]:
    """Row and column inside a mask (H, W) that survives the most erosions; ties go to the pixel nearest the middle."""
    padded = np.pad(mask, 1)
    while True:
        core = padded[1:-1, 1:-1] & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        if not core.any():
            break
        padded = np.pad(core, 1)
    rows, columns = np.nonzero(padded[1:-1, 1:-1])
    middle = (rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2
    best = int(middle.argmin())
    return int(rows[best]), int(columns[best])
