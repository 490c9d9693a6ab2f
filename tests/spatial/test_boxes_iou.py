"""Exact IoU of 10,000 pairs against half-space intersection (SciPy) and Monte Carlo: random, touching, contained,
identical, degenerate, thin and coplanar ones."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog
from scipy.spatial import ConvexHull, HalfspaceIntersection
from scipy.spatial.transform import Rotation

from fastvst.spatial.boxes import iou_3d, iou_3d_sets

COUNTS = {
    "random": 4000,
    "touching": 1000,
    "contained": 1000,
    "identical": 1000,
    "degenerate": 500,
    "thin": 1500,
    "coplanar": 1000,
}


def axes(boxes: np.ndarray) -> np.ndarray:
    """(N, 3, 3) local axes as columns, by SciPy."""
    return Rotation.from_euler("xyz", boxes[:, 6:9], degrees=True).as_matrix()


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.concatenate(
        [rng.normal(size=(count, 3)) * 0.7, rng.uniform(0.1, 3, (count, 3)), rng.uniform(-180, 180, (count, 3))], 1
    )


def shifted(boxes: np.ndarray, local: np.ndarray) -> np.ndarray:
    """Moved by `local` (N, 3) metres along each box's own axes."""
    moved = boxes.copy()
    moved[:, :3] += np.einsum("nij,nj->ni", axes(boxes), local)
    return moved


def pairs(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    a = random_boxes(rng, COUNTS[kind])
    n = COUNTS[kind]
    sizes = a[:, 3:6]
    if kind == "touching":  # next to each other along one axis, sharing a face, a part of it, or an edge
        local = rng.choice([0.0, 0.5, 1.0], (n, 3)) * sizes
        which = rng.integers(0, 3, n)
        local[np.arange(n), which] = sizes[np.arange(n), which]
        return a, shifted(a, local)
    if kind == "contained":  # any rotation, inside the sphere that fits into a
        b = a.copy()
        radius = sizes.min(1) / 2
        b[:, 3:6] = rng.uniform(0.1, 1, (n, 3))
        b[:, 3:6] *= (0.9 * radius / (np.linalg.norm(b[:, 3:6], axis=1) / 2))[:, None]
        b[:, 6:9] = rng.uniform(-180, 180, (n, 3))
        return a, b
    if kind == "identical":
        return a, a.copy()
    if kind == "degenerate":  # no thickness, or not finite
        b = random_boxes(rng, n)
        b[np.arange(n), 3 + rng.integers(0, 3, n)] = rng.choice([0.0, 1e-9, np.nan, np.inf], n)
        return a, b
    if kind == "thin":
        b = random_boxes(rng, n)
        b[:, :3] = a[:, :3] + rng.normal(size=(n, 3)) * 0.2
        b[np.arange(n), 3 + rng.integers(0, 3, n)] = 10 ** rng.uniform(-4, -2, n)
        a[::2, 3] = 10 ** rng.uniform(-4, -2, len(a[::2]))
        return a, b
    if kind == "coplanar":  # the same rotation, faces shared inside one another
        scale = rng.choice([0.5, 1.0], (n, 3))
        b = shifted(a, rng.choice([-1, 1], (n, 3)) * (1 - scale) / 2 * sizes)
        b[:, 3:6] = sizes * scale
        return a, b
    return a, random_boxes(rng, n)


def halfspace_volume(a: np.ndarray, b: np.ndarray, turn_a: np.ndarray, turn_b: np.ndarray) -> float:
    normals = np.concatenate([turn_a.T, -turn_a.T, turn_b.T, -turn_b.T])
    offsets = np.concatenate([np.tile(x[3:6] / 2, 2) for x in (a, b)])
    offsets += normals @ a[:3] - np.concatenate([np.zeros(6), normals[6:] @ (a[:3] - b[:3])])
    centre = linprog(
        [0, 0, 0, -1],
        A_ub=np.c_[normals, np.ones(12)],
        b_ub=offsets,
        bounds=[(None, None)] * 3 + [(0, None)],
        method="highs",
    )
    if centre.status != 0 or centre.x[3] < 1e-9:
        return 0.0
    # Relative to the inner point and its distance from the faces, because the tolerances of Qhull are absolute.
    size = centre.x[3]
    room = (offsets - normals @ centre.x[:3]) / size
    return ConvexHull(HalfspaceIntersection(np.c_[normals, -room], np.zeros(3)).intersections).volume * size**3


def expected_iou(kind: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    size_a = a[:, 3:6].prod(1)
    size_b = b[:, 3:6].prod(1)
    if kind == "identical":
        return np.ones(len(a))
    if kind in ("touching", "degenerate"):
        return np.zeros(len(a))
    if kind == "contained":
        return size_b / size_a
    if kind == "coplanar":
        return size_b / size_a
    volumes = np.array([halfspace_volume(*each) for each in zip(a, b, axes(a), axes(b), strict=True)])
    return volumes / (size_a + size_b - volumes)


@pytest.mark.slow
@pytest.mark.parametrize("kind", COUNTS)
def test_ten_thousand_pairs(kind: str) -> None:
    a, b = pairs(kind, np.random.default_rng(len(kind)))
    each = list(zip(a[:, None], b[:, None], strict=True))
    got = np.concatenate(iou_3d_sets(each)).ravel()
    np.testing.assert_allclose(got, expected_iou(kind, a, b), rtol=0, atol=1e-9)
    back = np.concatenate(iou_3d_sets([(y, x) for x, y in each])).ravel()
    np.testing.assert_allclose(got, back, rtol=0, atol=1e-9)


@pytest.mark.slow
def test_monte_carlo_within_its_error() -> None:
    rng = np.random.default_rng(5)
    a, b = (np.concatenate(side) for side in zip(*(pairs(k, rng) for k in ("random", "contained")), strict=True))
    chosen = rng.permutation(len(a))[:300]
    a = a[chosen]
    b = b[chosen]
    count = 20_000
    got = np.concatenate(iou_3d_sets(list(zip(a[:, None], b[:, None], strict=True)))).ravel()
    strays = 0.0
    for x, y, turn_x, turn_y, iou in zip(a, b, axes(a), axes(b), got, strict=True):
        points = (rng.random((count, 3)) - 0.5) * x[3:6] @ turn_x.T + x[:3]
        share = float((np.abs((points - y[:3]) @ turn_y) <= y[3:6] / 2).all(1).mean())
        volume = x[3:6].prod() + y[3:6].prod()
        inside = iou * volume / (1 + iou) / x[3:6].prod()  # exact share of the points of a that are inside b
        error = np.sqrt(max(inside * (1 - inside), 1e-6) / count)
        assert abs(share - inside) < 5 * error + 1e-9
        strays += abs(share - inside) > 2 * error
    assert strays < 0.12 * len(a)  # 5 % expected


def test_iou_of_sets_equals_iou_of_each_set() -> None:
    rng = np.random.default_rng(0)
    sets = [(random_boxes(rng, i), random_boxes(rng, j)) for i, j in ((3, 2), (0, 4), (5, 0), (0, 0), (1, 1), (7, 9))]
    for one, (a, b) in zip(iou_3d_sets(sets), sets, strict=True):
        assert one.shape == (len(a), len(b))
        np.testing.assert_array_equal(one, iou_3d(a, b))
    assert iou_3d_sets([]) == []
