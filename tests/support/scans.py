"""Rendered rooms written as data sets of scans, with the faults that real files have."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from fastvst.scenes.adapters.hypersim import NYU40
from fastvst.scenes.rooms.geometry import build_geometry
from fastvst.scenes.rooms.recipes import furnish
from fastvst.scenes.scene import Scene, View
from scene_truth import Truth


def dropped(depth: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Millimetres (H, W) uint16 of a depth map in metres; `share` of the pixels is missing, in blocks and one by one.

    Half of what is missing is 0, the other half 65535.
    """
    stored = np.round(depth * 1000).astype(np.uint16)
    height, width = stored.shape
    hole = rng.uniform(size=stored.shape) < share / 2
    while hole.mean() < share:
        top = int(rng.integers(height - 6))
        left = int(rng.integers(width - 6))
        hole[top : top + 6, left : left + 6] = True
    return np.where(hole, np.where(rng.uniform(size=stored.shape) < 0.5, 0, 65535), stored).astype(np.uint16)


def write_scan(
    scene: Scene, folder: Path, turn: float = 30.0, share: float = 0.0, convention: Any = None, seed: int = 0
) -> Path:
    """Write the walk as a ScanNet-style folder in a rotated and shifted world; axis_alignment undoes the change.

    share: of the depth pixels that are missing. convention: a function from the camera-to-world pose to what is stored.
    """
    for name in ("color", "depth", "instance", "pose", "intrinsic"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(seed)
    moved = np.eye(4)
    moved[:3, :3] = Rotation.from_euler("z", turn, degrees=True).as_matrix()
    moved[:3, 3] = np.array([1.0, -2.0, 0.5]) * (turn != 0)
    for number, k in enumerate(scene.walk):
        view = scene.views[k]
        world = np.eye(4)
        world[:3, :3] = view.camera.rotation.T
        world[:3, 3] = view.camera.position
        stored = moved @ world
        np.savetxt(folder / "pose" / f"{number}.txt", stored if convention is None else convention(stored))
        Image.fromarray(dropped(view.depth, share, rng)).save(folder / "depth" / f"{number}.png")
        Image.fromarray(view.ids.astype(np.uint16)).save(folder / "instance" / f"{number}.png")
        Image.fromarray(view.image).resize((640, 480)).save(folder / "color" / f"{number}.jpg", quality=95)
    c = scene.views[scene.walk[0]].camera
    np.savetxt(folder / "intrinsic" / "intrinsic_depth.txt", [[c.fx, 0, c.cx], [0, c.fy, c.cy], [0, 0, 1]])
    (folder / "pose" / "99.txt").write_text("\n".join(["-inf -inf -inf -inf"] * 4))
    instances = [
        {"id": t.id, "label": t.name, "center": t.box[:3], "size": [t.box[3], t.box[5], t.box[4]], "heading": t.box[8]}
        for t in scene.objects
    ]
    described = {
        "instances": instances,
        "axis_alignment": np.linalg.inv(moved).tolist(),
        "polygon": scene.polygon.tolist(),
    }
    (folder / "boxes.json").write_text(json.dumps(described))
    return folder


def omni3d_annotation(scene: Scene, view: View, object_id: int, number: int, image: int) -> dict[str, Any]:
    """One object of a view as an Omni3D annotation."""
    c = view.camera
    s = next(s for s in view.sightings if s.object_id == object_id)
    box = np.array(scene.object(object_id).box)
    turn = c.rotation @ Rotation.from_euler("xyz", box[6:9], degrees=True).as_matrix()
    centre = c.rotation @ box[:3] + c.translation
    length, height, width = box[3:6]
    return {
        "id": number,
        "image_id": image,
        "category_id": 1,
        "valid3D": True,
        "category_name": scene.object(object_id).name,
        "bbox2D_trunc": [-1] * 4,
        "behind_camera": bool(centre[2] < 0),
        "bbox2D_tight": list(s.box_2d),
        "center_cam": list(centre),
        "dimensions": [width, height, length],
        "R_cam": turn.tolist(),
        "visibility": s.visibility,
        "truncation": 0.0,
    }


def write_omni3d(scene: Scene, folder: Path) -> Path:
    """Write the stills of a scene as Omni3D JSON, and the corners of its boxes to cuboids.npz for the comparison."""
    images = []
    annotations: list[dict[str, Any]] = []
    cuboids = {}
    for number in scene.stills():
        view = scene.views[number]
        c = view.camera
        path = f"train/{number:04d}.png"
        (folder / "train").mkdir(exist_ok=True)
        Image.fromarray(view.image).save(folder / path)
        matrix = [[c.fx, 0, c.cx], [0, c.fy, c.cy], [0, 0, 1]]
        images.append({"id": number, "file_path": path, "width": c.width, "height": c.height, "K": matrix})
        for s in view.sightings:
            found = omni3d_annotation(scene, view, s.object_id, len(annotations), number)
            width, height, length = found["dimensions"]
            cube = np.array([[x, y, z] for z in (-1, 1) for y, x in ((-1, -1), (-1, 1), (1, 1), (1, -1))])
            half = [length / 2, height / 2, width / 2]
            cuboids[len(annotations)] = cube * half @ np.array(found["R_cam"]).T + found["center_cam"]
            annotations.append(found)
    file = folder / "Made_train.json"
    described = {"info": {}, "images": images, "categories": [{"id": 1, "name": "thing"}], "annotations": annotations}
    file.write_text(json.dumps(described))
    np.savez(folder / "cuboids.npz", **{str(k): v for k, v in cuboids.items()})
    return file


# ---------------------------------------------------------------------------------------------------------------------
# Data sets as they are distributed


def shots(scene: Scene) -> list[View]:
    return [scene.views[k] for k in scene.walk]


def to_world(view: View) -> np.ndarray:
    """Camera to world (4, 4), OpenCV axes."""
    world = np.eye(4)
    world[:3, :3] = view.camera.rotation.T
    world[:3, 3] = view.camera.position
    return world


def vertices(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (N, 3) of the room's meshes and their object ids (N,)."""
    geometry = build_geometry(furnish(scene.metadata["room_seed"]))
    return geometry.positions.astype(np.float64), geometry.ids


def write_ply(path: Path, points: np.ndarray) -> None:
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n"
    head += "property float x\nproperty float y\nproperty float z\nproperty uchar red\nend_header\n"
    table = np.zeros(len(points), dtype=[("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1")])
    for k, axis in enumerate("xyz"):
        table[axis] = points[:, k]
    path.write_bytes(head.encode() + table.tobytes())


def jpeg(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def write_sens(path: Path, scene: Scene, moved: np.ndarray, share: float, seed: int = 0) -> None:
    """A .sens file, version 4: JPEG colour and zlib depth; one lost pose at the end."""
    rng = np.random.default_rng(seed)
    c = shots(scene)[0].camera
    matrix = np.eye(4)
    matrix[:3, :3] = [[c.fx, 0, c.cx], [0, c.fy, c.cy], [0, 0, 1]]
    name = b"StructureSensor"
    data = struct.pack("<IQ", 4, len(name)) + name
    for m in (matrix, np.eye(4), matrix, np.eye(4)):
        data += m.astype("<f4").tobytes()
    data += struct.pack("<2i4IfQ", 2, 1, c.width, c.height, c.width, c.height, 1000.0, len(scene.walk) + 1)
    for k, view in enumerate([*shots(scene), shots(scene)[0]]):
        pose = moved @ to_world(view) if k < len(scene.walk) else np.full((4, 4), -np.inf)
        color = jpeg(view.image)
        depth = zlib.compress(dropped(view.depth, share, rng).astype("<u2").tobytes())
        data += pose.astype("<f4").tobytes() + struct.pack("<4Q", k, k, len(color), len(depth)) + color + depth
    path.write_bytes(data)


def write_scannet(scene: Scene, folder: Path, *, share: float = 0.0, exported: bool = False) -> Path:
    """sceneXXXX_XX in its own world, 20 degrees and some metres from the aligned one."""
    folder.mkdir(parents=True)
    moved = np.eye(4)
    moved[:3, :3] = Rotation.from_euler("z", 20, degrees=True).as_matrix()
    moved[:3, 3] = [2.0, 1.0, -0.3]
    name = folder.name
    align = " ".join(str(x) for x in np.linalg.inv(moved).ravel())
    (folder / f"{name}.txt").write_text(f"axisAlignment = {align} \ncolorHeight = 968\nsceneType = Office\n")
    points, ids = vertices(scene)
    write_ply(folder / f"{name}_vh_clean_2.ply", points @ moved[:3, :3].T + moved[:3, 3])
    groups = [
        {"id": t.id - 1, "objectId": t.id - 1, "segments": [1000 + t.id], "label": t.name.replace(" ", "_")}
        for t in scene.objects
    ]
    groups.append({"id": 500, "objectId": 500, "segments": [1000], "label": "wall"})
    files = {f"{name}.aggregation.json": {"sceneId": f"scannet.{name}", "segGroups": groups}}
    files[f"{name}_vh_clean_2.0.010000.segs.json"] = {"sceneId": name, "segIndices": (ids + 1000).tolist()}
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content))
    if not exported:
        write_sens(folder / f"{name}.sens", scene, moved, share)
        return folder
    for part in ("color", "depth", "pose", "intrinsic", "instance-filt"):
        (folder / part).mkdir()
    rng = np.random.default_rng(0)
    for k, view in enumerate(shots(scene)):
        (folder / "color" / f"{k}.jpg").write_bytes(jpeg(view.image))
        Image.fromarray(dropped(view.depth, share, rng)).save(folder / "depth" / f"{k}.png")
        Image.fromarray(view.ids.astype(np.uint8)).save(folder / "instance-filt" / f"{k}.png")
        np.savetxt(folder / "pose" / f"{k}.txt", moved @ to_world(view))
    c = shots(scene)[0].camera
    np.savetxt(folder / "intrinsic" / "intrinsic_color.txt", [[c.fx, 0, c.cx, 0], [0, c.fy, c.cy, 0], [0, 0, 1, 0]])
    return folder


def obb(scene: Scene, object_id: int, unit: float = 1.0) -> dict[str, Any]:
    """An oriented box as ScanNet++ and ARKitScenes write it: three numbers after another are an axis."""
    box = np.array(scene.object(object_id).box)
    axes = Rotation.from_euler("xyz", box[6:9], degrees=True).as_matrix().T
    order = [2, 0, 1]  # any order of the axes
    lengths = (box[3:6] / unit)[order]
    return {
        "centroid": list(box[:3] / unit),
        "axesLengths": lengths.tolist(),
        "normalizedAxes": axes[order].ravel().tolist(),
    }


def write_arkitscenes(
    scene: Scene, folder: Path, *, share: float = 0.0, unit: float = 1.0, sideways: bool = False
) -> Path:
    """A video of ARKitScenes. sideways: the device was held upright, so the images lie on their side."""
    frames = folder / f"{folder.name}_frames"
    for part in ("vga_wide", "lowres_depth", "vga_wide_intrinsics"):
        (frames / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for k, view in enumerate(shots(scene)):
        c = view.camera
        rotation = c.rotation
        translation = c.translation
        maps = [view.image, dropped(view.depth, share, rng)]
        lens = [c.width, c.height, c.fx, c.fy, c.cx, c.cy]
        if sideways:  # a quarter clockwise: pixel (u, v) goes to (height - v, u)
            turn = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
            rotation = turn @ rotation
            translation = turn @ translation
            maps = [np.rot90(m, -1) for m in maps]
            lens = [c.height, c.width, c.fy, c.fx, c.height - c.cy, c.cx]
        time = f"{2500 + 0.1 * k:.3f}"
        vector = Rotation.from_matrix(rotation).as_rotvec()
        lines.append(" ".join(str(x) for x in (time, *vector, *translation)))
        stem = f"{folder.name}_{time}"
        Image.fromarray(np.ascontiguousarray(maps[0])).save(frames / "vga_wide" / f"{stem}.png")
        small = np.ascontiguousarray(maps[1])
        Image.fromarray(small).save(frames / "lowres_depth" / f"{stem}.png")
        late = f"{folder.name}_{2500.001 + 0.1 * k:.3f}"  # names differ by a millisecond
        (frames / "vga_wide_intrinsics" / f"{late}.pincam").write_text(" ".join(str(x) for x in lens))
    (frames / "lowres_wide.traj").write_text("\n".join(lines) + "\n")
    data = [
        {"uid": str(t.id), "label": t.name.replace(" ", "_"), "segments": {"obbAligned": obb(scene, t.id, unit)}}
        for t in scene.objects
    ]
    (folder / f"{folder.name}_3dod_annotation.json").write_text(json.dumps({"data": data, "skipped": False}))
    return folder


def write_hypersim(scene: Scene, folder: Path, *, share: float = 0.0, unit: float = 0.0254) -> Path:
    """A scene of Hypersim; images are cut to a horizontal field of view of 60 degrees."""
    import h5py

    def put(path: Path, array: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as stored:
            stored["dataset"] = np.asarray(array)

    detail = folder / "_detail"
    views = shots(scene)
    rng = np.random.default_rng(0)
    (detail / "mesh").mkdir(parents=True)
    (detail / "metadata_scene.csv").write_text(f"parameter_name,parameter_value\nmeters_per_asset_unit, {unit}\n")
    put(detail / "cam_00" / "camera_keyframe_positions.hdf5", [v.camera.position / unit for v in views])
    opengl = [v.camera.rotation.T @ np.diag([1.0, -1, -1]) for v in views]
    put(detail / "cam_00" / "camera_keyframe_orientations.hdf5", opengl)
    put(detail / "cam_00" / "camera_keyframe_frame_indices.hdf5", np.arange(len(views)))
    most = max(t.id for t in scene.objects)
    boxes = {"positions": np.full((most, 3), np.inf), "extents": np.full((most, 3), np.inf)}
    boxes["orientations"] = np.full((most, 3, 3), np.inf)
    for t in scene.objects:
        described = obb(scene, t.id, unit)
        boxes["positions"][t.id - 1] = described["centroid"]
        boxes["extents"][t.id - 1] = described["axesLengths"]
        boxes["orientations"][t.id - 1] = np.array(described["normalizedAxes"]).reshape(3, 3).T
    for part, array in boxes.items():
        put(detail / "mesh" / f"metadata_semantic_instance_bounding_box_object_aligned_2d_{part}.hdf5", array)
    preview = folder / "images" / "scene_cam_00_final_preview"
    geometry = folder / "images" / "scene_cam_00_geometry_hdf5"
    preview.mkdir(parents=True)
    names = {t.id: NYU40.index(t.name) + 1 if t.name in NYU40 else 40 for t in scene.objects}
    for k, view in enumerate(views):
        c = view.camera
        width = 2 * round(c.fx * np.tan(np.pi / 6))
        cut = (slice(None), slice((c.width - width) // 2, (c.width + width) // 2))
        x = (np.arange(width) + 0.5 - width / 2) / c.fx
        y = (np.arange(c.height) + 0.5 - c.cy) / c.fy
        missing = dropped(view.depth[cut], share, rng)
        planar = np.where((missing == 0) | (missing == 65535), np.nan, view.depth[cut])
        ids = view.ids[cut]
        (preview / f"frame.{k:04d}.tonemap.jpg").write_bytes(jpeg(view.image[cut]))
        along = planar * np.sqrt(1 + x[None] ** 2 + y[:, None] ** 2)
        put(geometry / f"frame.{k:04d}.depth_meters.hdf5", along.astype(np.float16 if share == 0 else np.float32))
        put(geometry / f"frame.{k:04d}.semantic_instance.hdf5", np.where(ids == 0, -1, ids - 1).astype(np.int32))
        classes = np.vectorize(lambda i: names.get(i, 1))(ids)
        put(geometry / f"frame.{k:04d}.semantic.hdf5", classes.astype(np.int32))
    return folder


def write_boxes(scene: Scene, folder: Path) -> None:
    instances = [
        {"id": t.id, "label": t.name, "center": t.box[:3], "size": [t.box[3], t.box[5], t.box[4]], "heading": t.box[8]}
        for t in scene.objects
    ]
    (folder / "boxes.json").write_text(json.dumps({"instances": instances, "polygon": scene.polygon.tolist()}))


def write_images(scene: Scene, images: Path, depth: Path, share: float) -> list[str]:
    images.mkdir(parents=True)
    depth.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = []
    for k, view in enumerate(shots(scene)):
        names.append(f"frame_{k:06d}")
        (images / f"{names[-1]}.jpg").write_bytes(jpeg(view.image))
        Image.fromarray(dropped(view.depth, share, rng)).save(depth / f"{names[-1]}.png")
    return names


def write_nerfstudio(scene: Scene, folder: Path, *, share: float = 0.0) -> Path:
    names = write_images(scene, folder / "images", folder / "depth", share)
    c = shots(scene)[0].camera
    frames = [
        {
            "file_path": f"images/{name}.jpg",
            "depth_file_path": f"depth/{name}.png",
            "transform_matrix": (to_world(view) @ np.diag([1.0, -1, -1, 1])).tolist(),
        }
        for name, view in zip(names, shots(scene), strict=True)
    ]
    lens = {"fl_x": c.fx, "fl_y": c.fy, "cx": c.cx, "cy": c.cy, "w": c.width, "h": c.height}
    (folder / "transforms.json").write_text(json.dumps({"camera_model": "OPENCV", **lens, "frames": frames}))
    write_boxes(scene, folder)
    return folder


def write_colmap_model(scene: Scene, folder: Path, names: list[str], bend: str = "0 0 0 0") -> None:
    folder.mkdir(parents=True)
    c = shots(scene)[0].camera
    head = "# Camera list with one line of data per camera:\n"
    (folder / "cameras.txt").write_text(f"{head}1 OPENCV {c.width} {c.height} {c.fx} {c.fy} {c.cx} {c.cy} {bend}\n")
    lines = ["# Image list with two lines of data per image:"]
    for k, (name, view) in enumerate(zip(names, shots(scene), strict=True), 1):
        x, y, z, w = Rotation.from_matrix(view.camera.rotation).as_quat()
        place = " ".join(str(v) for v in (w, x, y, z, *view.camera.translation))
        lines += [f"{k} {place} 1 {name}.jpg", "" if k % 2 else "12.5 30.1 -1"]
    (folder / "images.txt").write_text("\n".join(lines) + "\n")


def write_colmap(scene: Scene, folder: Path, *, share: float = 0.0) -> Path:
    names = write_images(scene, folder / "images", folder / "depth", share)
    write_colmap_model(scene, folder / "sparse" / "0", names)
    write_boxes(scene, folder)
    return folder


def write_scannetpp(scene: Scene, folder: Path, *, share: float = 0.0) -> Path:
    names = write_images(scene, folder / "iphone" / "rgb", folder / "iphone" / "depth", share)
    write_colmap_model(scene, folder / "iphone" / "colmap", names)
    (folder / "scans").mkdir()
    groups = [
        {"id": t.id - 1, "objectId": t.id - 1, "label": t.name, "segments": [t.id], "obb": obb(scene, t.id)}
        for t in scene.objects
    ]
    (folder / "scans" / "segments_anno.json").write_text(json.dumps({"sceneId": folder.name, "segGroups": groups}))
    return folder


def write_colmap_binary(scene: Scene, folder: Path, *, share: float = 0.0) -> Path:
    """As `write_colmap`, with cameras.bin and images.bin."""
    names = write_images(scene, folder / "images", folder / "depth", share)
    c = shots(scene)[0].camera
    sparse = folder / "sparse" / "0"
    sparse.mkdir(parents=True)
    camera = struct.pack("<QIiQQ4d", 1, 7, 1, c.width, c.height, c.fx, c.fy, c.cx, c.cy)
    (sparse / "cameras.bin").write_bytes(camera)
    images = struct.pack("<Q", len(names))
    for k, (name, view) in enumerate(zip(names, shots(scene), strict=True), 1):
        x, y, z, w = Rotation.from_matrix(view.camera.rotation).as_quat()
        images += struct.pack("<I7dI", k, w, x, y, z, *view.camera.translation, 7) + f"{name}.jpg\0".encode()
        images += struct.pack("<Q", k % 3) + struct.pack("<ddq", 1.5, 2.5, -1) * (k % 3)
    (sparse / "images.bin").write_bytes(images)
    write_boxes(scene, folder)
    return folder


LENS = (0.02, -0.015, 0.004, -0.001)  # k1 to k4
ZOOM = 1.25  # the fisheye image sees less than the room's pinhole image


def fisheye_of(view: View, truth: Truth) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A fisheye image (H, W, 3) from a pinhole view, its planar depth (H, W) by rays, the angles (H, W) of its pixels.

    The angle of a radius is found by Newton's method on OpenCV's polynomial.
    """
    c = view.camera
    x = (np.arange(c.width) + 0.5 - c.cx) / (ZOOM * c.fx)
    y = (np.arange(c.height) + 0.5 - c.cy) / (ZOOM * c.fy)
    bent = np.hypot(*np.meshgrid(x, y))
    angle = bent.copy()
    for _ in range(20):
        powers = [angle**p for p in (2, 4, 6, 8)]
        value = angle * (1 + sum(k * p for k, p in zip(LENS, powers, strict=True)))
        slope = 1 + sum((2 * i + 3) * k * p for i, (k, p) in enumerate(zip(LENS, powers, strict=True)))
        angle -= (value - bent) / slope
    stretch = np.where(bent > 1e-9, np.tan(angle) / np.maximum(bent, 1e-9), 1.0)
    u = c.fx * x[None] * stretch + c.cx
    v = c.fy * y[:, None] * stretch + c.cy
    columns = np.floor(u).astype(int)
    rows = np.floor(v).astype(int)
    depth, _ = truth.cast(c, np.stack([u.ravel(), v.ravel()], 1))
    inside = (columns >= 0) & (rows >= 0) & (columns < c.width) & (rows < c.height)
    at = np.clip(rows, 0, c.height - 1), np.clip(columns, 0, c.width - 1)
    return np.where(inside[..., None], view.image[at], 0), depth.reshape(u.shape), angle


def write_scannetpp_dslr(scene: Scene, folder: Path, *, share: float = 0.0, undistorted: bool = False) -> Path:
    """undistorted: the room's pinhole images and the fisheye depth, as the toolkit's undistortion leaves them."""
    write_scannetpp(scene, folder)
    for part in (folder / "iphone").rglob("*.*"):
        part.unlink()
    dslr = folder / "dslr"
    c = shots(scene)[0].camera
    names = [f"DSC{k:05d}" for k in range(len(shots(scene)))]
    truth = Truth(scene)
    write_colmap_model(scene, dslr / "colmap", names)
    lens = " ".join(str(v) for v in (ZOOM * c.fx, ZOOM * c.fy, c.cx, c.cy, *LENS))
    (dslr / "colmap" / "cameras.txt").write_text(f"1 OPENCV_FISHEYE {c.width} {c.height} {lens}\n")
    images = dslr / ("resized_undistorted_images" if undistorted else "resized_images")
    for part in (images, dslr / "render_depth"):
        part.mkdir()
    rng = np.random.default_rng(0)
    for name, view in zip(names, shots(scene), strict=True):
        image, depth, _ = fisheye_of(view, truth)
        (images / f"{name}.jpg").write_bytes(jpeg(view.image if undistorted else image))
        Image.fromarray(dropped(depth, share, rng)).save(dslr / "render_depth" / f"{name}.png")
    if undistorted:
        (dslr / "nerfstudio").mkdir()
        described = {"camera_model": "PINHOLE", "fl_x": c.fx, "fl_y": c.fy, "cx": c.cx, "cy": c.cy, "k1": 0.0}
        (dslr / "nerfstudio" / "transforms_undistorted.json").write_text(json.dumps(described | {"frames": []}))
    return folder
