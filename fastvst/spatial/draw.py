"""Visual prompts and labels on PIL images: dots, circles, 2D boxes, 3D wireframes. All sizes scale with the image."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastvst.spatial.boxes import EDGES, corners

# Saturated and far apart: each name is unambiguous, and a small vision tower can tell the colours apart.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (255, 0, 0),
    "green": (0, 220, 0),
    "blue": (0, 60, 255),
    "yellow": (255, 230, 0),
    "pink": (255, 0, 200),
    "cyan": (0, 235, 255),
    "orange": (255, 130, 0),
}


@lru_cache(maxsize=32)
def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def radius_of(size: tuple[int, int]) -> float:
    """Radius in pixels of a dot in an image of this size: 2.2 % of the longer side, at least 3."""
    return max(3.0, 0.022 * max(size))


def _rgb(colour: str | tuple[int, int, int]) -> tuple[int, int, int]:
    return COLOURS[colour] if isinstance(colour, str) else colour


def text(image: Image.Image, xy: tuple[float, float], content: str) -> None:
    """Write `content` in white on a dark plate, centred at `xy` but kept inside the image."""
    draw = ImageDraw.Draw(image)
    font = _font(max(9, round(1.7 * radius_of(image.size))))
    left, top, right, bottom = draw.textbbox((0, 0), content, font=font)
    w = right - left + 4
    h = bottom - top + 4
    x = min(max(xy[0] - w / 2, 0), image.width - w)
    y = min(max(xy[1] - h / 2, 0), image.height - h)
    draw.rectangle([x, y, x + w, y + h], fill=(20, 20, 20))
    draw.text((x + 2 - left, y + 2 - top), content, font=font, fill=(255, 255, 255))


def dot(image: Image.Image, point: tuple[float, float], colour: str | tuple[int, int, int], label: str = "") -> None:
    """Draw a filled dot with a white rim at `point` (u, v); the label is above it, or below it near the upper edge."""
    r = radius_of(image.size)
    u, v = point
    draw = ImageDraw.Draw(image)
    draw.ellipse([u - r - 1.5, v - r - 1.5, u + r + 1.5, v + r + 1.5], fill=(255, 255, 255))
    draw.ellipse([u - r, v - r, u + r, v + r], fill=_rgb(colour))
    if label:
        text(image, (u, v - 2.4 * r if v > 4 * r else v + 2.4 * r), label)


def circle(image: Image.Image, point: tuple[float, float], colour: str | tuple[int, int, int], label: str = "") -> None:
    """Draw a ring around `point` (u, v) that leaves the point visible; the label is placed as in `dot`."""
    r = 1.25 * radius_of(image.size)
    u, v = point
    draw = ImageDraw.Draw(image)
    draw.ellipse([u - r - 1, v - r - 1, u + r + 1, v + r + 1], outline=(255, 255, 255), width=1)
    draw.ellipse([u - r, v - r, u + r, v + r], outline=_rgb(colour), width=max(2, round(r / 2.2)))
    draw.ellipse([u - 1.5, v - 1.5, u + 1.5, v + 1.5], fill=_rgb(colour))
    if label:
        text(image, (u, v - 2.2 * r if v > 4 * r else v + 2.2 * r), label)


def box_2d(
    image: Image.Image, box: tuple[float, float, float, float], colour: str | tuple[int, int, int], label: str = ""
) -> None:
    """Draw a rectangle x1, y1, x2, y2 in pixels; the label is inside its upper left corner."""
    width = max(2, round(radius_of(image.size) / 2.5))
    x1, y1, x2, y2 = box
    x1 = max(0.0, x1)
    y1 = max(0.0, y1)
    x2 = min(image.width - 1.0, x2)
    y2 = min(image.height - 1.0, y2)
    if x2 - x1 < 1 or y2 - y1 < 1:
        return
    ImageDraw.Draw(image).rectangle([x1, y1, x2, y2], outline=_rgb(colour), width=width)
    if label:
        text(image, (x1 + 2.5 * radius_of(image.size), y1 + 1.5 * radius_of(image.size)), label)


def boxes_3d(
    image: Image.Image,
    boxes: Any,
    labels: list[str],
    intrinsics: tuple[float, float, float, float],
    colour: str | tuple[int, int, int] = "green",
    width: int = 2,
) -> Image.Image:
    """A copy of the image with the wireframes of boxes (N, 9) in the camera frame, metres and degrees.

    `intrinsics`: fx, fy, cx, cy in pixels of this image. Edges are clipped 5 cm in front of the camera; a box behind it
    is not drawn.
    """
    result = image.convert("RGB")
    draw = ImageDraw.Draw(result)
    fx, fy, cx, cy = intrinsics
    for points, label in zip(corners(boxes), labels, strict=True):
        anchor: list[tuple[float, float]] = []
        for i, j in EDGES:
            segment = _clip(points[i], points[j], 0.05)
            if segment is None:
                continue
            ends = [(fx * p[0] / p[2] + cx, fy * p[1] / p[2] + cy) for p in segment]
            anchor += ends
            if all(abs(x) < 20 * max(result.size) for end in ends for x in end):
                draw.line(ends, fill=_rgb(colour), width=width)
        if anchor and label:
            centre = np.array(anchor).mean(0)
            top = max(0.0, min(y for _, y in anchor))
            if 0 <= centre[0] <= result.width and top <= result.height:
                text(result, (float(centre[0]), top), label)
    return result


def _clip(a: np.ndarray, b: np.ndarray, near: float) -> tuple[np.ndarray, np.ndarray] | None:
    """The part of the segment a-b with z >= near, or None."""
    if a[2] < near and b[2] < near:
        return None
    if a[2] < near:
        a = b + (a - b) * (b[2] - near) / (b[2] - a[2])
    elif b[2] < near:
        b = a + (b - a) * (a[2] - near) / (a[2] - b[2])
    return a, b
