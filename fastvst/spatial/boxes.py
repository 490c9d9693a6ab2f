"""Oriented 3D boxes with nine degrees of freedom: corners, exact IoU, distances, and VST's answer text.

A box is [x, y, z, x_size, y_size, z_size, pitch, yaw, roll]: centre and sizes in metres, rotations about X, Y and Z in
degrees. The rotations apply in that order about fixed axes (SciPy's lower-case "xyz": R = Rz Ry Rx) and map the local
frame of the box to its parent frame.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastvst import jsonl
from fastvst.spatial.camera import Camera, to_camera

# Corner order of VST's evaluator (and of PyTorch3D's box3d_overlap), as signs of the half sizes.
SIGNS = np.array(
    [[-1, -1, -1], [1, -1, -1], [1, 1, -1], [-1, 1, -1], [-1, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]],
    dtype=np.float64,
)
EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7))
_MIN_SIZE = 1e-6  # metres; a thinner box counts as empty


def rotations(degrees: np.ndarray) -> np.ndarray:
    """(N, 3) angles about X, Y, Z in degrees -> (N, 3, 3) matrices Rz Ry Rx, float64."""
    a = np.radians(np.asarray(degrees, dtype=np.float64))
    (cx, cy, cz) = np.cos(a).T
    (sx, sy, sz) = np.sin(a).T
    rows = [
        [cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx],
        [sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx],
        [-sy, cy * sx, cy * cx],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def angles(matrices: np.ndarray) -> np.ndarray:
    """(N, 3, 3) rotations -> (N, 3) degrees about X, Y, Z, the inverse of `rotations`; Z is 0 in gimbal lock."""
    m = np.asarray(matrices, dtype=np.float64)
    locked = np.abs(m[..., 2, 0]) > 1 - 1e-12
    # In gimbal lock only rx -/+ rz is defined; with rz = 0 the middle row is (0, cos rx, -sin rx).
    rx = np.where(locked, np.arctan2(-m[..., 1, 2], m[..., 1, 1]), np.arctan2(m[..., 2, 1], m[..., 2, 2]))
    ry = np.arcsin(np.clip(-m[..., 2, 0], -1, 1))
    rz = np.where(locked, 0.0, np.arctan2(m[..., 1, 0], m[..., 0, 0]))
    return np.degrees(np.stack([rx, ry, rz], -1))


def _as_boxes(boxes: Any) -> np.ndarray:
    array = np.asarray(boxes, dtype=np.float64)
    if array.size == 0:
        return array.reshape(0, 9)
    if array.ndim != 2 or array.shape[1] != 9:
        raise ValueError(f"boxes must be (N, 9): centre, size, angles in degrees; got shape {array.shape}")
    return array


def corners(boxes: Any) -> np.ndarray:
    """(N, 9) boxes -> (N, 8, 3) corners in VST's order, float64.

    Raises:
        ValueError: another shape than (N, 9).
    """
    b = _as_boxes(boxes)
    local = SIGNS * (b[:, None, 3:6] / 2)
    return local @ rotations(b[:, 6:9]).transpose(0, 2, 1) + b[:, None, :3]


def to_camera_frame(boxes: Any, camera: Camera) -> np.ndarray:
    """(N, 9) boxes in the world frame -> (N, 9) in the camera frame; sizes do not change."""
    b = _as_boxes(boxes)
    turned = camera.rotation @ rotations(b[:, 6:9])
    return np.concatenate([to_camera(camera, b[:, :3]), b[:, 3:6], angles(turned)], axis=1)


def _halfspaces(axes: np.ndarray, half: np.ndarray, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outward normals (P, 6, 3) and offsets (P, 6) of the faces; a point x is inside if n . x <= offset.

    `axes` (P, 3, 3): local axes as rows in the parent frame; `half` (P, 3) half sizes; `centre` (P, 3).
    """
    normals = np.concatenate([axes, -axes], axis=1)
    return normals, np.concatenate([half, half], axis=1) + np.einsum("pij,pj->pi", normals, centre)


