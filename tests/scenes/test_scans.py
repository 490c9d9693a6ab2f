"""Scans as real files are: missing depth, other conventions, ignored objects, damaged entries."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from fastvst.generate.presets import ALL_TASKS
from fastvst.generate.rooms import RoomsConfig, scene_samples
from fastvst.reasoning import claims
from fastvst.scenes.adapters import checks
from fastvst.scenes.adapters.box_pixels import ids_from_boxes
from fastvst.scenes.adapters.checks import Convention
from fastvst.scenes.adapters.depth import planar_depth
from fastvst.scenes.adapters.frames import motion_pairs
from fastvst.scenes.adapters.labels import clean_label
from fastvst.scenes.adapters.omni3d import ignored, read_omni3d
from fastvst.scenes.adapters.posed import read_posed
from fastvst.scenes.rooms.render_base import Renderer
from fastvst.scenes.rooms.shoot import ShotConfig, WalkConfig, shoot
from fastvst.scenes.scene import Scene
from fastvst.spatial.floor import upright
from fastvst.tasks import PAIRS, SINGLE, WALKS
from fastvst.tasks.common import article, plural, prose
from scan_answers import wrong_answers
from scans import write_omni3d, write_scan

TRACES = ("depth_comparison", "distance", "measurement", "object_object", "correspondence", "camera_camera")


def scan_of(scene: Scene, folder: Path, share: float) -> Scene:
    """The walk of a rendered room, written with missing depth and read back; it knows the room that it comes from."""
    found = read_posed(write_scan(scene, folder, turn=0.0, share=share), stills=4)
    return replace(found, metadata={**found.metadata, "room_seed": scene.metadata["room_seed"]})


def test_missing_depth_gives_no_wrong_answer(walked: list[Scene], tmp_path: Path) -> None:
    counts, wrong = wrong_answers(scan_of(walked[2], tmp_path / "scan", 0.3), 3)
    assert not wrong, wrong[:3]
    assert sum(counts.values()) > 60 and len(counts) >= 12, counts


@pytest.mark.slow
def test_missing_depth_gives_no_wrong_answer_of_two_thousand(renderer: Renderer, tmp_path: Path) -> None:
    total: Counter = Counter()
    for number in range(10):
        scene = shoot(8100 + number, renderer, ShotConfig(views=1), WalkConfig())
        counts, wrong = wrong_answers(scan_of(scene, tmp_path / str(number), 0.3), 12)
        assert not wrong, wrong[:3]
        total += counts
    assert sum(total.values()) >= 2000, total


def test_a_dot_has_a_measured_depth(walked: list[Scene], tmp_path: Path) -> None:
    scan = scan_of(walked[1], tmp_path / "scan", 0.6)
    asked = 0
    for view in scan.views:
        for s in view.sightings:
            if s.visibility > 0:
                column, row = (int(x) for x in s.point)
                assert view.depth[row, column] == s.depth > 0.05 and s.span is None
                asked += 1
            else:
                assert s.span == (0.0, np.inf) or not scan.object(s.object_id).known
    assert asked > 30


STORED = {
    "world_to_camera": (Convention(pose="world_to_camera"), np.linalg.inv),
    "opengl": (Convention(axes="opengl"), lambda m: m @ np.diag([1, -1, -1, 1])),
    "y up": (Convention(up="y"), lambda m: np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]]) @ m),
    "centimetres": (Convention(unit=0.01), lambda m: np.block([[m[:3, :3], 100 * m[:3, 3:]], [m[3:]]])),
}


@pytest.mark.parametrize("name", STORED)
def test_another_convention_is_named_and_can_be_chosen(walked: list[Scene], tmp_path: Path, name: str) -> None:
    convention, store = STORED[name]
    folder = write_scan(walked[0], tmp_path / "scan", turn=0.0, convention=store)
    with pytest.raises(ValueError, match="measured surfaces lie in the boxes") as caught:
        read_posed(folder)
    assert str(convention) in str(caught.value)
    found = read_posed(folder, convention=convention)
    for k, v in zip(found.walk, walked[0].walk, strict=True):
        np.testing.assert_allclose(found.views[k].camera.rotation, walked[0].views[v].camera.rotation, atol=1e-9)
        np.testing.assert_allclose(found.views[k].camera.position, walked[0].views[v].camera.position, atol=1e-9)


def test_a_mirrored_world_is_refused(walked: list[Scene], tmp_path: Path) -> None:
    folder = write_scan(walked[0], tmp_path / "a", turn=0.0, convention=lambda m: np.diag([-1, 1, 1, 1]) @ m)
    with pytest.raises(ValueError, match="usable pose|mirrored"):
        read_posed(folder)
    described = json.loads((write_scan(walked[0], tmp_path / "b", turn=0.0) / "boxes.json").read_text())
    described["axis_alignment"][0] = [-x for x in described["axis_alignment"][0]]
    (tmp_path / "b" / "boxes.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="axis_alignment: mirrored"):
        read_posed(tmp_path / "b")


def test_one_bad_box_or_frame_ends_nothing_when_problems_are_reported(walked: list[Scene], tmp_path: Path) -> None:
    folder = write_scan(walked[2], tmp_path / "scan")
    whole = read_posed(folder)
    described = json.loads((folder / "boxes.json").read_text())
    first, second, third, *_ = described["instances"]
    first["center"] = [float("nan"), 0, 0]
    second["center"] = [c + 5 for c in second["center"]]
    described["instances"].append({**third, "label": "stool"})
    described["instances"].append({"id": 90, "label": "", "center": [0, 0, 0], "size": [1, 1, 1]})
    (folder / "boxes.json").write_text(json.dumps(described))
    (folder / "depth" / "3.png").write_bytes(b"no image")
    heard: list[str] = []
    scan = read_posed(folder, report=heard.append)
    for text in ("finite numbers", "of its measured surface lie", f"two boxes have the id {third['id']}", "class name"):
        assert any(text in h for h in heard), (text, heard)
    assert any("3.png" in h for h in heard)
    assert len(scan.walk) == len(whole.walk) - 1
    assert {first["id"], third["id"], second["id"]} == {o.id for o in scan.ignored}
    assert not {o.id for o in scan.ignored} & {o.id for o in scan.objects}
    rows = scene_samples(scan, 0, replace(ALL_TASKS, rows=dict.fromkeys([*SINGLE, *PAIRS, *WALKS], 4)))
    named = {first["label"], second["label"], "stool"}
    for row in rows:
        assert not {o.id for o in scan.ignored} & set(row.metadata.get("objects", []))
        assert "NaN" not in json.dumps([row.answer, row.metadata, [m["content"][-1]["text"] for m in row.messages]])
        if row.metadata["task"] in ("video_counting", "detection_3d"):
            assert not named & {row.metadata.get("name"), *row.metadata.get("classes", [])}
    with pytest.raises(ValueError, match="finite numbers"):
        read_posed(folder)


def test_an_ignored_object_counts_but_is_never_named(walked: list[Scene], tmp_path: Path) -> None:
    file = write_omni3d(walked[1], tmp_path)
    data = json.loads(file.read_text())
    before = {s.name: s for s in read_omni3d(file, tmp_path)}
    extra = []
    for entry in data["annotations"]:
        extra.append({**entry, "id": 1000 + entry["id"], "valid3D": False, "dimensions": [-1, -1, -1]})
    data["annotations"] += extra
    file.write_text(json.dumps(data))
    config = RoomsConfig(rows={"detection_3d": 4, "grounding_3d": 4, "measurement": 4, "distance": 4})
    for scene in read_omni3d(file, tmp_path):
        assert len(scene.ignored) >= len(scene.objects) == len(before[scene.name].objects)
        rows = scene_samples(scene, 0, config)
        assert not [r for r in rows if r.metadata["task"] == "detection_3d" or r.metadata.get("form") == "words"]
    assert any(scene_samples(scene, 0, config) for scene in before.values())


def test_omni3d_order_in_depth_is_that_of_the_surfaces(walked: list[Scene], tmp_path: Path) -> None:
    compared = 0
    for number, room in enumerate(walked):
        folder = tmp_path / str(number)
        folder.mkdir()
        for scene in read_omni3d(write_omni3d(room, folder), folder):
            view = room.views[int(scene.name.split("-")[-1])]
            names = {s.object_id: room.object(s.object_id).name for s in view.sightings}
            for row in scene_samples(scene, 1, RoomsConfig(rows={"depth_comparison": 30})):
                assert "point" not in str(row.answer["value"])  # without a depth map no dot is asked about
                titles = [p[3] for p in row.metadata["points"]]
                shown = [[i for i, name in names.items() if name == title] for title in titles]
                if any(len(ids) != 1 for ids in shown):
                    continue
                true = [float(np.median(view.depth[view.ids == ids[0]])) for ids in shown]
                assert list(np.argsort([p[2] for p in row.metadata["points"]])) == list(np.argsort(true)), row.metadata
                compared += 1
    assert compared > 20


def test_traces_of_omni3d_say_nothing_of_depths_that_nobody_measured(walked: list[Scene], tmp_path: Path) -> None:
    rows = []
    for number, room in enumerate(walked):
        folder = tmp_path / str(number)
        folder.mkdir()
        config = RoomsConfig(rows={f"thought_{task}": 6.0 for task in ("depth_comparison", "distance", "measurement")})
        for scene in read_omni3d(write_omni3d(room, folder), folder):
            assert scene.up is not None
            view = room.views[int(scene.name.split("-")[-1])]
            down = view.camera.rotation @ np.array([0, 0, -1.0])
            np.testing.assert_allclose(scene.up, -down, atol=1e-9)
            for row in scene_samples(scene, 2, config):
                rows.append(row)
                said = {fact["says"] for _, fact in row.metadata["claims"]}
                assert not said & {"depth", "scale"}
                for text, fact in row.metadata["claims"]:
                    if fact["says"] == "on":
                        names = [scene.object(i).name for i in fact["objects"]]
                        pairs = [(a.id, b.id) for a in room.objects for b in room.objects if [a.name, b.name] == names]
                        assert any(claims.on_top(room, a, b) for a, b in pairs), text
    assert len(rows) >= 10


def test_on_top_follows_the_scenes_up(walked: list[Scene]) -> None:
    scene = walked[0]
    pairs = [(a.id, b.id) for a in scene.objects for b in scene.objects if a is not b]
    on = [p for p in pairs if claims.on_top(scene, *p)]
    assert on and not any(claims.on_top(replace(scene, up=None), *p) for p in on)
    turned = [p for p in pairs if claims.on_top(replace(scene, up=(0.0, 1.0, 0.0)), *p)]
    assert not set(on) & set(turned)
    for up in np.random.default_rng(0).normal(size=(20, 3)):
        up = up / np.linalg.norm(up)
        matrix = upright(up)
        np.testing.assert_allclose(matrix @ up, [0, 0, 1], atol=1e-12)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(matrix) > 0


def test_omni3ds_ignore_rules() -> None:
    good = {"valid3D": True, "behind_camera": False, "dimensions": [1, 1, 1], "visibility": -1, "truncation": -1}
    assert not ignored(good) and not ignored({})
    bad = [
        {"valid3D": False},
        {"behind_camera": True},
        {"dimensions": [1, 0, 1]},
        {"lidar_pts": 0},
        {"segmentation_pts": 0},
        {"depth_error": 0.6},
        {"truncation": 0.995},
        {"visibility": 0.01},
    ]
    assert all(ignored(good | change) for change in bad)
    assert not ignored(good | {"lidar_pts": -1, "segmentation_pts": 3, "depth_error": 0.5, "visibility": 0.02})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"K": [[500, 0, 320], [0, 500, float("nan")], [0, 0, 1]]}, "finite numbers"),
        ({"K": [[0, 0, 80], [0, 500, 60], [0, 0, 1]]}, "focal lengths"),
        ({"K": [[500, 40, 80], [0, 500, 60], [0, 0, 1]]}, "skew"),
        ({"K": [[500, 0, 2000], [0, 500, 60], [0, 0, 1]]}, "principal point"),
        ({"K": [[120, 0, 250], [0, 120, 200], [0, 0, 1]]}, "do not project to the 2D boxes"),
        ({"width": 100, "height": 4000}, "pixels"),
        ({"file_path": "gone.png"}, "no such file"),
    ],
)
def test_one_bad_image_is_named_and_the_others_are_read(
    walked: list[Scene], tmp_path: Path, change: dict, message: str
) -> None:
    file = write_omni3d(walked[0], tmp_path)
    data = json.loads(file.read_text())
    data["images"].insert(0, {**data["images"][0], "id": 999} | change)
    data["annotations"] += [{**a, "image_id": 999} for a in data["annotations"]]
    file.write_text(json.dumps(data))
    heard: list[str] = []
    scenes = list(read_omni3d(file, tmp_path, report=heard.append))
    assert len(scenes) == len(data["images"]) - 1 and len(heard) == 1 and message in heard[0] and "999" in heard[0]
    read = []
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        for scene in read_omni3d(file, tmp_path):
            read.append(scene)
    assert len(read) == len(scenes)


def test_masks_from_boxes_find_the_objects(walked: list[Scene]) -> None:
    shares = []
    for k in walked[0].walk[::4]:
        view = walked[0].views[k]
        found = ids_from_boxes(view.camera, view.depth, walked[0].objects)
        for s in view.sightings:
            if s.pixels > 200:
                own = found == s.object_id
                shares.append((view.ids[own] == s.object_id).mean() if own.any() else 1.0)
    assert len(shares) > 10 and np.median(shares) > 0.99 and min(shares) > 0.8


def test_depth_along_the_ray_becomes_planar() -> None:
    k = np.array([[50.0, 0, 31.0], [0, 60.0, 22.0], [0, 0, 1]])
    points = np.random.default_rng(1).uniform([-1, -1, 2], [1, 1, 4], (48, 64, 3))
    u, v = np.meshgrid(np.arange(64) + 0.5, np.arange(48) + 0.5)
    rays = np.stack([(u - 31) / 50, (v - 22) / 60, np.ones_like(u)], -1)
    planar = points[..., 2]
    np.testing.assert_allclose(planar_depth(np.linalg.norm(rays * planar[..., None], axis=-1), k), planar, rtol=1e-12)


def test_motion_pairs_are_one_motion() -> None:
    rng = np.random.default_rng(3)
    poses = []
    pose = np.eye(4)
    for _ in range(300):
        step = np.eye(4)
        if rng.uniform() < 0.5:
            step[:3, 3] = rng.normal(size=3) * 0.03
        else:
            step[:3, :3] = Rotation.from_euler("y", rng.uniform(-3, 3), degrees=True).as_matrix()
        pose = pose @ step
        poses.append(pose.copy())
    found = motion_pairs(poses, rng, 12)
    assert len(found) >= 4 and len({k for pair in found for k in pair}) == 2 * len(found)
    for a, b in found:
        assert 0 < b - a <= 90
        between = np.linalg.inv(poses[a]) @ poses[b]
        turned = np.degrees(Rotation.from_matrix(between[:3, :3]).magnitude())
        shift = np.linalg.norm(between[:3, 3])
        assert (shift >= 0.2 and turned < 4) or (shift < 0.05 and turned >= 8)


def test_checks_say_what_is_wrong() -> None:
    assert checks.rotation_problem(np.eye(3)) is None and checks.box_problem([0, 0, 0, 1, 1, 1, 0, 0, 0]) is None
    assert "mirrored" in checks.rotation_problem(np.diag([-1, 1, 1]))
    assert "orthogonal" in checks.rotation_problem(np.eye(3) * 2)
    assert "NaN" in checks.rotation_problem(np.full((3, 3), np.nan))
    assert "turned by 90" in checks.size_problem((480, 640), (640, 480))
    assert checks.size_problem((320, 240), (640, 480)) is None
    square = np.array([[0, 0], [0, 2], [2, 2], [2, 0]], float)
    assert np.array_equal(checks.outline_of(square), square[::-1]) and np.array_equal(
        checks.outline_of(square[::-1]), square[::-1]
    )
    for bad in ([[0, 0], [1, 1]], [[0, 0], [1, 1], [2, 2]], [[0, 0], [float("nan"), 1], [2, 2]]):
        with pytest.raises(ValueError, match="outline"):
            checks.outline_of(bad)


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("night_stand", "night stand"),
        ("  Office   Chair ", "office chair"),
        ("the_TV stand", "TV stand"),
        ("a Lamp", "lamp"),
        ("A", "a"),
        ("shower curtain", "shower curtain"),
    ],
)
def test_labels_become_names(label: str, name: str) -> None:
    assert clean_label(label) == name


@pytest.mark.parametrize("label", ["", " ", "_", "12", None, 3, ["chair"]])
def test_a_label_without_a_word_is_refused(label: object) -> None:
    with pytest.raises(ValueError, match="class name"):
        clean_label(label)


def test_plural_labels_and_articles_read_as_english() -> None:
    assert article("curtains") == "a set of curtains" and article("scissors") == "a pair of scissors"
    assert article("mattress") == "a mattress" and article("bus") == "a bus" and article("lens") == "a lens"
    assert article("hourglass") == "an hourglass" and article("umbrella") == "an umbrella"
    assert (
        article("unicycle") == "a unicycle" and article("USB hub") == "a USB hub" and article("Ottoman") == "an Ottoman"
    )
    assert prose(prose("books")) == prose("books") and prose(prose("curtains")) == "set of curtains"
    assert plural("kitchen cabinets") and not plural("glass") and not plural("stack of books")
