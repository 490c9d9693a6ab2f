"""Data sets of scans as they are distributed: rooms written in each format are read back, and no answer is wrong."""

from __future__ import annotations

import json
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shapely import MultiPoint

from fastvst.data import open_source
from fastvst.generate.scans import FORMATS, ScansConfig, make_scan_rows, read_scenes, scan_folders
from fastvst.scenes.adapters.arkitscenes import read_trajectory
from fastvst.scenes.adapters.boxes import oriented_box, tight_box
from fastvst.scenes.adapters.colmap import colmap_intrinsics
from fastvst.scenes.adapters.frames import ScanOptions
from fastvst.scenes.adapters.hypersim import read_hdf5
from fastvst.scenes.adapters.images import read_image
from fastvst.scenes.adapters.scannet import read_scannet
from fastvst.scenes.adapters.sens import SensFile
from fastvst.scenes.rooms.render_base import Renderer
from fastvst.scenes.rooms.shoot import ShotConfig, WalkConfig, shoot
from fastvst.scenes.scene import Scene
from fastvst.spatial.boxes import corners
from fastvst.tasks import PAIRS, SINGLE, WALKS
from scan_answers import wrong_answers
from scans import (
    shots,
    vertices,
    write_arkitscenes,
    write_colmap,
    write_colmap_binary,
    write_hypersim,
    write_nerfstudio,
    write_scan,
    write_scannet,
    write_scannetpp,
    write_scannetpp_dslr,
)
from tests.reasoning import test_reasoning

WRITERS = {
    "scannet": lambda scene, folder, share: write_scannet(scene, folder / "scene0001_00", share=share),
    "scannet exported": lambda scene, folder, share: write_scannet(
        scene, folder / "scene0002_00", share=share, exported=True
    ),
    "scannetpp": lambda scene, folder, share: write_scannetpp(scene, folder / "0a5c013435", share=share),
    "arkitscenes": lambda scene, folder, share: write_arkitscenes(scene, folder / "41069021", share=share),
    "arkitscenes sideways": lambda scene, folder, share: write_arkitscenes(
        scene, folder / "41069022", share=share, unit=0.01, sideways=True
    ),
    "hypersim": lambda scene, folder, share: write_hypersim(scene, folder / "ai_001_001", share=share),
    "nerfstudio": lambda scene, folder, share: write_nerfstudio(scene, folder / "kitchen", share=share),
    "nerfstudio colmap": lambda scene, folder, share: write_colmap(scene, folder / "office", share=share),
    "nerfstudio binary": lambda scene, folder, share: write_colmap_binary(scene, folder / "hall", share=share),
    "posed": lambda scene, folder, share: write_scan(scene, folder / "plain", share=share),
    "scannetpp_dslr": lambda scene, folder, share: write_scannetpp_dslr(scene, folder / "0b5c013435", share=share),
}
# Tasks whose truth is the mesh's own box. ScanNet has no boxes: its tight boxes differ from them for round objects.
BY_BOX = {"measurement", "distance", "detection_3d", "detection_multi", "grounding_3d", "scene_caption"}
BY_BOX |= {
    "video_measurement",
    "video_object_object",
    "object_object",
    "camera_camera",
    "video_route",
    "change_caption",
}