def _snap(axes_a: np.ndarray, axes_b: np.ndarray) -> np.ndarray:
    """axes_b (P, 3, 3) in which every axis within 3e-9 rad of an axis of axes_a is replaced by that axis.

    Two planes that are so nearly parallel meet in a line that float64 cannot place. The change moves the volume by
    less than 1e-8 of itself.
    """
    sine = np.linalg.norm(np.cross(axes_a[:, :, None], axes_b[:, None, :]), axis=-1)  # (P, 3 of a, 3 of b)
    nearest = sine.argmin(1)  # (P, 3)
    partner = np.take_along_axis(axes_a, nearest[..., None], axis=1)
    sign = np.where((partner * axes_b).sum(-1, keepdims=True) < 0, -1.0, 1.0)
    return np.where((sine.min(1) < 3e-9)[..., None], sign * partner, axes_b)


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`np.cross` of (..., 3) arrays, in half the time."""
    (ax, ay, az) = np.moveaxis(a, -1, 0)
    (bx, by, bz) = np.moveaxis(b, -1, 0)
    result = np.empty_like(a)
    result[..., 0] = ay * bz - az * by
    result[..., 1] = az * bx - ax * bz
    result[..., 2] = ax * by - ay * bx
    return result


_PAIRS = np.array([(i, j) for i in range(12) for j in range(i + 1, 12) if not (i // 6 == j // 6 and i % 3 == j % 3)])


def _intersection_volumes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Volume of a[p] and b[p] for (P, 9) boxes, by Lasserre's formula (1983) over the twelve faces.

    A polytope {n_i . x <= b_i} has volume 1/3 sum_i b_i area_i. Each face has area 1/2 sum_j d_ij length_ij over its
    edges. The edge of two faces is their common line, clipped by the other ten. No polygon is ordered or stored, so the
    whole computation is array expressions. The formula counts a face twice where both boxes have it in one plane.
    Therefore b grows by 1e-11 of its size: far above rounding (1e-15), far below the tolerance of the result (1e-9).
    """
    axes_a, axes_b = (rotations(x[:, 6:9]).transpose(0, 2, 1) for x in (a, b))
    na, oa = _halfspaces(axes_a, a[:, 3:6] / 2, np.zeros((len(a), 3)))  # origin: centre of a
    nb, ob = _halfspaces(_snap(axes_a, axes_b), b[:, 3:6] / 2 * (1 + 1e-11), b[:, :3] - a[:, :3])
    n = np.concatenate([na, nb], 1)
    o = np.concatenate([oa, ob], 1)  # (P, 12, 3), (P, 12)
    i, j = _PAIRS.T
    ni = n[:, i]
    nj = n[:, j]
    oi = o[:, i]
    oj = o[:, j]  # (P, 60, 3), (P, 60)
    direction = _cross(ni, nj)
    sine2 = np.einsum("pek,pek->pe", direction, direction)
    parallel = sine2 < 1e-20  # after _snap only equal planes are parallel
    sine2 = np.where(parallel, 1.0, sine2)
    sine = np.sqrt(sine2)
    point = (oi[..., None] * _cross(nj, direction) + oj[..., None] * _cross(direction, ni)) / sine2[..., None]
    direction = direction / sine[..., None]

    slope = direction @ n.transpose(0, 2, 1)  # (P, 60, 12)
    room = o[:, None, :] - point @ n.transpose(0, 2, 1)
    edge = np.arange(len(_PAIRS))
    slope[:, edge, i] = slope[:, edge, j] = 0.0
    room[:, edge, i] = room[:, edge, j] = 0.0
    flat = np.abs(slope) < 1e-13
    with np.errstate(divide="ignore", invalid="ignore"):
        crossing = room / slope
    end = np.where(slope > 1e-13, crossing, np.inf).min(-1)
    start = np.where(slope < -1e-13, crossing, -np.inf).max(-1)
    outside = (flat & (room < 0)).any(-1)
    length = np.where(parallel | outside, 0.0, np.maximum(end - start, 0.0))
    length = np.where(np.isfinite(length), length, 0.0)

    cosine = np.einsum("pek,pek->pe", ni, nj)
    di = (oj - cosine * oi) / sine
    dj = (oi - cosine * oj) / sine  # distance of the edge from the foot point of each face
    volume = ((oi * di + oj * dj) * length).sum(-1) / 6
    return np.maximum(volume, 0.0)


