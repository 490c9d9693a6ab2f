"""Boxes of data sets as boxes of nine numbers, and boxes of annotated segments of a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fastvst import jsonl
from fastvst.scenes.adapters.checks import Problems, box_problem, rotation_problem
from fastvst.scenes.adapters.labels import clean_label
from fastvst.scenes.scene import SceneObject
from fastvst.spatial.boxes import angles
from fastvst.spatial.floor import outline

# Surfaces and leftovers of annotations: no object that a question could name, and nothing to count.
NOT_OBJECTS = frozenset(
    ("wall", "floor", "ceiling", "object", "unknown", "remove", "split", "void", "otherstructure", "other structure")
    + ("otherfurniture", "other furniture", "otherprop", "other prop", "unannotated", "none")
)


def oriented_box(centre: Any, axes: Any, lengths: Any) -> tuple[float, ...]:
    """A box of nine numbers in a world with Z up.

    Args:
        centre: (3,), metres. axes: (3, 3), unit vectors of the box as rows. lengths: (3,), metres along them.

    The axis nearest to Z becomes the box's height.

    Raises:
        ValueError: axes that are not orthogonal, NaN, or lengths <= 0.
    """
    rows = np.asarray(axes, dtype=np.float64).reshape(3, 3)
    if np.linalg.det(rows) < 0:
        rows = rows * np.array([[1.0], [1.0], [-1.0]])  # a box has no handedness
    fault = rotation_problem(rows)
    if fault is not None:
        raise ValueError(fault)
    sizes = np.asarray(lengths, dtype=np.float64)
    vertical = int(np.argmax(np.abs(rows[:, 2])))
    down = -rows[vertical] * np.sign(rows[vertical, 2])
    side = (vertical + 1) % 3
    matrix = np.stack([rows[side], down, np.cross(rows[side], down)], axis=1)
    turn = angles(matrix[None])[0]
    size = (sizes[side], sizes[vertical], sizes[3 - side - vertical])
    box = (*(float(v) for v in (*np.asarray(centre, dtype=np.float64).reshape(3), *size, *turn)),)
    fault = box_problem(box)
    if fault is not None:
        raise ValueError(fault)
    return box


def tight_box(points: np.ndarray) -> tuple[float, ...]:
    """The upright box of least floor area around points (N, 3) in a world with Z up.

    A box along the world's axes would make a table that stands askew too long. A rectangle of least area has a side on
    an edge of the convex hull (Freeman and Shapira, 1975). A side is at least 1 mm.
    """
    hull = outline(points)
    edges = np.roll(hull, -1, axis=0) - hull if len(hull) > 2 else np.eye(2)[:1]
    along = edges / np.linalg.norm(edges, axis=1, keepdims=True)
    turns = np.stack([along, np.stack([-along[:, 1], along[:, 0]], 1)], 1)  # (edges, 2, 2), axes as rows
    axes = turns[int(np.argmin(np.ptp(hull @ turns.transpose(0, 2, 1), axis=1).prod(1)))]
    plan = points[:, :2] @ axes.T
    middle = (plan.min(0) + plan.max(0)) / 2 @ axes
    z = points[:, 2]
    rows = np.eye(3)
    rows[:2, :2] = axes
    lengths = np.maximum([*np.ptp(plan, axis=0), np.ptp(z)], 1e-3)
    return oriented_box((*middle, (z.min() + z.max()) / 2), rows, lengths)


def named_object(scene: str, number: int, label: Any, box: Any, problems: Problems) -> SceneObject | None:
    """The object with this id; None for walls, floors and leftovers, and for an object without a name.

    `box` is a function that returns the nine numbers, or raises ValueError.
    """
    try:
        name = clean_label(label)
    except ValueError as error:
        problems.add(ValueError(f"{scene}: object {number}: {error}; it is left out"))
        return None
    if name in NOT_OBJECTS:
        return None
    try:
        return SceneObject(number, name, box())
    except (ValueError, TypeError, KeyError) as error:
        problems.add(ValueError(f"{scene}: object {number} ({name}): {error}; no question is about it"))
        return SceneObject(number, name, (float("nan"),) * 9, known=False)


def one_of_each_id(scene: str, objects: Iterable[SceneObject | None], problems: Problems) -> tuple[SceneObject, ...]:
    """The objects without None. Of two with one id nobody knows which one is meant: the last is kept, not known."""
    found: dict[int, SceneObject] = {}
    for item in objects:
        if item is not None and item.id in found:
            problems.add(ValueError(f"{scene}: two boxes have the id {item.id}; no question is about them"))
            item = dataclasses.replace(item, known=False)
        if item is not None:
            found[item.id] = item
    return tuple(found.values())


def read_ply_points(path: Path) -> np.ndarray:
    """Vertices (N, 3) of a PLY file, float64.

    Raises:
        ImportError: plyfile is missing (extra [scans]).
        ValueError: no vertices.
    """
    try:
        from plyfile import PlyData
    except ImportError as error:
        raise ImportError(f"{path}: reading PLY needs plyfile: pip install 'fastvst[scans]'") from error
    vertices = PlyData.read(str(path))["vertex"]
    points = np.stack([np.asarray(vertices[axis], dtype=np.float64) for axis in "xyz"], axis=1)
    if not len(points):
        raise ValueError(f"{path}: no vertices")
    return points


def object_number(scene: str, entry: Any, first: int, problems: Problems) -> int | None:
    """`objectId` (or `id`) of an entry of an annotation, plus `first`; None, and a problem, if it has none."""
    try:
        return int(entry.get("objectId", entry.get("id"))) + first
    except (AttributeError, TypeError, ValueError) as error:
        problems.add(ValueError(f"{scene}: object {str(entry)[:80]}: {error}; expected objectId; it is left out"))
        return None


def segment_boxes(
    scene: str,
    groups: list[dict[str, Any]],
    segments: np.ndarray,
    points: np.ndarray,
    problems: Problems,
    *,
    first_id: int = 1,
    labels: dict[str, str] | None = None,
) -> tuple[SceneObject, ...]:
    """Objects of ScanNet's annotation: groups of segments of a mesh, with tight upright boxes.

    Args:
        groups: entries of `segGroups`: {"objectId", "segments", "label"}; the id is `objectId` + `first_id`.
        segments: (N,) the segment of each vertex. points: (N, 3) the vertices in a world with Z up, metres.
        labels: raw label -> class name; a label that it lacks stays as it is.
    """
    if len(segments) != len(points):
        raise ValueError(f"{scene}: {len(segments)} segment indices for {len(points)} vertices: files of two meshes")
    order = np.argsort(segments, kind="stable")
    starts = np.unique(segments[order], return_index=True)
    where = dict(zip(starts[0].tolist(), np.split(order, starts[1][1:]), strict=True))
    found = []
    for group in groups:
        number = object_number(scene, group, first_id, problems)
        if number is None:
            continue
        segments_of = group.get("segments")
        own = [where[s] for s in segments_of if s in where] if isinstance(segments_of, list) else []

        def box(own: list[np.ndarray] = own) -> tuple[float, ...]:
            if not own:
                raise ValueError("no vertex of the mesh belongs to it")
            return tight_box(points[np.concatenate(own)])

        label = group.get("label")
        found.append(named_object(scene, number, (labels or {}).get(str(label), label), box, problems))
    return one_of_each_id(scene, found, problems)


def read_json(path: Path) -> Any:
    """JSON of a file.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is no JSON; names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return jsonl.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
