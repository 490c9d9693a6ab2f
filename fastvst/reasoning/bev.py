"""Bird's-eye view of a scene, as VST-R shows it to its teacher model (VST-R, arXiv 2511.05491).

The plan is white and has no axes. Every object is its rotated footprint with a name plate, every camera a triangle with
an arrow. The first camera looks up the page. `object_table` lists the same objects as text for the teacher's prompt.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastvst.scenes.scene import Scene
from fastvst.spatial.floor import area, footprint

SCALE = 3  # drawn three times as large, then reduced: smooth edges
CAMERAS = ((214, 39, 40), (44, 140, 44), (31, 90, 180), (150, 75, 0))  # Cam-1 red, Cam-2 green, as published
WALL = (120, 120, 120)


@lru_cache(maxsize=8)
def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def frame(scene: Scene, view: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Origin (2,) and rotation (2, 2) from world floor coordinates to the page: x to the right, y up.

    The camera of `view` then looks up the page. Without a view the page has the world's axes.
    """
    if view is None:
        return np.zeros(2), np.eye(2)
    ahead = scene.views[view].camera.rotation[2, :2]
    ahead = ahead / max(float(np.linalg.norm(ahead)), 1e-9)
    return scene.views[view].camera.position[:2], np.array([[ahead[1], -ahead[0]], [ahead[0], ahead[1]]])


def draw_bev(scene: Scene, views: Sequence[int] = (), size: int = 640) -> Image.Image:
    """The plan of the whole scene, `size` pixels square, with the cameras of these views (the first one looks up).

    Labels that would overlap are moved apart; a thin line connects a moved label to its object.
    """
    origin, turn = frame(scene, views[0] if views else None)
    plans = [(thing.name, (footprint(thing.box) - origin) @ turn.T) for thing in scene.objects]
    cameras = [(scene.views[v].camera.position[:2] - origin) @ turn.T for v in views]
    outline = None if scene.polygon is None else (scene.polygon - origin) @ turn.T
    every = np.concatenate(
        [plan for _, plan in plans] + [c[None] for c in cameras] + ([] if outline is None else [outline])
    )
    low = every.min(0)
    high = every.max(0)
    margin = 0.09 * size
    unit = (size - 2 * margin) / max(float((high - low).max()), 0.5)
    middle = (low + high) / 2

    def page(points: np.ndarray) -> list[tuple[float, float]]:
        local = (np.atleast_2d(points) - middle) * unit * SCALE
        return [(size * SCALE / 2 + float(x), size * SCALE / 2 - float(y)) for x, y in local]

    canvas = Image.new("RGB", (size * SCALE, size * SCALE), (255, 255, 255))
    pen = ImageDraw.Draw(canvas, "RGBA")
    if outline is not None:
        pen.line([*page(outline), *page(outline)[:2]], fill=WALL, width=2 * SCALE)
    names = sorted({name for name, _ in plans})
    hues = {name: hue(k, len(names)) for k, name in enumerate(names)}
    for name, plan in sorted(plans, key=lambda item: -area(item[1])):  # large ones first: small objects stay visible
        pen.polygon(page(plan), fill=(*hues[name], 90))
        pen.line([*page(plan), *page(plan)[:2]], fill=hues[name], width=2 * SCALE)
    chips = [(name, page(plan.mean(0))[0], hues[name]) for name, plan in plans]
    for k, (view, place) in enumerate(zip(views, cameras, strict=True)):
        colour = CAMERAS[k % len(CAMERAS)]
        at = page(place)[0]
        ahead = turn @ scene.views[view].camera.rotation[2, :2]
        tip = _arrow(pen, at, ahead / max(float(np.linalg.norm(ahead)), 1e-9), 0.05 * size * SCALE, colour)
        chips.append((f"Cam-{k + 1}", (at[0], at[1] + (14 if tip[1] <= at[1] else -14) * SCALE), colour))
    draw_labels(pen, chips, size)
    return canvas.resize((size, size), Image.Resampling.LANCZOS)


def hue(k: int, count: int) -> tuple[int, int, int]:
    r, g, b = colorsys.hls_to_rgb((k * 0.618034) % 1.0 if count > 1 else 0.6, 0.38, 0.75)
    return round(255 * r), round(255 * g), round(255 * b)


