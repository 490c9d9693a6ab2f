"""COLMAP's models, text and binary, and ScanNet++'s DSLR images that come with one: hostile bytes, fisheye lenses."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastvst.scenes.adapters.checks import Convention, Problems
from fastvst.scenes.adapters.colmap import colmap_intrinsics, read_colmap_model, read_transforms
from fastvst.scenes.adapters.colmap_model import read_model
from fastvst.scenes.adapters.fisheye import Fisheye, undistorted_depth, undistorted_image
from fastvst.scenes.adapters.scannetpp_dslr import read_scannetpp_dslr
from fastvst.scenes.scene import Scene
from scans import LENS, ZOOM, fisheye_of, shots, write_colmap, write_colmap_binary, write_scannetpp_dslr
from scene_truth import Truth


def test_binary_models_are_the_text_models(walked: list[Scene], tmp_path: Path) -> None:
    text = read_model(write_colmap(walked[2], tmp_path / "text") / "sparse" / "0")
    binary = read_model(write_colmap_binary(walked[2], tmp_path / "binary") / "sparse" / "0")
    assert [item.name for item in text] == [item.name for item in binary] and len(text) == len(walked[2].walk)
    for a, b in zip(text, binary, strict=True):
        np.testing.assert_allclose(a.pose, b.pose, atol=1e-12)
        assert b.camera.model == "PINHOLE" and b.camera.params == a.camera.params[:4]


def test_damaged_binary_models_are_named(walked: list[Scene], tmp_path: Path) -> None:
    folder = write_colmap_binary(walked[2], tmp_path / "m") / "sparse" / "0"
    for name in ("cameras.bin", "images.bin"):
        whole = (folder / name).read_bytes()
        rng = np.random.default_rng(3)
        damaged = [whole[:n] for n in rng.integers(0, len(whole), 40)]
        damaged += [whole + b"\0", struct.pack("<Q", 2**63) + whole[8:], struct.pack("<Q", 2**40) + whole[8:], b""]
        for data in damaged:
            (folder / name).write_bytes(data)
            with pytest.raises(ValueError, match=name):
                read_model(folder)
        for _ in range(200):  # any bytes: a model or a ValueError, quickly and without much memory
            data = bytearray(whole)
            for place in rng.integers(0, len(whole), 3):
                data[place] = int(rng.integers(256))
            (folder / name).write_bytes(data)
            try:
                read_colmap_model(folder)
            except ValueError as error:
                assert str(folder) in str(error)
        (folder / name).write_bytes(whole)
    (folder / "images.bin").unlink()
    with pytest.raises(FileNotFoundError, match="images.bin is missing"):
        read_model(folder)


def test_damaged_text_models_are_named(tmp_path: Path) -> None:
    (tmp_path / "cameras.txt").write_text("1 PINHOLE 640 480 500 500 320 240\n")
    for line, message in (
        ("1 1 0 0 0 0 0 0 2 a.jpg", "image 'a.jpg' has camera 2; the model has .1."),
        ("1 0 0 0 0 0 0 0 1 a.jpg", "image 'a.jpg': quaternion"),
        ("1 1 0 0 0 nan 0 0 1 a.jpg", "image 'a.jpg': pose .* is not finite"),
        ("1 1 0 0 0 0 0 0", "images.txt: '1 1 0 0 0 0 0 0'"),
        ("1 one 0 0 0 0 0 0 1 a.jpg", "images.txt: '1 one"),
    ):
        (tmp_path / "images.txt").write_text(line + "\n\n")
        with pytest.raises(ValueError, match=message):
            read_model(tmp_path)
    (tmp_path / "images.txt").write_text("1 1 0 0 0 0 0 0 1 a name.jpg\n\n")
    assert read_model(tmp_path)[0].name == "a name.jpg"


def test_every_term_of_a_lens_counts() -> None:
    for bend in ([0.2, 0, 0, 0], [0, 0.3, 0, 0], [0, 0, 0.1, 0], [0, 0, 0, 0.1]):
        with pytest.raises(ValueError, match="distortion moves a corner by"):
            colmap_intrinsics("OPENCV", 640, 480, [500, 500, 320, 240, *bend])
    for bend in ([0, 0, 0, 0, 0.5, 0, 0, 0], [0, 0, 0, 0, 0, 0.3, 0, 0], [np.nan, *[0] * 7]):
        with pytest.raises(ValueError, match="distortion moves a corner by"):
            colmap_intrinsics("FULL_OPENCV", 640, 480, [500, 500, 320, 240, *bend])
    same = [0.3, 0.1, 0, 0, 0.02, 0.3, 0.1, 0.02]  # numerator and denominator are equal
    assert colmap_intrinsics("FULL_OPENCV", 640, 480, [500, 500, 320, 240, *same])[0, 0] == 500
    with pytest.raises(ValueError, match="PINHOLE has 3 parameters; expected 4"):
        colmap_intrinsics("PINHOLE", 640, 480, [500, 320, 240])


def test_a_fisheye_nerfstudio_camera_is_refused_by_name(tmp_path: Path) -> None:
    lens = {"fl_x": 500, "fl_y": 500, "cx": 320, "cy": 240, "w": 640, "h": 480}
    frame = {"file_path": "a.jpg", "transform_matrix": np.eye(4).tolist()}
    (tmp_path / "t.json").write_text(json.dumps({"camera_model": "OPENCV_FISHEYE", **lens, "frames": [frame]}))
    heard: list[str] = []
    assert read_transforms(tmp_path / "t.json", Convention(axes="opengl"), Problems(heard.append)) == []
    assert "camera model OPENCV_FISHEYE" in heard[0] and "a.jpg" in heard[0]


def test_an_undistorted_image_is_the_pinhole_image(walked: list[Scene]) -> None:
    view = shots(walked[2])[0]
    c = view.camera
    lens = Fisheye(ZOOM * c.fx, ZOOM * c.fy, c.cx, c.cy, LENS, c.width, c.height)
    truth = Truth(walked[2])
    image, depth, angle = fisheye_of(view, truth)
    matrix = lens.pinhole()
    corner = np.hypot(c.cx / matrix[0, 0], c.cy / matrix[1, 1])
    assert np.tan(angle.max()) * 0.8 < corner < np.tan(angle.max())  # nearly all of the lens, and no black border
    found = undistorted_depth(depth, lens, matrix)
    u, v = np.meshgrid(np.arange(c.width) + 0.5, np.arange(c.height) + 0.5)
    pinhole = replace(c, fx=matrix[0, 0], fy=matrix[1, 1])
    exact = truth.cast(pinhole, np.stack([u.ravel(), v.ravel()], 1))[0].reshape(u.shape)
    sure = found > 0
    assert sure.mean() > 0.85 and np.abs(found - exact)[sure].max() < 0.02  # edges are holes, not wrong depths
    columns = np.floor((np.arange(c.width) + 0.5 - c.cx) / matrix[0, 0] * c.fx + c.cx).astype(int)
    rows = np.floor((np.arange(c.height) + 0.5 - c.cy) / matrix[1, 1] * c.fy + c.cy).astype(int)
    colours = undistorted_image(image, lens, matrix).astype(int) - view.image[rows[:, None], columns]
    assert np.abs(colours).mean() < 4
    with pytest.raises(ValueError, match="holds no pinhole image"):
        Fisheye(500, 500, -10, 240, LENS, 640, 480).pinhole()


@pytest.mark.parametrize("undistorted", [False, True])
def test_dslr_images_come_back(walked: list[Scene], tmp_path: Path, undistorted: bool) -> None:
    room = walked[2]
    heard: list[str] = []
    scene = read_scannetpp_dslr(
        write_scannetpp_dslr(room, tmp_path / "scan", undistorted=undistorted), report=heard.append
    )
    assert not heard and not scene.walk and {o.id for o in scene.objects} == {o.id for o in room.objects}
    view = scene.views[0]
    theirs = shots(room)[0]
    np.testing.assert_allclose(view.camera.position, theirs.camera.position, atol=1e-6)
    if undistorted:
        assert view.camera.fx == theirs.camera.fx
        measured = view.depth > 0  # the fisheye camera sees less than the pinhole camera
        assert 0.3 < measured.mean() < 1
        assert (np.abs(view.depth - theirs.depth)[measured] < 0.02).mean() > 0.999


def test_what_a_dslr_scan_lacks_is_named(walked: list[Scene], tmp_path: Path) -> None:
    folder = write_scannetpp_dslr(walked[2], tmp_path / "scan")
    depth = folder / "dslr" / "render_depth"
    cameras = folder / "dslr" / "colmap" / "cameras.txt"
    stored = cameras.read_text()
    depth.rename(tmp_path / "aside")
    with pytest.raises(FileNotFoundError, match="render_depth is missing.*common.render"):
        read_scannetpp_dslr(folder)
    (tmp_path / "aside").rename(depth)
    cameras.write_text(stored.replace("OPENCV_FISHEYE", "OPENCV"))
    with pytest.raises(ValueError, match="camera OPENCV .*expected OPENCV_FISHEYE"):
        read_scannetpp_dslr(folder)
    cameras.write_text(stored)
    (folder / "dslr" / "nerfstudio").mkdir()
    (folder / "dslr" / "nerfstudio" / "transforms_undistorted.json").write_text('{"camera_model": "OPENCV_FISHEYE"}')
    with pytest.raises(ValueError, match="expected PINHOLE"):
        read_scannetpp_dslr(folder)
