"""Camera placement: hand-held stills as in SUN RGB-D, overlapping second views, small motions, and walks."""

from __future__ import annotations

import math

import numpy as np

from fastvst.scenes.rooms.layout import Prism, Room, inside, prism_of
from fastvst.spatial.camera import Camera, look, place, project

MARGIN = 0.3  # metres, least horizontal distance of a camera from walls and from pieces at its height


def clear(room: Room, position: np.ndarray) -> bool:
    """Whether a camera may be at `position` (3,): inside the room and not in or close to a piece."""
    x, y, z = (float(p) for p in position)
    if not 0.3 < z < room.height - 0.3:
        return False
    spot = Prism(x, y, MARGIN, MARGIN, 0.0, z - 0.5, z + 0.1)
    if not inside(room.polygon, spot.outline()):
        return False
    for item in room.items:
        prism = prism_of(item)
        if prism.high > spot.low and prism.low < spot.high:
            c = math.cos(math.radians(prism.yaw))
            s = math.sin(math.radians(prism.yaw))
            dx = x - prism.x
            dy = y - prism.y
            right = abs(c * dx + s * dy)
            back = abs(-s * dx + c * dy)
            if max(right - prism.half_w, back - prism.half_d) < MARGIN:
                return False
    return True


def still(
    room: Room, rng: np.random.Generator, width: int, height: int, tries: int = 40, keep: int = 8
) -> Camera | None:
    """A hand-held still, or None if no clear position is found.

    Height 1.2 to 1.7 m, pitch -25 to 0 degrees, roll -3 to 3 degrees, focal length 0.75 to 0.94 of the width (480-600
    px at 640). Of up to `keep` clear candidates the one with the most pieces in view.
    """
    low = room.polygon.min(0)
    high = room.polygon.max(0)
    centres = np.array([item.box[:3] for item in room.items])
    focal = float(rng.uniform(0.75, 0.94)) * width
    base = Camera(width, height, focal, focal, width / 2, height / 2, np.eye(3), np.zeros(3))
    best = None
    best_score = -1.0
    found = 0
    for _ in range(tries):
        position = np.array([*rng.uniform(low, high), rng.uniform(1.2, 1.7)])
        target = centres[int(rng.integers(len(centres)))] + rng.normal(0, 0.4, 3)
        yaw = _yaw(target - position)
        pitch = float(rng.uniform(-25, 0))
        roll = float(rng.uniform(-3, 3))
        if not clear(room, position):
            continue
        camera = place(base, position, look(yaw, pitch, roll))
        score = float(_framed(camera, centres).sum()) + float(rng.uniform())
        if score > best_score:
            best = camera
            best_score = score
        found += 1
        if found == keep:
            break
    return best


def nudge(camera: Camera, rng: np.random.Generator, degrees: float) -> np.ndarray:
    """The rotation (3, 3) of the camera, turned by up to `degrees` about each of its own axes."""
    return turned(*rng.uniform(-degrees, degrees, 3)) @ camera.rotation


def turned(pitch: float, yaw: float, roll: float = 0.0) -> np.ndarray:
    """Rotation (3, 3) from the old to the new camera frame; degrees. Positive pitch turns up, positive yaw right."""
    p, y, r = (math.radians(a) for a in (pitch, yaw, roll))
    about_x = np.array([[1, 0, 0], [0, math.cos(p), math.sin(p)], [0, -math.sin(p), math.cos(p)]])
    about_y = np.array([[math.cos(y), 0, -math.sin(y)], [0, 1, 0], [math.sin(y), 0, math.cos(y)]])
    about_z = np.array([[math.cos(r), math.sin(r), 0], [-math.sin(r), math.cos(r), 0], [0, 0, 1]])
    return about_z @ about_x @ about_y


