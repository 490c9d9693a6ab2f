"""Box geometry compared with SciPy: rotations, corners, exact IoU, distances; and the answer text."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, lsq_linear
from scipy.spatial import ConvexHull, HalfspaceIntersection
from scipy.spatial.transform import Rotation

from fastvst.spatial.boxes import (
    angles,
    box_distance,
    corners,
    format_boxes,
    iou_3d,
    parse_boxes,
    rotations,
    to_camera_frame,
)
from fastvst.spatial.camera import Camera, look, place, to_camera


def random_boxes(rng: np.random.Generator, count: int, spread: float = 1.0) -> np.ndarray:
    return np.concatenate(
        [rng.normal(size=(count, 3)) * spread, rng.uniform(0.1, 3, (count, 3)), rng.uniform(-180, 180, (count, 3))], 1
    )


def reference_volume(a: np.ndarray, b: np.ndarray) -> float:
    """Half-space intersection about the Chebyshev centre, from SciPy's own rotations."""
    normals = []
    offsets = []
    for box in (a, b):
        axes = Rotation.from_euler("xyz", box[6:9], degrees=True).as_matrix().T
        for axis, size in zip(axes, box[3:6], strict=True):
            for sign in (1, -1):
                normals.append(sign * axis)
                offsets.append(size / 2 + sign * axis @ box[:3])
    n = np.array(normals)
    o = np.array(offsets)
    centre = linprog(
        [0, 0, 0, -1], A_ub=np.c_[n, np.ones(12)], b_ub=o, bounds=[(None, None)] * 3 + [(0, None)], method="highs"
    )
    if centre.status != 0 or centre.x[3] < 1e-7:
        return 0.0
    return ConvexHull(HalfspaceIntersection(np.c_[n, -o], centre.x[:3]).intersections).volume


def test_rotations_and_angles_are_scipys_lower_case_xyz() -> None:
    degrees = np.random.default_rng(0).uniform(-180, 180, (200, 3))
    expected = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix()
    np.testing.assert_allclose(rotations(degrees), expected, atol=1e-12)
    np.testing.assert_allclose(rotations(angles(expected)), expected, atol=1e-9)


@pytest.mark.parametrize("lock", [90.0, -90.0])
def test_angles_when_locked(lock: float) -> None:
    matrix = Rotation.from_euler("xyz", [[25, lock, -40]], degrees=True).as_matrix()
    np.testing.assert_allclose(rotations(angles(matrix)), matrix, atol=1e-7)


def test_corner_order() -> None:
    box = np.array([[1.0, 2.0, 3.0, 2.0, 4.0, 6.0, 0.0, 0.0, 0.0]])
    expected = [[0, 0, 0], [2, 0, 0], [2, 4, 0], [0, 4, 0], [0, 0, 6], [2, 0, 6], [2, 4, 6], [0, 4, 6]]
    np.testing.assert_allclose(corners(box)[0], expected)
    turned = np.array([[0, 0, 0, 2, 4, 6, 10.0, 20.0, 30.0]])
    local = (np.array(expected) - [1, 2, 3]) @ Rotation.from_euler("xyz", [10, 20, 30], degrees=True).as_matrix().T
    np.testing.assert_allclose(corners(turned)[0], local, atol=1e-12)
    assert corners(np.zeros((0, 9))).shape == (0, 8, 3)
    with pytest.raises(ValueError, match="boxes must be"):
        corners(np.zeros((2, 7)))


def test_to_camera_frame_moves_the_corners() -> None:
    camera = place(Camera(64, 48, 50, 50, 32, 24, np.eye(3), np.zeros(3)), np.array([1.0, 2, 1.5]), look(35, -20, 3))
    boxes = random_boxes(np.random.default_rng(1), 50)
    np.testing.assert_allclose(corners(to_camera_frame(boxes, camera)), to_camera(camera, corners(boxes)), atol=1e-9)


