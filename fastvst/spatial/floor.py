"""Geometry in the plane seen from above (world X and Y): footprints of boxes, areas, segments against outlines."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastvst.spatial.boxes import corners

Point = list[float] | np.ndarray  # (2,)


def footprint(box: Any) -> np.ndarray:
    """Outline (K, 2) of a box (9,) in the world frame seen from above, counter-clockwise; four if it is upright."""
    return outline(corners([box])[0])


def outline(cloud: np.ndarray) -> np.ndarray:
    """Convex hull (K, 2) of points (N, 2 or 3) seen from above, counter-clockwise (Andrew's monotone chain)."""
    points = np.unique(_outer(np.round(cloud[:, :2], 9)), axis=0)  # sorted by x, then y

    def chain(ordered: list[list[float]]) -> list[list[float]]:
        hull: list[list[float]] = []
        for p in ordered:
            while len(hull) >= 2 and _turn(hull[-2], hull[-1], p) <= 1e-9:
                hull.pop()
            hull.append(p)
        return hull[:-1]

    plain = points.tolist()  # Python's own numbers: ten times as fast as scalars of numpy
    return np.array(chain(plain) + chain(plain[::-1]))


def _outer(points: np.ndarray) -> np.ndarray:
    """The points (N, 2) that may be on the hull: not those inside the polygon of the extreme points in 32 directions
    (Akl and Toussaint, 1978). Of the vertices of a scanned object nearly all are inside."""
    if len(points) < 64:
        return points
    turns = np.arange(32) * (2 * np.pi / 32)
    tips = points[np.argmax(points @ np.stack([np.cos(turns), np.sin(turns)]), axis=0)]  # counter-clockwise
    edges = np.roll(tips, -1, axis=0) - tips
    real = (edges != 0).any(1)
    edges = edges[real]
    starts = tips[real]
    if len(edges) < 3:
        return points
    right = np.stack([edges[:, 1], -edges[:, 0]]) / np.linalg.norm(edges, axis=1)  # (2, edges)
    inside = (points @ right - (starts * right.T).sum(1) < -1e-6).all(1)
    return points[~inside]


def _turn(a: Point, b: Point, c: Point) -> float:
    """Positive if a -> b -> c turns left, negative if it turns right, 0 on a line."""
    return float((b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0]))


def upright(up: Any) -> np.ndarray:
    """A rotation (3, 3) that turns the unit vector `up` (3,) to +Z; the identity for +Z."""
    z = np.asarray(up, dtype=np.float64)
    if z[2] == 1.0:
        return np.eye(3)
    x = np.cross(z, np.eye(3)[int(np.argmin(np.abs(z)))])
    x = x / np.linalg.norm(x)
    return np.stack([x, np.cross(z, x), z])


def height_range(box: Any) -> tuple[float, float]:
    """Lowest and highest Z of a box (9,) in the world frame, metres."""
    z = corners([box])[0][:, 2]
    return float(z.min()), float(z.max())


def area(polygon: np.ndarray) -> float:
    """Area of a simple polygon (K, 2) in square metres (shoelace formula)."""
    x, y = polygon.T
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def meets(start: np.ndarray, end: np.ndarray, outline: np.ndarray) -> bool:
    """Whether the segment start-end, (2,) each, meets a convex counter-clockwise outline (K, 2) (Cyrus-Beck)."""
    direction = end - start
    enter = 0.0
    leave = 1.0
    for p, q in zip(outline, np.roll(outline, -1, axis=0), strict=True):
        normal = np.array([q[1] - p[1], p[0] - q[0]])  # outwards
        along = float(normal @ direction)
        ahead = float(normal @ (p - start))
        if abs(along) < 1e-12:
            if ahead < 0:
                return False
        elif along > 0:
            leave = min(leave, ahead / along)
        else:
            enter = max(enter, ahead / along)
    return enter <= leave


def crosses_outline(start: np.ndarray, end: np.ndarray, polygon: np.ndarray) -> bool:
    """Whether the segment start-end, (2,) each, crosses an edge of any simple polygon (K, 2)."""
    for p, q in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if _turn(start, end, p) * _turn(start, end, q) <= 0 and _turn(p, q, start) * _turn(p, q, end) <= 0:
            return True
    return False
