"""From a room seed to an annotated scene: furnish, place cameras, render, find what is visible."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastvst.scenes.rooms.cameras import around, clear_spots, motion, second, still, walk
from fastvst.scenes.rooms.geometry import Geometry, build_geometry
from fastvst.scenes.rooms.layout import Room
from fastvst.scenes.rooms.recipes import furnish
from fastvst.scenes.rooms.render_base import Renderer
from fastvst.scenes.scene import Scene, SceneObject, View, clearly_seen, observe, wide_pairs
from fastvst.spatial.camera import Camera, unproject


@dataclass(frozen=True)
class ShotConfig:
    """Still images of a room. Every still gets a second frame from a moved camera (a "motion" pair)."""

    width: int = 320  # pixels
    height: int = 240
    views: int = 2  # stills per room, besides those of `around`
    rotate: float = 0.25  # share of motion pairs in which the camera only rotates
    two_axes: float = 0.25  # share of shifts, among the others, that go along two axes
    overlap: float = 0.5  # probability that a still also gets a wide-baseline second view (an "overlap" pair)
    around: float = 0.5  # most pairs (on average) of stills from any two sides of the room ("turn", "place")


@dataclass(frozen=True)
class WalkConfig:
    """A video of a room."""

    frames: int = 20
    fps: float = 2.0  # VST samples videos at 2 frames a second
    pairs: int = 3  # pairs of frames to offer as wide-baseline pairs, see `scene.wide_pairs`


def snapshot(renderer: Renderer, geometry: Geometry, camera: Camera) -> View:
    """Render and annotate one view of the loaded geometry."""
    rgb, depth, ids = renderer.draw(camera)
    return View(camera, rgb, observe(camera, depth, ids, geometry.surface), depth, ids)


def presentable(view: View) -> bool:
    """Whether a still is good for questions: three visible objects, nothing close to the lens, none that fills it."""
    if view.depth is None or view.ids is None:
        return False
    near = float((view.depth < 0.6).mean())
    largest = max((s.pixels for s in view.sightings), default=0) / view.ids.size
    known = sum(s.visibility >= 0.3 and s.pixels >= 60 for s in view.sightings)
    return near < 0.15 and largest < 0.6 and float(np.median(view.depth)) > 1.2 and known >= 3


def shoot(seed: int, renderer: Renderer, config: ShotConfig, video: WalkConfig | None = None) -> Scene:
    """The annotated scene of a room seed: always the same for one renderer backend and configuration.

    With `video` the views also hold the frames of a walk, after the stills. The stills do not depend on it.
    The views of `config.around` follow those of `config.views`, which do not depend on them.
    """
    room = furnish(seed)
    geometry = build_geometry(room)
    renderer.load(geometry)
    views, pairs = _stills(room, renderer, geometry, np.random.default_rng([seed, 3]), config)
    _add_around(room, renderer, geometry, np.random.default_rng([seed, 8]), config, views, pairs)
    frames: tuple[int, ...] = ()
    if video is not None:
        rng = np.random.default_rng([seed, 7])
        path = walk(room, rng, video.frames, config.width, config.height)
        first = len(views)
        views += [snapshot(renderer, geometry, camera) for camera in path or []]
        frames = tuple(range(first, len(views)))
        pairs += wide_pairs(views, frames, rng, video.pairs, "walk")
    objects = tuple(SceneObject(k + 1, item.piece.name, item.box) for k, item in enumerate(room.items))
    return Scene(
        name=f"room-{seed}",
        objects=objects,
        views=tuple(views),
        polygon=room.polygon,
        height=room.height,
        pairs=tuple(pairs),
        walk=frames,
        fps=video.fps if video is not None else 2.0,
        metadata={"room_seed": seed, "kind": room.kind, "backend": renderer.name},
    )


def _stills(
    room: Room, renderer: Renderer, geometry: Geometry, rng: np.random.Generator, config: ShotConfig
) -> tuple[list[View], list[tuple[int, int, str]]]:
    """Up to `config.views` stills, each followed by its second views; and the pairs among these views."""
    views: list[View] = []
    pairs: list[tuple[int, int, str]] = []
    taken = 0
    for _ in range(config.views * 3):
        if taken == config.views:
            break
        camera = still(room, rng, config.width, config.height)
        if camera is None:
            break
        view = snapshot(renderer, geometry, camera)
        if not presentable(view):
            continue
        first = len(views)
        taken += 1
        views.append(view)
        moved = motion(room, camera, rng, config.rotate, config.two_axes)
        if moved is not None:
            pairs.append((first, len(views), "motion"))
            views.append(snapshot(renderer, geometry, moved))
        if float(rng.uniform()) < config.overlap:
            other = second(room, camera, _target(view), rng)
            if other is not None:
                pairs.append((first, len(views), "overlap"))
                views.append(snapshot(renderer, geometry, other))
    return views, pairs


def _add_around(
    room: Room,
    renderer: Renderer,
    geometry: Geometry,
    rng: np.random.Generator,
    config: ShotConfig,
    views: list[View],
    pairs: list[tuple[int, int, str]],
) -> None:
    """Append the views of `config.around` pairs and the pairs themselves. The first view of a pair is a still."""
    count = int(config.around) + int(rng.uniform() < config.around % 1)
    spots = clear_spots(room, rng) if count else np.zeros((0, 3))
    for _ in range(count):
        kind = "turn" if rng.uniform() < 0.6 else "place"
        angle = float(rng.uniform(-180, 180))
        # Views from opposite sides are found in 75 to 85 % of the rooms, others nearly always.
        if kind == "turn" and rng.uniform() > (0.75 if abs(angle) < 135 else 0.87 if abs(angle) < 165 else 1.0):
            continue
        for _ in range(4):  # the angle stays: a redrawn one would be more often one that is easy to find
            cameras = around(room, rng, config.width, config.height, kind, angle, spots)
            if cameras is None:
                break
            one, two = (snapshot(renderer, geometry, camera) for camera in cameras)
            if presentable(one) and len(clearly_seen(one) & clearly_seen(two)) >= 2:
                pairs.append((len(views), len(views) + 1, kind))
                views += [one, two]
                break


def _target(view: View) -> np.ndarray:
    """World point (3,) in the middle of what the view shows: the mean of the sightings' points."""
    points = np.array([[*s.point, s.depth] for s in view.sightings if s.depth > 0])
    return unproject(view.camera, points[:, :2], points[:, 2]).mean(0)
