"""Whether the depth of a scan without masks lies in its boxes, and which other reading of its files would put it there.

A ray of a right pose that enters the box of an object ends in the box, on the object, unless something hides the object
or the ray misses it. With a wrong pose, axis, unit or depth map rays end anywhere.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fastvst.scenes.adapters.box_pixels import NEAR, Boxes, boxes_of
from fastvst.scenes.adapters.checks import MARGIN, TO_Z_UP, Problems
from fastvst.scenes.scene import SceneObject
from fastvst.spatial.camera import Camera

FRAMES = 8  # frames that are looked at
RAYS = 2000  # of a frame, about
ENOUGH = 30  # rays that must end in a box or behind it before it counts
MANY = 100  # such rays before one box is judged alone
SURE = 0.6  # a score that right files reach: in rooms with 30 % of the depth missing it is 0.67 to 0.91
LEAST = 0.5  # a lower score is refused; other axes, inverse poses, other units give 0 to 0.5
BETTER = 0.15  # by which another reading must fit better before the files are refused for it
HALF = 0.5  # share of the boxes below which other readings are tried: perhaps the cameras look elsewhere
EMPTY = 0.02  # share of the rays into a box that end in it, below which nothing is there

QUARTER = np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # of the camera, anticlockwise
OTHER_AXES = np.diag([1.0, -1.0, -1.0, 1.0])  # OpenGL to OpenCV and back


@dataclass(frozen=True, eq=False)
class Rays:
    """Some rays of a frame: `directions` (N, 3) at depth 1 in the camera's frame, the measured `depth` (N,) along them,
    and the `pose` of the camera, camera to world (4, 4)."""

    directions: np.ndarray
    depth: np.ndarray
    pose: np.ndarray


def rays_of(camera: Camera, depth: np.ndarray, quarters: int = 0) -> Rays:
    """About RAYS rays of a frame with a measured depth, spread evenly, in the frame of the camera as its files have it.

    quarters: turns of 90 degrees anticlockwise by which the frame was brought upright.
    """
    step = max(1, math.isqrt(depth.size // RAYS))
    rows, columns = np.nonzero(depth[step // 2 :: step, step // 2 :: step] > NEAR)
    rows = rows * step + step // 2
    columns = columns * step + step // 2
    x = (columns + 0.5 - camera.cx) / camera.fx
    y = (rows + 0.5 - camera.cy) / camera.fy
    pose = np.eye(4)
    pose[:3, :3] = camera.rotation.T
    pose[:3, 3] = camera.position
    turn = np.linalg.matrix_power(QUARTER, quarters)
    pose[:3, :3] = pose[:3, :3] @ turn
    return Rays(np.stack([x, y, np.ones(len(x))], 1) @ turn, depth[rows, columns].astype(np.float64), pose)


def ends(boxes: Boxes, rays: Sequence[Rays]) -> np.ndarray:
    """Of the rays into each box how many end in it, behind it, before it: (boxes, 3)."""
    found = np.zeros((len(boxes.ids), 3))
    for some in rays:
        start = np.einsum("bji,bj->bi", boxes.axes, some.pose[:3, 3] - boxes.centres)  # (boxes, 3), in the box's axes
        turn = np.einsum("bji,jk->bik", boxes.axes, some.pose[:3, :3])
        along = some.directions @ turn.transpose(0, 2, 1)  # (boxes, rays, 3)
        along = np.where(np.abs(along) < 1e-9, 1e-9, along)
        one = (-boxes.half[:, None] - start[:, None]) / along
        two = (boxes.half[:, None] - start[:, None]) / along
        enter = np.minimum(one, two).max(-1)
        leave = np.maximum(one, two).min(-1)
        into = (enter < leave) & (leave > NEAR)
        margin = MARGIN + 0.01 * some.depth
        before = into & (some.depth < enter - margin)
        behind = into & (some.depth > leave + margin)
        found += np.stack([(into & ~before & ~behind).sum(1), behind.sum(1), before.sum(1)], 1)
    return found


def score(counts: np.ndarray) -> tuple[float, float]:
    """How well depth and boxes fit, from 0 to 1, by the counts of `ends`; and the share of the boxes that rays reach.

    The fit is the product of three shares: of the rays that end in a box or behind it, those that end in it (mean over
    the boxes); of all rays into these boxes, those that do not end before it; of the boxes that rays would enter, those
    that some reach.
    """
    judged = counts[:, 0] + counts[:, 1] >= ENOUGH
    if not judged.any():
        return 0.0, 0.0
    inside = counts[judged, 0] / counts[judged, :2].sum(1)
    reach = counts[judged, :2].sum() / counts[judged].sum()
    fit = inside.mean() * reach * judged.sum() / (counts.sum(1) >= ENOUGH).sum()
    return float(fit), float(judged.mean())


def check_fit(
    scene: str, objects: Sequence[SceneObject], frames: Sequence[tuple[Camera, np.ndarray, int]], problems: Problems
) -> tuple[SceneObject, ...]:
    """The objects, with `known` = False where rays pass through a box as if nothing were there.

    Args:
        frames: cameras, depth maps (H, W) in metres, and by how many quarters they were turned, see `rays_of`.

    Raises:
        ValueError: depth and boxes do not belong together; says which other reading would fit, or that none does.
    """
    boxes = boxes_of(tuple(objects))
    if not len(boxes.ids):
        return tuple(objects)
    rays = [rays_of(*frame) for frame in frames[:: max(1, len(frames) // FRAMES)]]
    counts = ends(boxes, rays)
    own, met = score(counts)
    if own < SURE or met < HALF:
        tried = [(*score(ends(*other)), text) for other, text in _readings(boxes, rays[::2])]
        found, more, text = max(tried, key=lambda t: t[0] * t[1])
        told = f"{scene}: measured depth fits {met:.0%} of the boxes to {own:.0%}"
        if found >= SURE and found * more >= own * met + BETTER:
            raise ValueError(f"{told}; it would fit {more:.0%} of them to {found:.0%} with {text}")
        if own < LEAST:
            raise ValueError(
                f"{told}; expected {LEAST:.0%} or more. {len(tried)} other poses, axes, units and sides were tried; "
                f"the best ({text}) gives {found:.0%}"
            )
    empty = (counts[:, :2].sum(1) >= MANY) & (counts[:, 0] < EMPTY * counts[:, :2].sum(1))
    unseen = dict(zip(boxes.ids[empty].tolist(), counts[empty], strict=True))
    checked = []
    for item in objects:
        if item.id in unseen:
            inside, behind, _ = unseen[item.id]
            text = f"{scene}: object {item.id} ({item.name}): {inside:.0f} of {inside + behind:.0f} rays into its box"
            problems.add(ValueError(f"{text} end there; no question is about it"))
            item = dataclasses.replace(item, known=False)
        checked.append(item)
    return tuple(checked)


def _readings(boxes: Boxes, rays: Sequence[Rays]) -> Iterator[tuple[tuple[Boxes, list[Rays]], str]]:
    """Other readings of the same files, in words."""
    for inverse, before, after, up, unit in itertools.product(
        (False, True), (False, True), (False, True), TO_Z_UP, (1.0, 0.01, 0.001)
    ):
        if before and not inverse:
            continue
        words = [
            "the inverse poses (world to camera for camera to world, or back)" if inverse else "",
            "the other axes of the camera (OpenGL for OpenCV, or back)" if before != after else "",
            f"{up.upper()} up in the world of the poses" if up != "z" else "",
            f"{unit:g} m for a unit of the poses" if unit != 1 else "",
        ]
        changed = [dataclasses.replace(r, pose=_pose(r.pose, inverse, before, after, up, unit)) for r in rays]
        if any(words):
            yield (boxes, changed), ", ".join(word for word in words if word)
    for factor in (10.0, 0.1, 0.2, 1000.0, 0.001):
        changed = [dataclasses.replace(r, depth=r.depth * factor) for r in rays]
        yield (boxes, changed), f"depth multiplied by {factor:g}"
    for text, signs in (("mirrored", (-1, 1, 1)), ("upside down", (1, -1, 1)), ("turned by 180 degrees", (-1, -1, 1))):
        changed = [dataclasses.replace(r, directions=r.directions * signs) for r in rays]
        yield (boxes, changed), f"depth maps {text}"
    for unit in (0.01, 0.001):
        scaled = dataclasses.replace(boxes, centres=boxes.centres * unit, half=boxes.half * unit)
        yield (scaled, list(rays)), f"{unit:g} m for a unit of the boxes"
    mirror = np.diag([-1.0, 1.0, 1.0])
    mirrored = dataclasses.replace(boxes, centres=boxes.centres @ mirror, axes=mirror @ boxes.axes)
    yield (mirrored, list(rays)), "boxes mirrored in X (a left-handed world)"


def _pose(pose: np.ndarray, inverse: bool, before: bool, after: bool, up: str, unit: float) -> np.ndarray:
    found = np.array(pose)
    found[:3, 3] *= unit
    if before:
        found = found @ OTHER_AXES
    if inverse:
        found = np.linalg.inv(found)
    if after:
        found = found @ OTHER_AXES
    return TO_Z_UP[up] @ found