def read_one(name: str, scene: Scene, folder: Path, share: float = 0.0) -> Scene:
    """The room written in a format and read back; it knows the room that it comes from."""
    config = ScansConfig(name.split()[0], scan=ScanOptions(frames=40))
    (scan,) = scan_folders(config.format, WRITERS[name](scene, folder, share).parent)
    heard: list[str] = []
    (found,) = list(read_scenes(scan, config, heard.append))
    assert not heard, heard
    return replace(found, metadata={**found.metadata, "room_seed": scene.metadata["room_seed"]})


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "scannetpp_dslr"])  # see test_colmap_model.py
def test_a_room_comes_back(walked: list[Scene], tmp_path: Path, name: str) -> None:
    room = walked[2]
    found = read_one(name, room, tmp_path)
    views = found.views[: len(room.walk)]
    assert len(found.walk) == (0 if name == "hypersim" else len(room.walk))
    for ours, theirs in zip(views, shots(room), strict=True):
        np.testing.assert_allclose(ours.camera.position, theirs.camera.position, atol=1e-4)
        np.testing.assert_allclose(ours.camera.rotation, theirs.camera.rotation, atol=1e-4)
        assert ours.camera.height == theirs.camera.height and ours.image.shape[:2] == ours.depth.shape
        cut = (theirs.camera.width - ours.camera.width) // 2
        depth = theirs.depth[:, cut : cut + ours.camera.width]
        ids = theirs.ids[:, cut : cut + ours.camera.width]
        rounding = 0.006 if name == "hypersim" else 0.00051  # float16, and a width of whole pixels; millimetres
        assert np.abs(ours.depth - depth)[depth < 4].max() < rounding
        own = ours.ids > 0
        assert own.mean() > 0.5 * (ids > 0).mean() and (ours.ids == ids)[own].mean() > 0.97
    boxes = {item.id: item for item in found.objects}
    points, ids = vertices(room)
    for item in room.objects:
        if item.id not in boxes:
            continue
        ours = np.array(boxes[item.id].box)
        if name.startswith("scannet") and "pp" not in name:
            plan = MultiPoint(points[ids == item.id][:, :2]).minimum_rotated_rectangle
            assert ours[3] * ours[5] == pytest.approx(plan.area, rel=1e-3, abs=1e-3)
            assert np.hypot(*(ours[:2] - [plan.centroid.x, plan.centroid.y])) < 0.01
            assert ours[4] == pytest.approx(np.ptp(points[ids == item.id][:, 2]), abs=1e-4)
        else:
            apart = corners([ours])[0][:, None] - corners([item.box])[0][None]
            assert np.linalg.norm(apart, axis=-1).min(1).max() < 1e-4
        if name != "hypersim":
            assert boxes[item.id].name == item.name
    assert len(boxes) >= (3 if name == "hypersim" else len(room.objects))


def tasks_of(name: str) -> list[str]:
    # Hypersim's fixture is cut in width, so it has no room with the same images; its classes are those of NYU40.
    known = [
        task for task in FORMATS[name.split()[0]] if name != "hypersim" or task in ("depth_comparison", "distance")
    ]
    exact = not name.startswith("scannet") or "pp" in name
    return [task for task in known if exact or task not in BY_BOX]


@pytest.mark.parametrize("name", WRITERS)
def test_no_answer_is_wrong(walked: list[Scene], tmp_path: Path, name: str) -> None:
    counts, wrong = wrong_answers(read_one(name, walked[3], tmp_path, 0.3), 2, tasks_of(name))
    assert not wrong, (len(wrong), wrong[:3])
    assert sum(counts.values()) >= 8, counts


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_no_answer_of_hundreds_is_wrong(renderer: Renderer, tmp_path: Path, name: str) -> None:
    total: Counter = Counter()
    for number in range(4):
        room = shoot(8200 + number, renderer, ShotConfig(views=1), WalkConfig())
        share = 0.02 if name == "scannetpp_dslr" else 0.3  # rendered depth has few holes
        counts, wrong = wrong_answers(read_one(name, room, tmp_path / str(number), share), 10, tasks_of(name))
        assert not wrong, (len(wrong), wrong[:3])
        total += counts
    assert sum(total.values()) >= (50 if name == "hypersim" else 200), total


