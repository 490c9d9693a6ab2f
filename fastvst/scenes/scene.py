"""The annotation schema that every task reads: objects with oriented boxes, the outline of the room, posed views.

The renderer of rooms and the adapters for scans and Omni3D JSON all fill these classes. Depth and instance ids are
optional. A single image without a world has the identity pose (world = camera frame).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from PIL import Image

from fastvst.spatial.boxes import to_camera_frame
from fastvst.spatial.camera import Camera

TYPICAL = 0.05  # of the median depth of an object's pixels by which the dot's may differ: less than gaps in depth
SOME = 2000  # pixels from which the typical depth of a scanned object is taken
FINE = 64  # rows or columns of a scanned object's mask above which every second one, third one, ... finds its middle

# How the second view of a pair was chosen.
PAIR_KINDS = {
    "motion": "the camera moved or turned a little",
    "overlap": "a second still of what the first shows",
    "walk": "two frames of a rendered walk",
    "wide": "two frames of a scan",
    "turn": "every turn of the viewing direction is equally frequent",
    "place": "every direction from the first camera to the second is equally frequent",
}


@dataclass(frozen=True)
class SceneObject:
    """One annotated object. `id` > 0 is unique in the scene; id 0 means walls, floor and everything not annotated.

    `box`: nine numbers in the world frame, metres and degrees (see boxes.py). In the local frame of the box X is the
    width, Y points down (its size is the height) and Z goes from front to back. An object that faces a level camera
    has zero angles in the frame of that camera.

    `known` is False if the data set says to ignore the object, or if its box is unusable (`box` may then hold NaN).
    """

    id: int
    name: str
    box: tuple[float, ...]
    known: bool = True

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

    `visibility` in [0, 1]: share of the object's surface points that project to a pixel of the object; occlusion and
    truncation both reduce it. `pixels`: number of visible pixels. `box_2d`: x1, y1, x2, y2 of the visible pixels.
    `point`: pixel coordinates (u, v) well inside the visible part, where a dot can be drawn. `depth`: planar depth at
    `point`, metres.

    `span`: where the depth at `point` was not measured, the least and the greatest depth that the object can have
    there, metres; `depth` is then that of its box's centre. None if the depth was measured.

    `typical`: median depth of its visible pixels in a scan, metres. None if `depth` is known as well as that: rendered
    rooms and single images.
    """

    object_id: int
    visibility: float
    pixels: int
    box_2d: tuple[float, float, float, float]
    point: tuple[float, float]
    depth: float
    span: tuple[float, float] | None = None
    typical: float | None = None

    @property
    def nearest(self) -> float:
        """The least depth that the object can have at `point`, metres."""
        return self.depth if self.span is None else self.span[0]

    @property
    def farthest(self) -> float:
        """The greatest depth that the object can have at `point`, metres."""
        return self.depth if self.span is None else self.span[1]


