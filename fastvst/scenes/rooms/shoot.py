"""From a seed to an annotated scene: furnish, place cameras, render, look at what is visible."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastvst.scenes.rooms.cameras import motion, second, still, walk
from fastvst.scenes.rooms.geometry import Geometry, build_geometry
from fastvst.scenes.rooms.layout import Room
from fastvst.scenes.rooms.recipes import furnish
from fastvst.scenes.rooms.render import Renderer
from fastvst.scenes.scene import Scene, SceneObject, View, observe, wide_pairs
from fastvst.spatial.camera import Camera, unproject


@dataclass(frozen=True)
class ShotConfig:
    """Pictures of a room: size in pixels, stills per room, and for each still a second frame of a moving camera
    (`rotate`: share of pure rotations, `two_axes`: share of shifts along two axes) and with probability `overlap` one
    wide-baseline second view."""

    width: int = 320
    height: int = 240
    views: int = 2
    rotate: float = 0.25
    two_axes: float = 0.25
    overlap: float = 0.5


@dataclass(frozen=True)
class WalkConfig:
    """A video of the room: frames, frames a second (2, what VST samples videos at), and how many pairs of its frames to
    offer as wide-baseline pairs (the second turned by 35-100 degrees, with two things in sight of both)."""

    frames: int = 20
    fps: float = 2.0
    pairs: int = 3


def snapshot(renderer: Renderer, geometry: Geometry, camera: Camera) -> View:
    """Render and annotate one view of the loaded geometry."""
    rgb, depth, ids = renderer.draw(camera)
    return View(camera, rgb, observe(camera, depth, ids, geometry.surface), depth, ids)


def presentable(view: View) -> bool:
    """Whether a still is worth asking about: three things seen, nothing right before the lens, no single thing
    filling it."""
    if view.depth is None or view.ids is None:
        return False
    near = float((view.depth < 0.6).mean())
    largest = max((s.pixels for s in view.sightings), default=0) / view.ids.size
    known = sum(s.visibility >= 0.3 and s.pixels >= 60 for s in view.sightings)
    return near < 0.15 and largest < 0.6 and float(np.median(view.depth)) > 1.2 and known >= 3


def shoot(seed: int, renderer: Renderer, config: ShotConfig, video: WalkConfig | None = None) -> Scene:
    """The annotated scene of a room seed; the same every time for one renderer backend and configuration.

    The pictures do not depend on `video`, which adds the frames of a walk behind them.
    """
    room: Room = furnish(seed)
    geometry = build_geometry(room)
    renderer.load(geometry)
    rng = np.random.default_rng([seed, 3])
    views: list[View] = []
    pairs: list[tuple[int, int, str]] = []
    stills = 0
    for _ in range(config.views * 3):
        if stills == config.views:
            break
        camera = still(room, rng, config.width, config.height)
        if camera is None:
            break
        view = snapshot(renderer, geometry, camera)
        if not presentable(view):
            continue
        first = len(views)
        stills += 1
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
    frames: tuple[int, ...] = ()
    if video is not None:
        rng = np.random.default_rng([seed, 7])
        path = walk(room, rng, video.frames, config.width, config.height)
        first = len(views)
        views += [snapshot(renderer, geometry, camera) for camera in path or []]
        frames = tuple(range(first, len(views)))
        pairs += wide_pairs(views, frames, rng, video.pairs)
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


def _target(view: View) -> np.ndarray:
    """A world point in the middle of what the view shows: the mean of the sightings' dots."""
    dots = np.array([[*s.point, s.depth] for s in view.sightings if s.depth > 0])
    return unproject(view.camera, dots[:, :2], dots[:, 2]).mean(0)