def test_the_command_writes_rows_and_resumes(walked: list[Scene], tmp_path: Path) -> None:
    for k, room in enumerate(walked[:2]):
        write_nerfstudio(room, tmp_path / "in" / f"room{k}")
    broken = write_nerfstudio(walked[2], tmp_path / "in" / "broken")
    (broken / "boxes.json").write_text("{")
    config = ScansConfig("nerfstudio", ("depth_comparison", "measurement", "video_order"), tries=2)
    counts = make_scan_rows(tmp_path / "in", tmp_path / "rows", config, workers=0, progress=None)
    rows = list(open_source(tmp_path / "rows"))
    assert len(rows) == sum(counts[task] for task in config.tasks) > 5 and counts["scans"] == 3
    problems = [json.loads(line) for line in (tmp_path / "rows.problems.jsonl").read_text().splitlines()]
    assert counts["problems"] == len(problems) == 1 and "boxes.json" in problems[0]["problem"]
    write_nerfstudio(walked[2], tmp_path / "fixed")
    (broken / "boxes.json").write_text((tmp_path / "fixed" / "boxes.json").read_text())
    again = make_scan_rows(tmp_path / "in", tmp_path / "rows", config, workers=2, progress=None)
    assert again["problems"] == 0 and 0 < sum(again[t] for t in config.tasks) < 100
    more = list(open_source(tmp_path / "rows"))
    assert len(more) == len(rows) + sum(again[t] for t in config.tasks)
    one = make_scan_rows(tmp_path / "in", tmp_path / "rows.parquet", config, workers=0, progress=None)
    assert (tmp_path / "rows.parquet").is_file()
    joined = {s.id: str(s.answer) for s in open_source(tmp_path / "rows.parquet")}
    assert joined == {s.id: str(s.answer) for s in more} and one["scans"] == 3
    before = (tmp_path / "rows.parquet").read_bytes()
    again = make_scan_rows(tmp_path / "in", tmp_path / "rows.parquet", config, workers=0, progress=None)
    assert again == {"scans": 3} and (tmp_path / "rows.parquet").read_bytes() == before
    for out in ("rows", "rows.parquet"):  # rows of other options are never taken for those that were asked for
        other = replace(config, tasks=("distance",))
        with pytest.raises(ValueError, match="rows of other options .tasks: .*measurement.*distance"):
            make_scan_rows(tmp_path / "in", tmp_path / out, other, workers=0, progress=None)
    with pytest.raises(FileNotFoundError, match="no scannet scan"):
        make_scan_rows(tmp_path / "in", tmp_path / "x", ScansConfig("scannet"), progress=None)
    with pytest.raises(ValueError, match="does not allow"):
        ScansConfig("omni3d", ("video_order",))


@pytest.mark.parametrize("meaning", ["metric", "relative", "inverse"])
def test_a_depth_map_alone_gives_orders_only(walked: list[Scene], tmp_path: Path, meaning: str) -> None:
    views = [view for room in walked for view in shots(room)[::6]]
    (tmp_path / "images").mkdir()
    (tmp_path / "depth").mkdir()
    from PIL import Image

    for k, view in enumerate(views):
        Image.fromarray(view.image).save(tmp_path / "images" / f"{k}.png")
        depth = view.depth if meaning == "metric" else 7 * view.depth if meaning == "relative" else 3 / view.depth
        if meaning == "metric":
            Image.fromarray(np.round(1000 * view.depth).astype(np.uint16)).save(tmp_path / "depth" / f"{k}.png")
        else:
            np.save(
                tmp_path / "depth" / f"{k}.npy",
                np.where(np.arange(view.depth.size).reshape(depth.shape) % 97, depth, 0),
            )
    heard: list[str] = []
    config = ScansConfig("depth", depth=meaning, tries=8)
    scenes = list(read_scenes(tmp_path, config, heard.append))
    assert len(scenes) == len(views)
    counts = make_scan_rows(tmp_path, tmp_path / "rows", config, workers=0, progress=None)
    asked = 0
    for row in open_source(tmp_path / "rows"):
        depth = views[int(row.metadata["file"].split(".")[0])].depth
        points = row.metadata["points"]
        true = [float(depth[int(v), int(u)]) for u, v, _, _ in points]
        assert list(np.argsort([p[2] for p in points])) == list(np.argsort(true))
        ordered = sorted(true)
        assert all(b - a >= 0.09 * b for a, b in zip(ordered, ordered[1:], strict=False))
        assert not any(ch.isdigit() for ch in str(row.answer["value"]).replace("point-", "").strip("1234"))
        assert "bbox" not in row.messages[0]["content"][-1]["text"]
        asked += 1
    assert asked == counts["depth_comparison"] > 20