def motion(
    room: Room, camera: Camera, rng: np.random.Generator, rotate: float, two_axes: float, tries: int = 24
) -> Camera | None:
    """A second frame of a moving camera, or None if no clear position is found.

    With probability `rotate` the camera pans by 12-25 or tilts by 10-18 degrees on the spot. Otherwise it shifts by
    0.3-0.8 m along one of its own axes, with probability `two_axes` along two, and turns by less than 1.5 degrees.
    """
    if float(rng.uniform()) < rotate:
        side = 1.0 if rng.uniform() < 0.5 else -1.0
        pan = rng.uniform() < 0.5
        turn = turned(0.0, side * rng.uniform(12, 25)) if pan else turned(side * rng.uniform(10, 18), 0.0)
        return place(camera, camera.position + rng.uniform(-0.01, 0.01, 3), turn @ camera.rotation)
    order = rng.permutation(6)
    for attempt in range(tries):
        k = int(order[attempt % 6])  # tries every direction once before it repeats one
        axis = k // 2
        side = 1.0 if k % 2 else -1.0
        step = rng.uniform(-0.02, 0.02, 3)
        step[axis] = side * rng.uniform(0.3, 0.8)
        if float(rng.uniform()) < two_axes:
            other = (axis + int(rng.integers(1, 3))) % 3
            step[other] = abs(step[axis]) * rng.uniform(0.75, 1.25) * (1.0 if rng.uniform() < 0.5 else -1.0)
        position = camera.position + camera.rotation.T @ step
        if clear(room, position):
            return place(camera, position, nudge(camera, rng, 1.5))
    return None


def second(room: Room, camera: Camera, target: np.ndarray, rng: np.random.Generator, tries: int = 40) -> Camera | None:
    """A still 0.5-1.6 m away from `camera` that looks near the world point `target` (3,), or None."""
    for _ in range(tries):
        angle = rng.uniform(0, 2 * math.pi)
        far = rng.uniform(0.5, 1.6)
        position = np.array(
            [
                camera.position[0] + far * math.cos(angle),
                camera.position[1] + far * math.sin(angle),
                rng.uniform(1.2, 1.7),
            ]
        )
        d = target + rng.normal(0, 0.25, 3) - position
        reach = math.hypot(d[0], d[1])
        if reach < 1.0 or not clear(room, position):
            continue
        pitch = min(0.0, max(-30.0, math.degrees(math.atan2(d[2], reach))))
        return place(camera, position, look(_yaw(d), pitch, float(rng.uniform(-3, 3))))
    return None


def clear_spots(room: Room, rng: np.random.Generator, tries: int = 200) -> np.ndarray:
    """Random clear positions (N, 3) at the height of hand-held stills, N <= `tries`."""
    low = room.polygon.min(0)
    high = room.polygon.max(0)
    spots = np.concatenate([rng.uniform(low, high, (tries, 2)), rng.uniform(1.2, 1.7, (tries, 1))], 1)
    return spots[[clear(room, spot) for spot in spots]]


def around(
    room: Room, rng: np.random.Generator, width: int, height: int, kind: str, angle: float, spots: np.ndarray
) -> tuple[Camera, Camera] | None:
    """Two stills from any two of the clear `spots` (N, 3) that look at the same pieces, or None if none are found.

    The centres of at least two pieces are in both images, 0.9 to 6 m away. The caller chooses `angle` (degrees,
    clockwise from above): two views of the same pieces that are chosen freely mostly differ by less than 75 degrees.

    Args:
        kind: what `angle` is: "turn" from the first viewing direction to the second, or "place", the direction of the
            second camera from the first one, relative to the first viewing direction.
    """
    if len(spots) < 2:
        return None
    centres = np.array([item.box[:3] for item in room.items])
    focal = float(rng.uniform(0.75, 0.94)) * width
    base = Camera(width, height, focal, focal, width / 2, height / 2, np.eye(3), np.zeros(3))
    one, two = rng.integers(len(spots), size=(2, 10000))
    step = spots[two, :2] - spots[one, :2]
    if kind == "turn":
        first = rng.uniform(-180, 180, len(one))
        second_yaw = first - angle
    else:
        first = np.degrees(np.arctan2(-step[:, 0], step[:, 1])) + angle
        second_yaw = rng.uniform(-180, 180, len(one))
    shared = _ahead(spots, centres, one, first) & _ahead(spots, centres, two, second_yaw)
    fits = (np.linalg.norm(step, axis=1) > 0.6) & (shared.sum(1) >= 2)
    for k in np.flatnonzero(fits)[:120]:
        pair = [
            place(base, spots[spot], look(float(yaw), float(rng.uniform(-25, 0)), float(rng.uniform(-3, 3))))
            for spot, yaw in ((one[k], first[k]), (two[k], second_yaw[k]))
        ]
        if (_framed(pair[0], centres) & _framed(pair[1], centres)).sum() >= 2:
            return pair[0], pair[1]
    return None


