"""Projection compared with explicit matrices, and worked examples of the field-of-view unification."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastvst.spatial.camera import Camera, look, place, project, to_camera, unify_fov, unproject


def make_camera(yaw: float = 30.0, pitch: float = -12.0, roll: float = 2.0) -> Camera:
    base = Camera(320, 240, 270.0, 275.0, 158.0, 121.0, np.eye(3), np.zeros(3))
    return place(base, np.array([1.0, -2.0, 1.5]), look(yaw, pitch, roll))


@pytest.mark.parametrize(
    ("width", "height", "fx", "expected"),
    [
        (730, 530, 529.5, (959, 696)),  # SUN RGB-D, Kinect v2
        (640, 480, 532.0, (837, 628)),
        (1296, 968, 1170.0, (771, 576)),  # ScanNet colour
        (1024, 768, 512 / math.tan(math.radians(30)), (804, 603)),  # Hypersim, 60 degrees
    ],
)
def test_unify_fov_worked_examples(width: int, height: int, fx: float, expected: tuple[int, int]) -> None:
    new_width, new_height, hfov, vfov = unify_fov(width, height, fx)
    assert (new_width, new_height) == expected
    assert math.tan(math.radians(hfov / 2)) == pytest.approx(width / (2 * fx))
    assert math.tan(math.radians(vfov / 2)) == pytest.approx(height / (2 * fx))


def test_unify_fov_target_is_the_kinect() -> None:
    assert 960 / (2 * math.tan(math.radians(69.16) / 2)) == pytest.approx(696.3195, abs=1e-4)
    assert unify_fov(730, 530, 529.5)[2] == pytest.approx(69.16, abs=0.01)


@given(st.integers(40, 3000), st.integers(40, 3000), st.floats(50, 4000), st.integers(100, 1500))
def test_unify_fov_gives_one_focal_length(width: int, height: int, fx: float, base: int) -> None:
    target = base / (2 * math.tan(math.radians(69.16) / 2))
    new_width, new_height, hfov, _ = unify_fov(width, height, fx, base_width=base)
    assert new_width <= width * target / fx < new_width + 1
    assert new_height <= height * target / fx < new_height + 1
    assert hfov == pytest.approx(unify_fov(width, height, fx)[2])


@pytest.mark.parametrize("bad", [(0, 10, 1.0), (10, -1, 1.0), (10, 10, 0.0), (10, 10, float("nan"))])
def test_unify_fov_rejects(bad: tuple[int, int, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        unify_fov(*bad)


def test_look_is_a_rotation_that_faces_the_right_way() -> None:
    for yaw, pitch, roll in [(0, 0, 0), (40, -20, 3), (-170, 15, -3), (90, -25, 0)]:
        r = look(yaw, pitch, roll)
        np.testing.assert_allclose(r @ r.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(r) == pytest.approx(1.0)
        assert math.degrees(math.asin(r[2, 2])) == pytest.approx(pitch)  # forward's rise above the horizon
    level = look(0, 0, 0)
    np.testing.assert_allclose(level @ np.array([0.0, 1.0, 0.0]), [0, 0, 1], atol=1e-12)  # +Y is ahead
    np.testing.assert_allclose(level @ np.array([0.0, 0.0, 1.0]), [0, -1, 0], atol=1e-12)  # up is -Y of the camera
    np.testing.assert_allclose(look(90, 0, 0)[2], [-1, 0, 0], atol=1e-12)  # yaw turns to the left


def test_project_against_the_3x4_matrix() -> None:
    camera = make_camera()
    rng = np.random.default_rng(0)
    points = camera.position + rng.normal(size=(200, 3)) * 3
    k = np.array([[camera.fx, 0, camera.cx], [0, camera.fy, camera.cy], [0, 0, 1.0]])
    homogeneous = (
        np.concatenate([points, np.ones((200, 1))], 1)
        @ (k @ np.concatenate([camera.rotation, camera.translation[:, None]], 1)).T
    )
    uv, depth = project(camera, points)
    np.testing.assert_allclose(depth, homogeneous[:, 2], atol=1e-12)
    front = depth > 0.1
    np.testing.assert_allclose(uv[front], (homogeneous[:, :2] / homogeneous[:, 2:])[front], rtol=1e-9)
    np.testing.assert_allclose(unproject(camera, uv[front], depth[front]), points[front], atol=1e-9)
    np.testing.assert_allclose(to_camera(camera, camera.position), np.zeros(3), atol=1e-12)