def test_sens_reads_what_was_written_and_names_damage(walked: list[Scene], tmp_path: Path) -> None:
    folder = write_scannet(walked[0], tmp_path / "scene0001_00")
    path = folder / "scene0001_00.sens"
    with SensFile(path) as sens:
        assert sens.count == len(walked[0].walk) + 1 and not np.isfinite(sens.poses[-1]).any()
        image, depth = sens.frame(3)
        view = shots(walked[0])[3]
        assert np.abs(image.astype(int) - view.image).mean() < 6 and np.abs(depth - view.depth).max() < 0.00051
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for cut in (0, 3, 20, 300, 400, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"\.sens"):
            SensFile(path)
    path.write_bytes(struct.pack("<IQ", 4, 1 << 60) + data[12:])
    with pytest.raises(ValueError, match="version 4"):
        SensFile(path)
    for _ in range(200):  # hostile bytes: an error that names the file, or numbers; never a crash or a hang
        damaged = bytearray(data)
        for place in rng.integers(0, 600, 6):
            damaged[place] = int(rng.integers(256))
        path.write_bytes(damaged)
        try:
            with SensFile(path) as sens:
                sens.frame(0)
        except (ValueError, OSError):
            continue
        except Exception as error:
            assert type(error).__module__ in ("zlib", "PIL", "struct"), repr(error)


def test_scannet_says_what_is_missing(walked: list[Scene], tmp_path: Path) -> None:
    folder = write_scannet(walked[0], tmp_path / "scene0001_00")
    config = ScansConfig("scannet")
    told = {"scene0001_00.sens": "neither", "scene0001_00_vh_clean_2.ply": "missing"}
    for name, message in told.items():
        away = folder / name
        away.rename(tmp_path / "away")
        with pytest.raises(FileNotFoundError, match=message):
            list(read_scenes(folder, config, print))
        (tmp_path / "away").rename(away)
    text = (folder / "scene0001_00.txt").read_text()
    (folder / "scene0001_00.txt").write_text("sceneType = Office\n")
    heard: list[str] = []
    list(read_scenes(folder, config, heard.append))
    assert any("no axisAlignment" in line for line in heard)
    (folder / "scene0001_00.txt").write_text(text)
    (tmp_path / "map.tsv").write_text("id\traw_category\tnyu40class\n1\tsofa\tcouch\n2\tbooks\t\n")
    labelled = replace(config, label_map=str(tmp_path / "map.tsv"))
    (scene,) = read_scenes(folder, labelled, heard.append)
    names = {t.name for t in walked[0].objects}
    assert {t.name for t in scene.objects} == ({*names, "couch"} - {"sofa"} if "sofa" in names else names)


def test_hypersim_files_are_read_without_unpickling(tmp_path: Path) -> None:
    import h5py

    with h5py.File(tmp_path / "a.hdf5", "w") as stored:
        stored.create_dataset("dataset", data=["text"], dtype=h5py.string_dtype())
    with pytest.raises(ValueError, match=r"a\.hdf5"):
        read_hdf5(tmp_path / "a.hdf5")
    (tmp_path / "b.hdf5").write_bytes(b"\x80\x04cos\nsystem\n.")
    with pytest.raises(ValueError, match=r"b\.hdf5"):
        read_hdf5(tmp_path / "b.hdf5")
    np.save(tmp_path / "c.npy", np.array([{}], dtype=object), allow_pickle=True)
    from fastvst.scenes.adapters.depth import read_depth

    with pytest.raises(ValueError, match="allow_pickle|Object arrays"):
        read_depth(tmp_path / "c.npy")