def test_iou_against_halfspace_intersection() -> None:
    rng = np.random.default_rng(2)
    a = random_boxes(rng, 500, 0.7)
    b = random_boxes(rng, 500, 0.7)
    volumes = np.array([reference_volume(x, y) for x, y in zip(a, b, strict=True)])
    size_a = a[:, 3:6].prod(1)
    size_b = b[:, 3:6].prod(1)
    expected = volumes / (size_a + size_b - volumes)
    assert 0.3 < (expected > 0).mean() < 1.0
    got = np.array([iou_3d(x[None], y[None])[0, 0] for x, y in zip(a, b, strict=True)])
    np.testing.assert_allclose(got, expected, atol=1e-9)
    matrix = iou_3d(a[:40], b[:30])
    assert matrix.shape == (40, 30)
    np.testing.assert_allclose(matrix.diagonal(), expected[:30], atol=1e-9)
    np.testing.assert_allclose(matrix, iou_3d(b[:30], a[:40]).T, atol=1e-9)


def moved(box: np.ndarray, local_shift: list[float], scale: float = 1.0) -> np.ndarray:
    """The box, shifted along its own axes by multiples of its sides, and scaled."""
    result = box.copy()
    result[:3] += rotations(box[None, 6:9])[0] @ (np.array(local_shift) * box[3:6])
    result[3:6] *= scale
    return result


@pytest.mark.parametrize("seed", range(20))
def test_iou_of_coplanar_faces_in_any_pose(seed: int) -> None:
    rng = np.random.default_rng(seed)
    box = random_boxes(rng, 1, 5.0)[0]
    box[3:6] *= rng.choice([0.01, 1.0, 4.0])

    def iou(other: np.ndarray) -> float:
        return float(iou_3d(box[None], other[None])[0, 0])

    assert iou(box) == pytest.approx(1.0, abs=1e-9)
    assert iou(moved(box, [0.5, 0, 0])) == pytest.approx(1 / 3, abs=1e-9)
    assert iou(moved(box, [0, 0.5, 0.5])) == pytest.approx(1 / 7, abs=1e-9)
    assert iou(moved(box, [0, 0, 0], 0.5)) == pytest.approx(1 / 8, abs=1e-9)
    assert iou(moved(box, [0.25, -0.25, 0.25], 0.5)) == pytest.approx(
        1 / 8, abs=1e-9
    )  # in a corner: three shared faces
    assert iou(moved(box, [0, 1.0, 0])) == pytest.approx(0.0, abs=1e-9)  # touching
    assert iou(moved(box, [0, 0, 1.0001])) == 0.0
    turned = box.copy()  # the same solid, described with half a turn about its own Z
    turned[6:9] = angles(rotations(box[None, 6:9]) @ Rotation.from_euler("z", 180, degrees=True).as_matrix())[0]
    assert iou(turned) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("tilt", [1e-3, 1e-5, 1e-6, 3e-7, 1e-7, 1e-8, 1e-9, 1e-13])
def test_iou_of_nearly_equal_boxes(tilt: float) -> None:
    box = np.array([[0.3, -0.2, 4.0, 1.0, 2.0, 0.5, 20.0, 30.0, 5.0]])
    other = box.copy()
    other[:, 6:9] += tilt
    assert iou_3d(box, other)[0, 0] == pytest.approx(1.0, abs=max(1e-7, 0.1 * tilt))


def test_iou_of_degenerate_and_far_boxes_is_zero() -> None:
    box = np.array([[0, 0, 0, 1, 1, 1, 0, 0, 0.0]])
    bad = np.array(
        [
            [0, 0, 0, 0, 1, 1, 0, 0, 0],
            [0, 0, 0, 1, -1, 1, 0, 0, 0],
            [0, 0, np.nan, 1, 1, 1, 0, 0, 0],
            [0, 0, 0, 1, 1, np.inf, 0, 0, 0],
            [50, 0, 0, 1, 1, 1, 0, 0, 0],
        ]
    )
    assert (iou_3d(box, bad) == 0).all()
    assert iou_3d(box, np.zeros((0, 9))).shape == (1, 0)
    assert iou_3d(bad, bad)[0, 0] == 0