def _pair_volumes(a: np.ndarray, b: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(P,) intersection volumes of a[rows[p]] and b[columns[p]]; 0 for boxes that are far apart, thin or not finite."""
    good_a, good_b = (np.isfinite(x).all(1) & (x[:, 3:6] > _MIN_SIZE).all(1) for x in (a, b))
    centre_a = np.where(good_a[:, None], a[:, :3], 0.0)
    centre_b = np.where(good_b[:, None], b[:, :3], 0.0)
    reach_a, reach_b = (
        np.where(good, np.linalg.norm(x[:, 3:6], axis=1) / 2, 0.0) for x, good in ((a, good_a), (b, good_b))
    )
    gap2 = ((centre_a[rows] - centre_b[columns]) ** 2).sum(-1)
    near = np.nonzero((gap2 < (reach_a[rows] + reach_b[columns]) ** 2) & good_a[rows] & good_b[columns])[0]
    near = near[~_separated(a, b, rows[near], columns[near])]
    result = np.zeros(len(rows))
    # 256 pairs x 60 edges x 12 faces x 8 bytes = 1.5 MB per array: fits into the cache.
    for first in range(0, len(near), 256):
        chosen = near[first : first + 256]
        result[chosen] = _intersection_volumes(a[rows[chosen]], b[columns[chosen]])
    return result


def _separated(a: np.ndarray, b: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(P,) bool: the plane of a face of one box separates it from the other box.

    The test costs a tenth of a volume. It misses only the few separate pairs that no face plane separates.
    """
    turn_a = rotations(a[:, 6:9])[rows]
    turn_b = rotations(b[:, 6:9])[columns]
    offset = b[columns, :3] - a[rows, :3]
    half_a = a[rows, 3:6] / 2
    half_b = b[columns, 3:6] / 2
    cosine = np.abs(turn_a.transpose(0, 2, 1) @ turn_b)  # (P, axis of a, axis of b)
    from_a = np.abs(np.einsum("pi,pij->pj", offset, turn_a)) - half_a - np.einsum("pij,pj->pi", cosine, half_b)
    from_b = np.abs(np.einsum("pi,pij->pj", offset, turn_b)) - half_b - np.einsum("pij,pi->pj", cosine, half_a)
    return (from_a > 0).any(1) | (from_b > 0).any(1)


def iou_3d(a: Any, b: Any) -> np.ndarray:
    """Exact intersection over union (N, M), float64, of oriented boxes (N, 9) and (M, 9) in metres and degrees.

    A box that is not finite, or thinner than 1e-6 m in any direction, has IoU 0 with every box, as in VST's evaluator.
    Bounding spheres reject far pairs first. The result agrees with half-space intersection to 1e-9.

    Raises:
        ValueError: another shape than (N, 9).
    """
    a = _as_boxes(a)
    b = _as_boxes(b)
    rows, columns = (index.ravel() for index in np.indices((len(a), len(b))))
    return _pair_iou(a, b, rows, columns).reshape(len(a), len(b))


def greedy_matches(overlap: np.ndarray, least: float) -> list[tuple[int, int]]:
    """One-to-one matches (row, column) of a matrix of overlaps, the largest overlap first, down to `least` > 0."""
    free = overlap.copy()
    found = []
    while free.size and free.max() >= least:
        row, column = (int(index) for index in np.unravel_index(int(free.argmax()), free.shape))
        free[row, :] = free[:, column] = -1.0
        found.append((row, column))
    return found


def iou_3d_sets(sets: Sequence[tuple[Any, Any]]) -> list[np.ndarray]:
    """`[iou_3d(a, b) for a, b in sets]`, computed for all pairs at once: ten times as fast for many small sets.

    Raises:
        ValueError: another shape than (N, 9).
    """
    pairs = [(_as_boxes(a), _as_boxes(b)) for a, b in sets]
    if not pairs:
        return []
    counts_a, counts_b = (np.array([len(box) for box in side]) for side in zip(*pairs, strict=True))
    sizes = counts_a * counts_b
    ends = np.cumsum(sizes)
    inside = np.arange(ends[-1]) - np.repeat(ends - sizes, sizes)  # index of the pair in its set, row by row
    width = np.repeat(counts_b, sizes)
    rows = inside // width + np.repeat(np.cumsum(counts_a) - counts_a, sizes)
    columns = inside % width + np.repeat(np.cumsum(counts_b) - counts_b, sizes)
    all_a, all_b = (np.concatenate(side) for side in zip(*pairs, strict=True))
    iou = _pair_iou(all_a, all_b, rows, columns)
    shapes = zip(ends - sizes, ends, counts_a, counts_b, strict=True)
    return [iou[first:end].reshape(shape) for first, end, *shape in shapes]


def _pair_iou(a: np.ndarray, b: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(P,) IoU of a[rows[p]] and b[columns[p]]."""
    volume = _pair_volumes(a, b, rows, columns)
    size_a = np.abs(a[:, 3:6]).prod(1)[rows]
    size_b = np.abs(b[:, 3:6]).prod(1)[columns]
    volume = np.minimum(volume, np.minimum(size_a, size_b))
    union = size_a + size_b - volume
    valid = (volume > 0) & (union > 0)
    return np.where(valid, volume / np.where(valid, union, 1.0), 0.0)


def _segment_distance(p: np.ndarray, u: np.ndarray, q: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Distance of the segments p + s u and q + t v, 0 <= s, t <= 1, elementwise over (..., 3).

    Exact only where both nearest points are interior. `box_distance` covers the ends by corner-to-box distances, so
    parallel segments and clamped solutions may return too much.
    """
    w = p - q
    a = (u * u).sum(-1)
    b = (u * v).sum(-1)
    c = (v * v).sum(-1)
    d = (u * w).sum(-1)
    e = (v * w).sum(-1)
    den = a * c - b * b
    ok = den > 1e-12 * a * c
    den = np.where(ok, den, 1.0)
    s = np.clip((b * e - c * d) / den, 0, 1)
    t = np.clip((a * e - b * d) / den, 0, 1)
    gap = np.linalg.norm(w + s[..., None] * u - t[..., None] * v, axis=-1)
    return np.where(ok, gap, np.inf)


def box_distance(a: Any, b: Any) -> float:
    """Smallest distance in metres between two boxes (9,); 0 if they touch or overlap."""
    first, second = (tuple(np.asarray(box, dtype=np.float64).tolist()) for box in (a, b))
    return _box_distance(first, second)


@functools.lru_cache(4096)  # the questions about one scene compare the same boxes again and again
def _box_distance(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    pair = np.array([a, b])
    points = corners(pair)
    turn = rotations(pair[:, 6:9])
    axes = [*turn[0].T, *turn[1].T, *np.cross(turn[0].T[:, None], turn[1].T[None]).reshape(9, 3)]
    axes = [axis / np.linalg.norm(axis) for axis in axes if np.linalg.norm(axis) > 1e-9]
    spans = points @ np.array(axes).T  # (2, 8, axes), for the separating-axis test
    if ((spans[0].min(0) <= spans[1].max(0)) & (spans[1].min(0) <= spans[0].max(0))).all():
        return 0.0
    best = np.inf
    for this, other in ((0, 1), (1, 0)):
        local = (points[this] - pair[other, :3]) @ turn[other]
        outside = np.maximum(np.abs(local) - pair[other, 3:6] / 2, 0.0)
        best = min(best, float(np.linalg.norm(outside, axis=1).min()))
    first, second = np.array(EDGES).T
    p = points[0][first][:, None]
    q = points[1][first][None]
    u = points[0][second][:, None] - p
    v = points[1][second][None] - q
    return min(best, float(_segment_distance(p, u, q, v).min()))


def _number(value: float) -> float:
    rounded = round(float(value), 2)
    return 0.0 if rounded == 0 else rounded  # never "-0.0"


def format_boxes(boxes: Any, labels: list[str]) -> str:
    """VST's answer text for boxes (N, 9) in the camera frame, metres and degrees.

    A fenced JSON list: one compact object a line after a tab, numbers with 2 decimals, angles divided by 180.

    Raises:
        ValueError: len(labels) != len(boxes).
    """
    b = _as_boxes(boxes)
    if len(b) != len(labels):
        raise ValueError(f"format_boxes: {len(b)} boxes but {len(labels)} labels")
    wrapped = (b[:, 6:9] + 180) % 360 - 180
    rows = np.concatenate([b[:, :6], wrapped / 180], axis=1)
    lines = [
        "\t"
        + json.dumps({"bbox_3d": [_number(x) for x in row], "label": label}, separators=(",", ":"), ensure_ascii=False)
        for row, label in zip(rows, labels, strict=True)
    ]
    return "```json\n[\n" + ",\n".join(lines) + "\n]\n```"


_TAG = re.compile(r"<3dbbox>(.*?)</3dbbox>", re.DOTALL)


def parse_boxes(text: str) -> tuple[np.ndarray, list[str]]:
    """Boxes (N, 9) in metres and degrees, and their labels, from an answer in VST's form. Never raises.

    Reads the first fenced block opened by a line "```json", or, in answers of older models, `<3dbbox>` tags (label "").
    Drops entries whose box is not nine finite numbers. Any other error in the text gives no boxes.
    """
    empty = np.zeros((0, 9))
    lines = text.split("\n")
    boxes: list[list[float]] = []
    labels: list[str] = []
    starts = [k for k, line in enumerate(lines) if line.strip() == "```json"]
    if starts:
        body = "\n".join(lines[starts[0] + 1 :]).split("```")[0]
        try:
            entries = jsonl.loads(body)
        except (ValueError, RecursionError):
            return empty, []
        if not isinstance(entries, list):
            return empty, []
        for entry in entries:
            if isinstance(entry, dict) and _is_box(entry.get("bbox_3d")):
                boxes.append(entry["bbox_3d"])
                labels.append(str(entry.get("label", "")))
    else:
        for match in _TAG.finditer(text):
            try:
                numbers = [float(x) for x in re.split(r"[,\s]+", match[1].strip(" []\n\t"))]
            except ValueError:
                continue
            if _is_box(numbers):
                boxes.append(numbers)
                labels.append("")
    if not boxes:
        return empty, []
    array = np.array(boxes, dtype=np.float64)
    array[:, 6:9] *= 180
    return array, labels


_NUMBERS = frozenset((int, float))  # the types that JSON and float() return; excludes bool


def _is_box(numbers: Any) -> bool:
    return (
        isinstance(numbers, list)
        and len(numbers) == 9
        and _NUMBERS.issuperset(map(type, numbers))
        and all(-1e6 < x < 1e6 for x in numbers)
    )
