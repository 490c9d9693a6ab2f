"""Rendered rooms written as data sets of scans, with the faults that real files have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from fastvst.scenes.scene import Scene, View


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