def _arrow(
    pen: ImageDraw.ImageDraw, at: tuple[float, float], ahead: np.ndarray, length: float, colour: tuple[int, int, int]
) -> tuple[float, float]:
    """A camera: a triangle that points along `ahead` (page axes, y up) and an arrow; returns the arrow's tip."""
    x, y = at
    dx = float(ahead[0])
    dy = -float(ahead[1])
    side = (-dy, dx)
    body = 0.45 * length
    corners = [
        (x - 0.5 * body * dx + s * 0.6 * body * side[0], y - 0.5 * body * dy + s * 0.6 * body * side[1])
        for s in (-1, 1)
    ]
    pen.polygon([(x + body * dx, y + body * dy), *corners], fill=(*colour, 255))
    tip = (x + 1.5 * length * dx, y + 1.5 * length * dy)
    pen.line([(x, y), tip], fill=colour, width=2 * SCALE)
    head = 0.25 * length
    barbs = [(tip[0] - head * (dx + s * side[0] / 2), tip[1] - head * (dy + s * side[1] / 2)) for s in (-1, 1)]
    pen.polygon([tip, *barbs], fill=colour)
    return tip


def draw_labels(
    pen: ImageDraw.ImageDraw, chips: list[tuple[str, tuple[float, float], tuple[int, int, int]]], size: int
) -> None:
    """White names on coloured plates, each at the free place nearest to its object; cameras first."""
    font = _font(max(9, size // 52) * SCALE)
    taken: list[tuple[float, float, float, float]] = []
    plates = []  # drawn last, so that no connecting line crosses a plate
    for name, (x, y), colour in sorted(chips, key=lambda chip: not chip[0].startswith("Cam-")):
        left, top, right, bottom = pen.textbbox((0, 0), name, font=font)
        w = right - left + 8 * SCALE
        h = bottom - top + 6 * SCALE
        spots = [(0.0, 0.0)] + [
            (r * h * math.cos(a), r * h * math.sin(a))
            for r in (0.6, 1.1, 1.7, 2.3, 3.0, 4.0, 5.0)
            for a in (np.pi / 2, -np.pi / 2, 0.0, np.pi, np.pi / 4, -np.pi / 4, 3 * np.pi / 4, -3 * np.pi / 4)
        ]
        best = None
        for dx, dy in spots:
            cx = min(max(x + dx, w / 2 + SCALE), size * SCALE - w / 2 - SCALE)
            cy = min(max(y + dy, h / 2 + SCALE), size * SCALE - h / 2 - SCALE)
            box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
            overlap = sum(
                max(0.0, min(box[2], o[2]) - max(box[0], o[0])) * max(0.0, min(box[3], o[3]) - max(box[1], o[1]))
                for o in taken
            )
            if best is None or overlap < best[0]:
                best = (overlap, box)
            if overlap == 0:
                break
        assert best is not None
        box = best[1]
        taken.append(box)
        cx = (box[0] + box[2]) / 2
        cy = (box[1] + box[3]) / 2
        if math.hypot(cx - x, cy - y) > h:
            pen.line([(x, y), (cx, cy)], fill=colour, width=SCALE)
        plates.append((name, box, colour, (box[0] + 4 * SCALE - left, box[1] + 3 * SCALE - top)))
    for name, box, colour, corner in plates:
        pen.rounded_rectangle(box, radius=3 * SCALE, fill=(*colour, 255))
        pen.text(corner, name, font=font, fill=(255, 255, 255))


def object_table(scene: Scene, views: Sequence[int] = ()) -> str:
    """The objects of the scene as text, one per line.

    A line holds the name, the size in metres, the place on the plan of `draw_bev` (x to the right of the first camera,
    y ahead of it), the anticlockwise rotation on the plan, and the views that show the object.
    """
    origin, turn = frame(scene, views[0] if views else None)
    page_turn = math.degrees(math.atan2(turn[1, 0], turn[0, 0]))  # anticlockwise, from the world's axes to the page's
    lines = ["id | object | width x depth x height (m) | right, ahead (m) | turned (deg) | seen in image"]
    for thing in scene.objects:
        right, ahead = (np.array(thing.box[:2]) - origin) @ turn.T
        seen = [
            str(k + 1) for k, v in enumerate(views) if any(s.object_id == thing.id for s in scene.views[v].sightings)
        ]
        size = f"{thing.box[3]:.2f} x {thing.box[5]:.2f} x {thing.height:.2f}"
        degrees = (thing.box[8] + page_turn + 180) % 360 - 180
        place = f"{right:.2f}, {ahead:.2f} | {degrees:.0f}"
        lines.append(f"{thing.id} | {thing.name} | {size} | {place} | {', '.join(seen) or '-'}")
    return "\n".join(lines)