@dataclass(frozen=True, eq=False)
class View:
    """One posed image: its pixels, or a function that returns them; `sightings` of its objects; `depth` (H, W) float32,
    planar, metres, 0 or inf where unknown, or None; `ids` (H, W) integer object ids, or None."""

    camera: Camera
    pixels: np.ndarray | Callable[[], np.ndarray]
    sightings: tuple[Sighting, ...]
    depth: np.ndarray | None = None
    ids: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image, pixels."""
        return self.camera.width, self.camera.height

    @property
    def image(self) -> np.ndarray:
        """The image (H, W, 3) uint8."""
        return self.pixels if isinstance(self.pixels, np.ndarray) else self.pixels()

    @cached_property
    def photograph(self) -> Image.Image:
        """The image for questions that draw nothing on it: one object, so that it is encoded once."""
        return Image.fromarray(np.ascontiguousarray(self.image))


@dataclass(frozen=True, eq=False)
class Scene:
    """An annotated place. `name` is unique in its data set.

    `polygon`: outline on the floor (K, 2), counter-clockwise, metres, or None. `pairs`: views to compare, as (index of
    the first, index of the second, kind); see PAIR_KINDS. `walk`: indices of the frames of a video in order, `fps`
    frames a second.

    Questions about directions, routes and videos need a world with Z up. A single image with the identity pose has
    neither `pairs` nor `walk` and therefore gets none of them. `up` is the unit vector that points up in the world,
    or None if nothing tells it: then no sentence says that one thing stands on another.

    `objects` are known, `ignored` are not. The images may show both. No question is about an ignored object, but it
    counts wherever a question depends on what is there: a name must be unique, a list complete, a number right.
    """

    name: str
    objects: tuple[SceneObject, ...]
    views: tuple[View, ...]
    polygon: np.ndarray | None = None
    height: float | None = None
    pairs: tuple[tuple[int, int, str], ...] = ()
    walk: tuple[int, ...] = ()
    fps: float = 2.0
    up: tuple[float, float, float] | None = (0.0, 0.0, 1.0)
    ignored: tuple[SceneObject, ...] = ()
    metadata: dict = field(default_factory=dict)

    @property
    def everything(self) -> tuple[SceneObject, ...]:
        """All objects, ignored ones included."""
        return (*self.objects, *self.ignored)

    def object(self, object_id: int) -> SceneObject:
        """The object with this id.

        Raises:
            KeyError: no such object; the message names the scene.
        """
        if object_id not in self._by_id:
            raise KeyError(f"scene {self.name!r} has no object with id {object_id}")
        return self._by_id[object_id]

    @cached_property
    def _by_id(self) -> dict[int, SceneObject]:
        return {item.id: item for item in reversed(self.everything)}

    def stills(self) -> list[int]:
        """Indices of the views for single-image questions: neither second in a pair nor part of the video."""
        seconds = {second for _, second, _ in self.pairs} | set(self.walk)
        return [k for k in range(len(self.views)) if k not in seconds]

    def boxes_in_view(self, view: View, object_ids: list[int]) -> np.ndarray:
        """Boxes (N, 9) of these objects in the camera frame of `view`, metres and degrees."""
        return to_camera_frame([self.object(i).box for i in object_ids], view.camera)


def observe(
    camera: Camera,
    depth: np.ndarray,
    ids: np.ndarray,
    surface: dict[int, np.ndarray],
    measured: np.ndarray | None = None,
    pixels: dict[int, np.ndarray] | None = None,
) -> tuple[Sighting, ...]:
    """Sightings of all objects in a depth map (H, W) and an id map (H, W).

    Args:
        surface: object id -> world points (S, 3) spread over the surface. Other objects are left out.
        measured: mask (H, W) of the pixels whose depth can be trusted; None trusts all. An object without such a pixel
            gets visibility 0 and an unlimited `span`: no question marks it.
        pixels: `pixels_by_id(ids)`, where the caller has it.

    `Sighting.point` is the trusted pixel deepest inside the object's mask (erosion by a cross), so it is never on the
    rim of a mask that has an inside.
    """
    sightings = []
    height, width = ids.shape
    for object_id, flat in (pixels_by_id(ids) if pixels is None else pixels).items():
        if object_id not in surface:
            continue
        local = surface[object_id] @ camera.rotation.T + camera.translation
        z = np.maximum(local[:, 2], 1e-6)
        u = np.floor(camera.fx * local[:, 0] / z + camera.cx)
        v = np.floor(camera.fy * local[:, 1] / z + camera.cy)
        inside = (local[:, 2] > 0.01) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
        seen = (ids[v[inside].astype(int), u[inside].astype(int)] == object_id).sum()
        top = int(flat[0]) // width
        bottom = int(flat[-1]) // width + 1
        strip = ids[top:bottom] == object_id
        columns = np.flatnonzero(strip.any(0))
        left = int(columns[0])
        right = int(columns[-1]) + 1
        window = (slice(top, bottom), slice(left, right))
        mask = strip[:, left:right]
        trusted = None if measured is None else measured[window] & mask
        blind = trusted is not None and not trusted.any()
        typical = None
        if trusted is not None and not blind:  # the dot has a depth that is typical of the visible part
            values = depth[window][trusted]
            typical = float(np.median(values[:: max(1, len(values) // SOME)]))
            near = trusted & (np.abs(depth[window] - typical) <= TYPICAL * typical)
            trusted = near if near.any() else trusted
        row, column = _deepest(
            mask, None if blind else trusted, 1 if measured is None else 1 + math.isqrt(mask.size) // FINE
        )
        row = row + top
        column = column + left
        sightings.append(
            Sighting(
                object_id=object_id,
                visibility=0.0 if blind else float(seen) / len(local),
                pixels=len(flat),
                box_2d=(float(left), float(top), float(right), float(bottom)),
                point=(column + 0.5, row + 0.5),
                depth=float(depth[row, column]),
                span=(0.0, math.inf) if blind else None,
                typical=typical,
            )
        )
    return tuple(sightings)


def clearly_seen(view: View) -> set[int]:
    """Ids of the objects of which a view shows 60 pixels and 30 % of the surface."""
    return {s.object_id for s in view.sightings if s.visibility >= 0.3 and s.pixels >= 60}


def pixels_by_id(ids: np.ndarray) -> dict[int, np.ndarray]:
    """Object id > 0 -> flat indices of its pixels in an id map (H, W), ascending in both."""
    flat = ids.ravel()
    labelled = np.flatnonzero(flat > 0)
    values = flat[labelled]
    if len(values) == 0:
        return {}
    # numpy sorts 8-bit and 16-bit integers by radix, in a tenth of the time
    short = np.uint8 if values.max() < 256 else np.uint16 if values.max() < 65536 else values.dtype
    order = np.argsort(values.astype(short), kind="stable")
    found = labelled[order]
    cuts = np.flatnonzero(np.diff(values[order])) + 1
    return {int(flat[part[0]]): part for part in np.split(found, cuts)}


def wide_pairs(
    views: list[View], frames: tuple[int, ...], rng: np.random.Generator, count: int, kind: str = "wide"
) -> list[tuple[int, int, str]]:
    """Up to `count` pairs (index, index, `kind`) of frames whose viewing directions differ by 35-100 degrees and that
    both show the same two or more objects clearly. No frame is in two pairs."""
    seen = {k: clearly_seen(views[k]) for k in frames}
    found: list[tuple[int, int, str]] = []
    for k in rng.permutation(len(frames) ** 2):
        if len(found) == count:
            break
        a = frames[int(k) // len(frames)]
        b = frames[int(k) % len(frames)]
        cosine = float(views[a].camera.rotation[2] @ views[b].camera.rotation[2])
        if -0.17 < cosine < 0.82 and len(seen[a] & seen[b]) >= 2 and not any(a in p or b in p for p in found):
            found.append((a, b, kind))
    return found


def _deepest(mask: np.ndarray, allowed: np.ndarray | None = None, step: int = 1) -> tuple[int, int]:
    """Row and column of the mask (H, W) that survive the most erosions; of several the one nearest their middle.

    Args:
        allowed: a part of the mask, not empty, from which the pixel is taken; None is the whole mask.
        step: only every so many rows and columns are looked at, unless none of them is allowed.
    """
    if step > 1:
        coarse = mask[::step, ::step]
        some = coarse if allowed is None else allowed[::step, ::step]
        if some.any():
            row, column = _deepest(coarse, some)
            return step * row, step * column
    level = _depth_inside(mask)
    if allowed is not None:
        level = np.where(allowed, level, 0)
    rows, columns = np.nonzero(level == level.max())
    middle = (rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2
    best = int(middle.argmin())
    return int(rows[best]), int(columns[best])


def _depth_inside(mask: np.ndarray) -> np.ndarray:
    """Number of erosions by a cross that each pixel of a mask (H, W) survives, plus one; 0 outside.

    It is the city-block distance to the nearest pixel outside, one axis after the other (Rosenfeld and Pfaltz, 1968).
    """
    far = mask.shape[0] + mask.shape[1]
    level = np.zeros((mask.shape[0] + 2, mask.shape[1] + 2), np.int16 if far < 16_000 else np.int32)
    level[1:-1, 1:-1] = np.where(mask, far, 0)
    for axis in (0, 1):
        step = np.arange(level.shape[axis], dtype=level.dtype)
        step = step[:, None] if axis == 0 else step[None]
        ahead = np.minimum.accumulate(level - step, axis=axis) + step
        back = np.flip(np.minimum.accumulate(np.flip(level + step, axis), axis=axis), axis) - step
        level = np.minimum(ahead, back)
    return level[1:-1, 1:-1]
