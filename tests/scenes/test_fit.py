"""Scans without masks: other poses, axes, units, sides of the files are refused by name, right files are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastvst.generate.scans import ScansConfig, make_scan_rows, read_scenes
from fastvst.scenes.adapters.box_pixels import ids_from_boxes
from fastvst.scenes.adapters.checks import up_problem
from fastvst.scenes.adapters.colmap import read_nerfstudio
from fastvst.scenes.adapters.fit import score
from fastvst.scenes.adapters.frames import ScanOptions
from fastvst.scenes.adapters.images import LateImageError, stored_image
from fastvst.scenes.adapters.scannet import read_scannet
from fastvst.scenes.scene import Scene
from fastvst.spatial.boxes import rotations
from fastvst.spatial.camera import unproject
from scans import shots, to_world, write_nerfstudio, write_scannet

FEW = ScanOptions(frames=8, stills=2, pairs=2, motions=0)
OPENGL = np.diag([1.0, -1, -1, 1])
Y_UP = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
POSES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "the other axes of the camera": lambda m: m @ OPENGL,
    "the inverse poses": np.linalg.inv,
    "Y up in the world of the poses": lambda m: Y_UP @ m,
    "0.01 m for a unit of the poses": lambda m: np.block([[m[:3, :3], 100 * m[:3, 3:]], [m[3:]]]),
}
DEPTHS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "depth multiplied by 10": lambda d: d // 10,
    "depth maps mirrored": lambda d: d[:, ::-1],
}
BOXES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "boxes mirrored in X": lambda b: {**b, "center": [-b["center"][0], *b["center"][1:]], "heading": -b["heading"]},
}


def changed(room: Scene, folder: Path, said: str) -> Path:
    """The room as a nerfstudio scan whose files have another convention."""
    write_nerfstudio(room, folder)
    if said in POSES:
        described = json.loads((folder / "transforms.json").read_text())
        for frame in described["frames"]:
            frame["transform_matrix"] = POSES[said](np.array(frame["transform_matrix"])).tolist()
        (folder / "transforms.json").write_text(json.dumps(described))
    elif said in DEPTHS:
        for path in (folder / "depth").glob("*.png"):
            with Image.open(path) as opened:
                stored = np.asarray(opened)
            Image.fromarray(np.ascontiguousarray(DEPTHS[said](stored))).save(path)
    else:
        described = json.loads((folder / "boxes.json").read_text())
        described["instances"] = [BOXES[said](box) for box in described["instances"]]
        (folder / "boxes.json").write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize("said", [*POSES, *DEPTHS, *BOXES])
def test_another_convention_is_refused_and_named(walked: list[Scene], tmp_path: Path, said: str) -> None:
    with pytest.raises(ValueError, match=f"it would fit .* with .*{said}"):
        read_nerfstudio(changed(walked[1], tmp_path / "scan", said), FEW)


def test_what_no_reading_explains_is_refused(walked: list[Scene], tmp_path: Path) -> None:
    folder = write_nerfstudio(walked[1], tmp_path / "scan")
    described = json.loads((folder / "transforms.json").read_text())
    matrices = [frame["transform_matrix"] for frame in described["frames"]]
    for k, frame in enumerate(described["frames"]):  # the poses of other frames
        frame["transform_matrix"] = matrices[(k + len(matrices) // 2) % len(matrices)]
    (folder / "transforms.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="expected 50% or more. .* were tried"):
        read_nerfstudio(folder, FEW)


def test_depth_that_is_no_depth_of_the_image_is_named(walked: list[Scene], tmp_path: Path) -> None:
    folder = write_nerfstudio(walked[1], tmp_path / "scan")
    whole = read_nerfstudio(folder, FEW)
    first, second, third, *_ = (folder / "depth" / f"frame_{k:06d}.png" for k in range(len(shots(walked[1]))))
    with Image.open(first) as opened:
        stored = np.asarray(opened)
    Image.fromarray(np.full_like(stored, 65535)).save(first)
    last = folder / "depth" / f"frame_{len(shots(walked[1])) - 1:06d}.png"
    Image.fromarray(np.ascontiguousarray(np.rot90(stored))).save(last)
    heard: list[str] = []
    scene = read_nerfstudio(folder, FEW, report=heard.append)
    assert len(scene.walk) == len(whole.walk) - 2 and len(heard) == 2
    assert "no pixel has a measured depth" in heard[0] and "turned by 90 degrees" in heard[1]


def test_a_box_with_nothing_in_it_is_never_asked_about(walked: list[Scene], tmp_path: Path) -> None:
    folder = write_nerfstudio(walked[1], tmp_path / "scan")
    described = json.loads((folder / "boxes.json").read_text())
    seen = [shots(walked[1])[k] for k in (0, -1)]
    view = max(seen, key=lambda view: float(view.depth[100:140, 140:180].min()))
    place = view.camera.position + 0.5 * float(view.depth[100:140, 140:180].min()) * view.camera.rotation[2]
    ghost = {"id": 99, "label": "ghost", "center": place.tolist(), "size": [0.3, 0.3, 0.3], "heading": 0}
    described["instances"].append(ghost)
    (folder / "boxes.json").write_text(json.dumps(described))
    heard: list[str] = []
    scene = read_nerfstudio(folder, FEW, report=heard.append)
    assert any("99 (ghost)" in line and "no question is about it" in line for line in heard), heard
    assert 99 in {item.id for item in scene.ignored}


def test_up_is_what_the_cameras_are_level_about(walked: list[Scene]) -> None:
    for room in walked:
        poses = [to_world(view) for view in shots(room)]
        assert up_problem(poses) is None
        portrait = np.array([[0.0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        assert up_problem([pose @ portrait for pose in poses]) is None
        assert "90 degrees from Z" in str(up_problem([Y_UP @ pose for pose in poses]))
        assert "upside down" in str(up_problem([OPENGL @ pose for pose in poses]))
        assert "straight up or down" in str(up_problem([np.linalg.inv(poses[0]) @ poses[0]] * 3))


def test_a_score_is_a_product_of_shares() -> None:
    assert score(np.array([[60.0, 40, 0], [0, 0, 0]])) == (0.6, 0.5)
    assert score(np.array([[60.0, 40, 100], [100, 0, 0]])) == (pytest.approx(0.8 * 200 / 300), 1.0)
    assert score(np.array([[100.0, 0, 0], [0, 0, 100]])) == (0.5, 0.5)
    assert score(np.array([[10.0, 0, 0]])) == (0.0, 0.0)


def test_ids_from_boxes_are_those_of_every_pixel(walked: list[Scene]) -> None:
    room = walked[1]
    for view in shots(room)[::5]:
        assert view.depth is not None
        c = view.camera
        u, v = np.meshgrid(np.arange(c.width) + 0.5, np.arange(c.height) + 0.5)
        points = unproject(c, np.stack([u, v], -1), view.depth.astype(np.float64))
        wanted = np.zeros(view.depth.shape, int)
        for item in sorted(room.objects, key=lambda item: -np.prod(item.box[3:6])):
            box = np.array(item.box)
            local = (points - box[:3]) @ rotations(box[None, 6:9])[0]
            eye = (c.position - box[:3]) @ rotations(box[None, 6:9])[0]
            half = box[3:6] / 2
            low = np.where(eye < -half, -half - 0.01, -half + np.minimum(0.02, 0.4 * half))
            high = np.where(eye > half, half + 0.01, half - np.minimum(0.02, 0.4 * half))
            if eye[1] <= half[1]:
                high[1] = half[1] - min(0.04, 0.4 * half[1])
            wanted[((local >= low) & (local <= high)).all(-1)] = item.id
        found = ids_from_boxes(c, view.depth, room.objects)
        assert (found != wanted).mean() < 1e-4 and (found > 0).mean() > 0.05  # float32 decides at the faces


def test_an_image_that_breaks_late_costs_its_frame_only(walked: list[Scene], tmp_path: Path) -> None:
    folder = write_scannet(walked[2], tmp_path / "in" / "scene0001_00", exported=True)
    count = len(shots(walked[2]))
    options = ScanOptions(frames=count)
    config = ScansConfig("scannet", ("video_order", "video_measurement"), tries=3, scan=options)
    (folder / "color" / "3.jpg").unlink()
    with Image.open(folder / "color" / "4.jpg") as opened:
        opened.save(folder / "color" / "3.png")
    data = bytearray((folder / "color" / "3.png").read_bytes())
    data[len(data) // 2] ^= 255  # a whole file by its ends, and a broken one inside
    (folder / "color" / "3.jpg").write_bytes(data)
    image = stored_image(folder / "color" / "3.jpg", 640)
    with pytest.raises(LateImageError, match=r"3\.jpg"):
        image()
    counts = make_scan_rows(tmp_path / "in", tmp_path / "rows", config, workers=0, progress=None)
    (line,) = (tmp_path / "rows.problems.jsonl").read_text().splitlines()
    assert "frame 3" in line and "left out" in line and counts["problems"] == 1
    assert counts["video_order"] + counts["video_measurement"] > 0
    heard: list[str] = []
    (scene,) = read_scenes(folder, config, heard.append)
    assert not heard and scene.views[0].image.shape == shots(walked[2])[0].image.shape
    (folder / "color" / "5.jpg").write_bytes((folder / "color" / "5.jpg").read_bytes()[:-900])  # cut: seen at once
    read_scannet(folder, options, report=heard.append)
    assert len(heard) == 1 and "frame 5" in heard[0]