def test_box_distance_against_least_squares() -> None:
    rng = np.random.default_rng(3)
    for a, b in zip(random_boxes(rng, 150, 2.0), random_boxes(rng, 150, 2.0), strict=True):
        matrix = np.c_[rotations(a[None, 6:9])[0], -rotations(b[None, 6:9])[0]]
        half = np.r_[a[3:6], b[3:6]] / 2
        nearest = lsq_linear(matrix, b[:3] - a[:3], bounds=(-half, half), tol=1e-14)
        assert box_distance(a, b) == pytest.approx(np.sqrt(2 * nearest.cost), abs=1e-6)


def test_box_distance_of_parallel_and_crossing_boxes() -> None:
    a = np.array([0, 0, 0, 1, 1, 1, 0, 0, 0.0])
    assert box_distance(a, [3, 0, 0, 1, 1, 1, 0, 0, 0]) == pytest.approx(2.0)
    assert box_distance(a, [3, 4, 0, 1, 1, 1, 0, 0, 0]) == pytest.approx(np.hypot(2, 3))
    assert (
        box_distance(a, [0, 0, 0, 9, 0.1, 0.1, 0, 0, 0]) == 0
    )  # a rod through the box: no corner of one is inside the other
    assert box_distance(a, [1, 0, 0, 1, 1, 1, 0, 0, 0]) == 0


def test_answer_text_form() -> None:
    text = format_boxes([[0.337, -0.001, 2.0, 1, 0.5, 0.256, 113.4, -180, 0]], ["night stand"])
    assert text == '```json\n[\n\t{"bbox_3d":[0.34,0.0,2.0,1.0,0.5,0.26,0.63,-1.0,0.0],"label":"night stand"}\n]\n```'
    two = format_boxes(random_boxes(np.random.default_rng(4), 2), ["a", "b"]).split("\n")
    assert two[2].endswith("},") and two[3].startswith("\t{") and two[-2:] == ["]", "```"]
    assert json.loads("\n".join(two[1:-1]))[1]["label"] == "b"
    with pytest.raises(ValueError, match="1 boxes but 2 labels"):
        format_boxes([[0] * 9], ["a", "b"])


@given(st.lists(st.lists(st.floats(-50, 50), min_size=9, max_size=9), max_size=5))
def test_format_then_parse(rows: list[list[float]]) -> None:
    boxes = np.array(rows).reshape(-1, 9)
    parsed, labels = parse_boxes("Sure.\n" + format_boxes(boxes, ["x"] * len(rows)) + "\nDone.")
    assert labels == ["x"] * len(rows)
    np.testing.assert_allclose(parsed[:, :6], boxes[:, :6], atol=0.0051)
    np.testing.assert_allclose(parsed[:, 6:], boxes[:, 6:], atol=0.91)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no boxes",
        "```json\n[",
        "```json\n{}\n```",
        "```json\n[1, 2]\n```",
        '```json\n[{"label": "x"}]\n```',
        '```json\n[{"bbox_3d": [1, 2], "label": "x"}]\n```',
        '```json\n[{"bbox_3d": "abc", "label": "x"}]\n```',
        '```json\n[{"bbox_3d": [1,1,1,1,1,1,1,1,NaN], "label": "x"}]\n```',
        "<3dbbox>1 2 three</3dbbox>",
        "```json\n" + "[" * 100000,
    ],
)
def test_parse_of_broken_text_is_empty(text: str) -> None:
    boxes, labels = parse_boxes(text)
    assert boxes.shape == (0, 9) and labels == []


def test_parse_keeps_the_good_entries_and_reads_tags() -> None:
    text = '```json\n[{"bbox_3d":[1,2,3,4,5,6,0.5,0,-0.5],"label":"a"},{"bbox_3d":[1],"label":"b"}]\n```'
    boxes, labels = parse_boxes(text)
    assert labels == ["a"]
    np.testing.assert_allclose(boxes, [[1, 2, 3, 4, 5, 6, 90, 0, -90]])
    boxes, labels = parse_boxes("<3dbbox>1, 2, 3, 4, 5, 6, 0.1, 0, 0</3dbbox> and <3dbbox>1 2 3 4 5 6 0 0 0</3dbbox>")
    assert len(boxes) == 2 and labels == ["", ""] and boxes[0, 6] == pytest.approx(18)


@settings(max_examples=50)
@given(st.text(max_size=200))
def test_parse_never_raises(text: str) -> None:
    parse_boxes("```json\n" + text)
