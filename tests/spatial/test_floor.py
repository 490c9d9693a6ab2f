"""Plan geometry compared with SciPy and shapely."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import ConvexHull
from shapely import LineString, Point, Polygon

from fastvst.spatial import floor
from fastvst.spatial.boxes import corners


def test_footprints_are_convex_hulls_and_segments_meet_them() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        box = [*rng.uniform(-3, 3, 3), *rng.uniform(0.1, 2, 3), *rng.uniform(-180, 180, 3)]
        found = floor.footprint(box)
        points = corners([box])[0][:, :2]
        assert (
            Polygon(found).equals_exact(Polygon(points[ConvexHull(points).vertices]), 1e-6, normalize=True)
            or abs(Polygon(found).symmetric_difference(Polygon(points[ConvexHull(points).vertices])).area) < 1e-8
        )
        assert Polygon(found).exterior.is_ccw and floor.area(found) == pytest.approx(Polygon(found).area)
        a, b = rng.uniform(-4, 4, (2, 2))
        line = LineString([a, b])
        if abs(line.distance(Polygon(found))) > 1e-6 or line.intersection(Polygon(found)).length > 1e-6:
            assert floor.meets(a, b, found) == line.intersects(Polygon(found))
        assert (
            floor.crosses_outline(a, b, found) == line.intersects(Polygon(found).exterior)
            or line.distance(Point(found[0])) < 1e-6
        )
    upright = floor.footprint((1, 2, 0.5, 2, 1, 1, -90, 0, 30))
    assert len(upright) == 4 and floor.height_range((1, 2, 0.5, 2, 1, 1, -90, 0, 30)) == pytest.approx((0.0, 1.0))