def test_colmap_cameras() -> None:
    np.testing.assert_array_equal(
        colmap_intrinsics("PINHOLE", 640, 480, [500, 510, 320, 240]), [[500, 0, 320], [0, 510, 240], [0, 0, 1]]
    )
    np.testing.assert_array_equal(
        colmap_intrinsics("SIMPLE_RADIAL", 640, 480, [500, 320, 240, 0.001]), [[500, 0, 320], [0, 500, 240], [0, 0, 1]]
    )
    with pytest.raises(ValueError, match="distortion moves a corner by"):
        colmap_intrinsics("OPENCV", 640, 480, [500, 500, 320, 240, 0.2, 0, 0, 0])
    with pytest.raises(ValueError, match="camera model OPENCV_FISHEYE"):
        colmap_intrinsics("OPENCV_FISHEYE", 640, 480, [500, 500, 320, 240, 0, 0, 0, 0])


def test_trajectories_are_world_to_camera(tmp_path: Path) -> None:
    from scipy.spatial.transform import Rotation

    rng = np.random.default_rng(2)
    table = np.concatenate([np.arange(20)[:, None] / 10, rng.normal(size=(20, 6))], 1)
    table[0, 1:4] = 0
    np.savetxt(tmp_path / "a.traj", table)
    times, poses = read_trajectory(tmp_path / "a.traj")
    for row, pose in zip(table, poses, strict=True):
        world_to_camera = np.eye(4)
        world_to_camera[:3, :3] = Rotation.from_rotvec(row[1:4]).as_matrix()
        world_to_camera[:3, 3] = row[4:]
        np.testing.assert_allclose(np.linalg.inv(world_to_camera), pose, atol=1e-12)
    np.testing.assert_allclose(times, table[:, 0])


def test_tight_boxes_are_those_of_shapely() -> None:
    rng = np.random.default_rng(4)
    for _ in range(50):
        points = rng.normal(size=(30, 3)) * rng.uniform(0.1, 2, 3)
        box = np.array(tight_box(points))
        assert box[3] * box[5] == pytest.approx(MultiPoint(points[:, :2]).minimum_rotated_rectangle.area, rel=1e-9)
        assert box[4] == pytest.approx(np.ptp(points[:, 2]))
        cube = corners([box])[0]
        assert cube[:, 2].min() == pytest.approx(points[:, 2].min())
    flat = np.array(tight_box(np.array([[0, 0, 0], [1, 0, 0], [0.5, 0, 1.0]])))
    assert min(flat[3:6]) == pytest.approx(0.001)


def test_oriented_boxes_keep_their_corners() -> None:
    from scipy.spatial.transform import Rotation

    rng = np.random.default_rng(5)
    for turn in rng.uniform(0, 360, 30):
        axes = Rotation.from_euler("z", turn, degrees=True).as_matrix().T[rng.permutation(3)]
        axes = axes * rng.choice([-1, 1], 3)[:, None]
        lengths = rng.uniform(0.1, 2, 3)
        centre = rng.normal(size=3)
        box = oriented_box(centre, axes, lengths)
        signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) / 2
        expected = centre + (signs * lengths) @ axes
        apart = np.linalg.norm(corners([box])[0][:, None] - expected[None], axis=-1)
        assert apart.min(1).max() < 1e-9
        assert box[4] == pytest.approx(lengths[np.argmax(np.abs(axes[:, 2]))])
    with pytest.raises(ValueError, match="orthogonal"):
        oriented_box([0, 0, 0], np.ones((3, 3)) + np.eye(3), [1, 1, 1])


