"""2D boxes against torchvision's IoU formula in float64, and against pairs made by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvst.evaluate.boxes_2d import as_json, boxes_2d, f1, in_source_pixels, iou

box = st.tuples(*[st.floats(-100, 100, allow_nan=False)] * 4)


@given(box, box)
def test_iou_is_that_of_the_counted_area(a, b):
    """Area of union = area of both - shared, on a grid that both boxes' corners span."""
    xs = np.unique([a[0], a[2], b[0], b[2]])
    ys = np.unique([a[1], a[3], b[1], b[3]])
    x, y = np.meshgrid((xs[1:] + xs[:-1]) / 2, (ys[1:] + ys[:-1]) / 2)
    area = np.outer(np.diff(ys), np.diff(xs))

    def inside(c):
        return (x > min(c[0], c[2])) & (x < max(c[0], c[2])) & (y > min(c[1], c[3])) & (y < max(c[1], c[3]))

    union = area[inside(a) | inside(b)].sum()
    wanted = area[inside(a) & inside(b)].sum() / union if union > 1e-6 else None
    assert 0 <= iou(a, b) <= 1
    assert wanted is None or iou(a, b) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ('[{"bbox_2d": [1, 2, 3, 4], "label": "a"}]', 1),
        ('```json\n[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [1, 2]}, 7]\n```', 1),
        ('{"bbox_2d": [1, 2, 3, 4], "label": "a"}', 1),
        ("The chair is at [1, 2, 3, 4].", 1),
        ("[[1, 2, 3, 4], [5, 6, 7, 8]]", 2),
        ('{"bbox": [1.5, 2, 3, 4]}', 1),
        ("no boxes here [x", 0),
        ("", 0),
        ("[]", 0),
        ('[{"bbox_2d": [1, 2, 3, true]}]', 0),
        ('[{"bbox_2d": [1, 2, 3, 1e9]}]', 0),
        ('[{"bbox_2d": [1, 2, 3, NaN]}]', 0),
        ("[" * 100_000, 0),
    ],
)
def test_what_a_box_is(text, count):
    assert len(boxes_2d(text)) == count


def test_f1():
    a = ((0.0, 0.0, 10.0, 10.0), "Office_Chair")
    b = ((20.0, 0.0, 30.0, 10.0), "table")
    assert f1([a, b], [b, a]) == 1.0 and f1([], []) == 1.0 and f1([a], []) == f1([], [a]) == 0.0
    assert f1([a], [a, b]) == pytest.approx(2 / 3) and f1([a, a], [a]) == pytest.approx(2 / 3)
    assert f1([(a[0], "office chair")], [a]) == 1.0 and f1([(a[0], "")], [a]) == 1.0
    assert f1([(a[0], "table")], [a]) == 0.0
    assert f1([((0.0, 0.0, 10.0, 4.9), "")], [a]) == 0.0 and f1([((0.0, 0.0, 10.0, 5.0), "")], [a]) == 1.0


def test_pixels_of_the_user_s_image():
    found = in_source_pixels(boxes_2d('[{"bbox_2d": [100, 200, 300, 400], "label": "x"}]'), (420, 560), (1680, 2240))
    assert json.loads(json.dumps(as_json(found))) == [{"bbox_2d": [400.0, 800.0, 1200.0, 1600.0], "label": "x"}]
