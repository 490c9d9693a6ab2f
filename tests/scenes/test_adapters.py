"""Adapters: a rendered room written as Omni3D JSON or as a posed scan is read back with the same geometry."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from fastvst.data import open_source
from fastvst.generate.presets import ALL_TASKS
from fastvst.generate.rooms import RoomsConfig
from fastvst.generate.scans import write_scenes
from fastvst.scenes.adapters.omni3d import read_omni3d
from fastvst.scenes.adapters.posed import read_posed
from fastvst.scenes.scene import Scene
from fastvst.spatial.boxes import corners, iou_3d, parse_boxes
from fastvst.tasks import PAIRS, SINGLE, WALKS
from scans import write_omni3d, write_scan
from scene_truth import Truth


def test_omni3d_boxes_have_omni3ds_corners(walked: list[Scene], tmp_path: Path) -> None:
    file = write_omni3d(walked[0], tmp_path)
    cuboids = np.load(tmp_path / "cuboids.npz")
    data = json.loads(file.read_text())
    scenes = {s.name: s for s in read_omni3d(file, tmp_path, source="sunrgbd")}
    assert len(scenes) == len(walked[0].stills())
    for name, scene in scenes.items():
        number = int(name.removeprefix("sunrgbd-"))
        entries = [a for a in data["annotations"] if a["image_id"] == number and not a["behind_camera"]]
        for item, entry in zip(scene.objects, entries, strict=True):
            np.testing.assert_allclose(corners([item.box])[0], cuboids[str(entry["id"])], atol=1e-9)
            assert item.name == entry["category_name"]
        dots = {s.object_id: s for s in scene.views[0].sightings}
        for i, s in dots.items():
            assert s.depth == pytest.approx(scene.object(i).box[2])
    assert list(read_omni3d(file, tmp_path, exclude=[str(n) for n in walked[0].stills()])) == []


def test_omni3d_rows(walked: list[Scene], tmp_path: Path) -> None:
    file = write_omni3d(walked[1], tmp_path)
    config = RoomsConfig(rows=dict.fromkeys(SINGLE, 3.0))
    count = write_scenes(read_omni3d(file, tmp_path), tmp_path / "rows", config)
    samples = list(open_source(tmp_path / "rows"))
    tasks = Counter(s.metadata["task"] for s in samples)
    assert count == len(samples) >= 12 and {"detection_3d", "depth_comparison", "measurement", "grounding_3d"} <= set(
        tasks
    )
    assert all(s.source == "omni3d" for s in samples)
    for s in samples:
        if s.kind == "bbox_3d":
            boxes, _ = parse_boxes(s.messages[-1]["content"][0]["text"])
            truth = np.array([v["bbox_3d"] for v in s.answer["value"]])
            assert iou_3d(boxes, truth).diagonal().min() > 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"center_cam": [0, float("nan"), 2]}, "finite numbers"),
        ({"R_cam": [[-1, 0, 0], [0, 1, 0], [0, 0, 1]]}, "mirrored"),
        ({"category_name": " "}, "expected a class name"),
        ({"dimensions": None}, "no usable 3D box"),
        ({"R_cam": [[1]]}, "no usable 3D box"),
    ],
)
def test_bad_omni3d_is_named(walked: list[Scene], tmp_path: Path, change: dict, message: str) -> None:
    file = write_omni3d(walked[0], tmp_path)
    data = json.loads(file.read_text())
    data["annotations"][0] |= change
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"annotation 0.*{message}"):
        list(read_omni3d(file, tmp_path))
    with pytest.raises(FileNotFoundError, match="set image_folder"):
        list(read_omni3d(file, tmp_path / "elsewhere"))
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ValueError, match="expected Omni3D JSON"):
        list(read_omni3d(tmp_path / "x.json", tmp_path))


def test_a_scan_gives_back_the_room(walked: list[Scene], tmp_path: Path) -> None:
    scene = walked[2]
    found = read_posed(write_scan(scene, tmp_path / "scene0001_00"), frames=20, stills=3)
    assert found.name == "scene0001_00" and len(found.walk) == 20 and len(found.stills()) == 3 and found.pairs
    assert all(kind == "wide" for _, _, kind in found.pairs)
    for k, v in zip(found.walk, scene.walk, strict=True):
        ours = found.views[k]
        theirs = scene.views[v]
        np.testing.assert_allclose(ours.camera.rotation, theirs.camera.rotation, atol=1e-9)
        np.testing.assert_allclose(ours.camera.position, theirs.camera.position, atol=1e-9)
        assert np.abs(ours.depth - theirs.depth).max() < 0.00051 and (ours.ids == theirs.ids).all()
        assert {s.object_id for s in ours.sightings} == {s.object_id for s in theirs.sightings}
    for item in found.objects:
        np.testing.assert_allclose(corners([item.box]), corners([scene.object(item.id).box]), atol=1e-9)


@pytest.mark.slow
def test_scan_rows_of_all_tasks_hold(walked: list[Scene], tmp_path: Path) -> None:
    from dataclasses import replace

    scans = [read_posed(write_scan(s, tmp_path / f"scene{k}"), stills=4) for k, s in enumerate(walked[:3])]
    config = replace(ALL_TASKS, rows=dict.fromkeys([*SINGLE, *PAIRS, *WALKS], 3.0))
    count = write_scenes(scans, tmp_path / "rows", config)
    assert sum(pq.read_table(f).num_rows for f in (tmp_path / "rows").glob("*.parquet")) == count
    tasks = Counter(s.metadata["task"] for s in open_source(tmp_path / "rows"))
    assert set(tasks) >= {*SINGLE, *PAIRS, *WALKS} - {"camera_motion", "video_route", "video_counting"}, tasks
    truths = [Truth(s) for s in walked[:3]]
    for sample in open_source(tmp_path / "rows"):
        truth = truths[int(sample.metadata["scene"].removeprefix("scene"))]
        if sample.metadata["task"] == "video_object_object" and sample.metadata["form"] == "distance":
            said = float(sample.messages[-1]["content"][0]["text"])
            assert abs(truth.gap(*sample.metadata["objects"]) - said) < 0.0501


def test_what_is_missing_in_a_scan_is_named(walked: list[Scene], tmp_path: Path) -> None:
    folder = write_scan(walked[0], tmp_path / "scene")
    (folder / "depth" / "0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"depth/0\.png is missing"):
        read_posed(folder)
    (folder / "boxes.json").write_text(json.dumps({"instances": [{"id": 1, "label": "bed", "center": [0, 0, 0]}]}))
    with pytest.raises(ValueError, match="expected id, label, center, size"):
        read_posed(folder)