def test_the_table_of_the_docs_is_what_the_formats_allow() -> None:
    text = Path("docs/scans.md").read_text()
    lines = [f"| task | {' | '.join(f'`{name}`' for name in FORMATS)} |", f"| --- |{' --- |' * len(FORMATS)}"]
    for task in (*SINGLE, *PAIRS, *WALKS):
        lines.append(f"| {task} | {' | '.join('yes' if task in allowed else '' for allowed in FORMATS.values())} |")
    assert "\n".join(lines) in text
    described = text[text.index("## Formats") : text.index("## Format and task")]
    assert all(f"| `{name}` |" in described for name in FORMATS)


EXACT = ("nerfstudio", "posed", "scannetpp", "arkitscenes sideways")  # formats whose boxes are those of the meshes


def test_every_sentence_of_a_trace_holds(walked: list[Scene], tmp_path: Path) -> None:
    counts = test_reasoning.check_scene(read_one("arkitscenes", walked[1], tmp_path, 0.3), 2)
    assert sum(n for task, n in counts.items() if str(task).startswith("thought_")) >= 8, counts


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_every_sentence_of_a_thousand_traces_holds(renderer: Renderer, tmp_path: Path, name: str) -> None:
    traces = 0
    for number in range(12):
        if traces >= 1000:
            break
        room = shoot(8300 + number, renderer, ShotConfig(views=1), WalkConfig())
        counts = test_reasoning.check_scene(read_one(name, room, tmp_path / str(number), 0.3), 24)
        traces += sum(n for task, n in counts.items() if str(task).startswith("thought_"))
    assert traces >= 1000, traces


@pytest.mark.parametrize("size", [(1296, 968), (1297, 969), (640, 480), (300, 2000), (90, 70)])
def test_a_large_jpeg_is_decoded_smaller_but_never_too_small(tmp_path: Path, size: tuple[int, int]) -> None:
    x, y = np.meshgrid(np.linspace(0, 9, size[0]), np.linspace(0, 7, size[1]))
    image = np.stack([128 + 90 * np.sin(x), 128 + 90 * np.cos(y), 128 + 90 * np.sin(x + y)], -1).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "a.jpg", quality=95)
    found, stored = read_image(tmp_path / "a.jpg", 640)
    assert stored == size and max(found.shape[:2]) >= min(640, max(size))
    assert max(found.shape[:2]) == -(-max(size) // 2) if max(size) >= 1280 else found.shape[:2] == size[::-1]
    wanted = np.asarray(Image.fromarray(image).resize(found.shape[1::-1], Image.Resampling.LANCZOS))
    assert np.abs(found.astype(int) - wanted).mean() < 1.5
    Image.fromarray(image).save(tmp_path / "a.png")
    assert np.array_equal(read_image((tmp_path / "a.png").read_bytes(), 64)[0], image)


def test_large_colour_images_keep_their_intrinsics(walked: list[Scene], tmp_path: Path) -> None:
    folder = write_scannet(walked[2], tmp_path / "scene0003_00", exported=True)
    small = shots(walked[2])[0]
    for path in (folder / "color").glob("*.jpg"):
        with Image.open(path) as opened:
            opened.resize((4 * opened.width, 4 * opened.height)).save(path, quality=95)
    matrix = np.loadtxt(folder / "intrinsic" / "intrinsic_color.txt")
    np.savetxt(folder / "intrinsic" / "intrinsic_color.txt", np.diag([4.0, 4, 1]) @ matrix)
    view = read_scannet(folder, ScanOptions(frames=4, width=2 * small.camera.width)).views[0]
    assert view.image.shape == (2 * small.camera.height, 2 * small.camera.width, 3)
    np.testing.assert_allclose([view.camera.fx, view.camera.cy], [2 * small.camera.fx, 2 * small.camera.cy])
    wanted = np.asarray(Image.fromarray(small.image).resize(view.image.shape[1::-1]))
    assert np.abs(view.image.astype(int) - wanted).mean() < 4