def _ahead(spots: np.ndarray, centres: np.ndarray, spot: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    """(M, K): whether each of K centres is less than 30 degrees off the viewing direction `yaw` (M,) at spots[spot]."""
    step = centres[None, :, :2] - spots[:, None, :2]
    bearing = np.degrees(np.arctan2(-step[..., 0], step[..., 1]))[spot]
    return np.abs((bearing - yaw[:, None] + 180) % 360 - 180) < 30


def _yaw(direction: np.ndarray) -> float:
    """Degrees counter-clockwise from +Y to a direction (2,) or (3,) on the floor."""
    return math.degrees(math.atan2(-direction[0], direction[1]))


def _framed(camera: Camera, points: np.ndarray) -> np.ndarray:
    """Which of the world points (N, 3) are in the image, 0.9 to 6 m away; walls and pieces hide none."""
    uv, depth = project(camera, points)
    return (depth > 0.9) & (depth < 6) & (uv > 0).all(1) & (uv[:, 0] < camera.width) & (uv[:, 1] < camera.height)


def walk(
    room: Room, rng: np.random.Generator, frames: int, width: int, height: int, tries: int = 60
) -> list[Camera] | None:
    """A hand-held video: a slow walk through clear places during which the camera turns around once.

    At most 0.25 m a frame; height 1.3 to 1.65 m, pitch -18 to -8 degrees. The camera turns by 370-400 degrees in one
    direction, so every wall comes into view. None if the room has no clear place to start from.
    """
    eye = float(rng.uniform(1.3, 1.65))
    stops = _stops(room, rng, eye, tries)
    if not stops:
        return None
    lengths = [float(np.linalg.norm(b - a)) for a, b in zip(stops, stops[1:], strict=False)]
    reach = min(sum(lengths), 0.25 * (frames - 1))
    ends = np.concatenate([[0.0], np.cumsum(lengths)])
    focal = float(rng.uniform(0.72, 0.8)) * width
    base = Camera(width, height, focal, focal, width / 2, height / 2, np.eye(3), np.zeros(3))
    side = 1.0 if rng.uniform() < 0.5 else -1.0
    yaw = float(rng.uniform(-180, 180))
    turn = side * float(rng.uniform(370, 400))
    pitch = float(rng.uniform(-18, -8))
    cameras = []
    for t in np.linspace(0.0, 1.0, frames):
        position = np.array([np.interp(t * reach, ends, [stop[k] for stop in stops]) for k in range(3)])
        shake = rng.uniform(-1.5, 1.5, 3)
        cameras.append(place(base, position, look(yaw + turn * t + shake[0], pitch + shake[1], shake[2])))
    return cameras


def _stops(room: Room, rng: np.random.Generator, eye: float, tries: int) -> list[np.ndarray]:
    """Up to four points (3,) at height `eye`, joined by clear straight legs of 0.4-2 m; empty if nothing is clear.

    The first is the most central of six clear points, because it sees most of the room.
    """
    low = room.polygon.min(0)
    high = room.polygon.max(0)
    starts: list[np.ndarray] = []
    stops: list[np.ndarray] = []
    for _ in range(tries):
        spot = np.array([*rng.uniform(low, high), eye])
        if not clear(room, spot):
            continue
        if len(starts) < 6:
            starts.append(spot)
            stops = [min(starts, key=lambda s: float(np.linalg.norm(s[:2] - (low + high) / 2)))]
            continue
        leg = spot - stops[-1]
        length = float(np.linalg.norm(leg))
        steps = [stops[-1] + leg * t for t in np.linspace(0, 1, max(2, math.ceil(length / 0.1)))]
        if 0.4 <= length <= 2.0 and all(clear(room, step) for step in steps):
            stops.append(spot)
        if len(stops) == 4:
            break
    return stops
