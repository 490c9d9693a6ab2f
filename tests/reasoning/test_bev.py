"""Bird's-eye view: camera 1 looks up the page, footprints are at their places, labels do not overlap."""

from __future__ import annotations

import numpy as np
import pytest

from fastvst.reasoning import bev
from fastvst.scenes.scene import Scene, SceneObject, View
from fastvst.spatial.camera import Camera, look, place


def scene(yaw: float, boxes: list[tuple[float, ...]], names: list[str] | None = None) -> Scene:
    camera = place(Camera(64, 48, 60, 60, 32, 24, np.eye(3), np.zeros(3)), np.array([2.0, 1.0, 1.5]), look(yaw, -10, 2))
    things = tuple(SceneObject(k + 1, (names or ["bed", "lamp", "desk"])[k], box) for k, box in enumerate(boxes))
    return Scene("s", things, (View(camera, np.zeros((48, 64, 3), np.uint8), ()),))


@pytest.mark.parametrize("yaw", [0.0, 37.0, 120.0, -90.0, 180.0])
def test_what_is_ahead_of_camera_one_is_above_it(yaw: float) -> None:
    camera = scene(yaw, [(0, 0, 0, 1, 1, 1, -90, 0, 0)]).views[0].camera
    flat = camera.rotation[2, :2] / np.linalg.norm(camera.rotation[2, :2])
    right = np.array([flat[1], -flat[0]])
    ahead = camera.position[:2] + 3 * flat
    aside = camera.position[:2] + 2 * flat + 2 * right
    boxes = [(*ahead, 0.5, 0.8, 1, 0.8, -90, 0, yaw), (*aside, 0.5, 0.8, 1, 0.8, -90, 0, yaw)]
    made = scene(yaw, boxes)
    origin, turn = bev.frame(made, 0)
    np.testing.assert_allclose(turn @ (ahead - origin), [0, 3], atol=1e-9)
    np.testing.assert_allclose(turn @ (aside - origin), [2, 2], atol=1e-9)
    image = np.asarray(bev.draw_bev(made, [0], 400)).astype(int)
    places = []
    for k in range(2):  # the colours of the outlines
        hue = np.array(bev.hue(k, 2))
        rows, columns = np.nonzero(np.abs(image - hue).max(-1) < 12)
        places.append((columns.mean(), rows.mean()))
    red = np.nonzero(np.abs(image - np.array(bev.CAMERAS[0])).max(-1) < 12)
    here = red[1].mean(), red[0].mean()
    assert places[0][1] < here[1] - 60 and abs(places[0][0] - here[0]) < 25  # bed: straight above
    assert places[1][0] > places[0][0] + 60 and places[1][1] > places[0][1]  # lamp: to the right, less far
    assert (image[:6] == 255).all() and (image[:, :6] == 255).all()  # nothing is cut off


def test_the_table_is_the_plan_in_words() -> None:
    made = scene(0.0, [(2.5, 4.0, 0.4, 1.2, 0.8, 2.0, -90, 0, 30)])
    assert bev.object_table(made, [0]).splitlines()[1] == "1 | bed | 1.20 x 2.00 x 0.80 | 0.50, 3.00 | 30 | -"


def test_labels_find_free_places(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image, ImageDraw

    pen = ImageDraw.Draw(Image.new("RGB", (1200, 1200)))
    drawn: list = []
    monkeypatch.setattr(pen, "rounded_rectangle", lambda box, **_: drawn.append(box))
    bev.draw_labels(pen, [(f"thing {k}", (600.0 + k, 600.0), (1, 2, 3)) for k in range(9)], 400)
    for k, a in enumerate(drawn):
        assert a[0] >= 0 and a[2] <= 1200 and a[1] >= 0 and a[3] <= 1200
        assert all(min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1]) for b in drawn[:k])


@pytest.mark.parametrize("yaw", [0.0, 37.0, 120.0, -90.0, 180.0])
def test_the_table_turns_with_the_first_camera(yaw: float) -> None:
    made = scene(yaw, [(2.5, 4.0, 0.4, 1.2, 0.8, 2.0, -90, 0, yaw + 30)])
    assert bev.object_table(made, [0]).splitlines()[1].split(" | ")[4] == "30"
