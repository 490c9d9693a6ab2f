"""Marks are drawn at the requested place, in the named colour, at every image size."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fastvst.spatial import draw
from fastvst.spatial.boxes import corners


@pytest.mark.parametrize("size", [(96, 64), (320, 240), (1280, 960)])
@pytest.mark.parametrize("colour", list(draw.COLOURS))
def test_dots_scale_and_keep_their_colour(size: tuple[int, int], colour: str) -> None:
    image = Image.new("RGB", size, (90, 90, 90))
    centre = (size[0] * 0.4, size[1] * 0.6)
    draw.dot(image, centre, colour, "3")
    pixels = np.asarray(image)
    assert tuple(pixels[int(centre[1]), int(centre[0])]) == draw.COLOURS[colour]
    area = (pixels == draw.COLOURS[colour]).all(-1).sum()
    assert area >= 0.7 * np.pi * draw.radius_of(image.size) ** 2
    assert area <= 0.01 * size[0] * size[1] + 60  # a dot hides little of the image


def test_labels_stay_inside_the_image() -> None:
    for point in [(1.0, 1.0), (199.0, 149.0), (1.0, 149.0), (199.0, 1.0)]:
        image = Image.new("RGB", (200, 150), (90, 90, 90))
        draw.dot(image, point, "red", "A")
        plate = (np.asarray(image) == (20, 20, 20)).all(-1)
        assert plate.sum() > 40 and (np.asarray(image) > 200).all(-1).any()


def test_circle_leaves_its_point_visible_and_box_outlines() -> None:
    image = Image.new("RGB", (200, 150), (90, 90, 90))
    draw.circle(image, (100.0, 75.0), "cyan")
    pixels = np.asarray(image)
    assert tuple(pixels[75, 100]) == draw.COLOURS["cyan"] and tuple(pixels[75 + 3, 100]) == (90, 90, 90)
    draw.box_2d(image, (20, 30, 90, 110), "red", "x")
    pixels = np.asarray(image)
    assert tuple(pixels[30, 55]) == tuple(pixels[110, 55]) == tuple(pixels[70, 20]) == draw.COLOURS["red"]
    assert tuple(pixels[70, 55]) == (90, 90, 90)
    draw.box_2d(image, (-50, -50, -10, -10), "red")  # outside the image


def test_wireframes_pass_through_the_projected_corners() -> None:
    image = Image.new("RGB", (320, 240))
    box = np.array([[0.3, 0.1, 4.0, 1.0, 0.8, 0.6, 10.0, 30.0, 5.0]])
    result = np.asarray(draw.boxes_3d(image, box, [""], (270, 270, 160, 120), "green", width=1))
    assert np.asarray(image).max() == 0  # a copy
    for x, y, z in corners(box)[0]:
        u = round(270 * x / z + 160)
        v = round(270 * y / z + 120)
        assert result[v - 1 : v + 2, u - 1 : u + 2].max() > 0
    behind = box.copy()
    behind[0, 2] = -4.0
    assert np.asarray(draw.boxes_3d(image, behind, ["x"], (270, 270, 160, 120))).max() == 0
    crossing = np.array([[0.5, 0.5, 0.0, 1.0, 1.0, 8.0, 0, 0, 0.0]])
    assert np.asarray(draw.boxes_3d(image, crossing, ["x"], (270, 270, 160, 120))).max() > 0
