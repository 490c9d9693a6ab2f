"""Scans with posed frames and instance boxes (ScanNet, ScanNet++ style): one scene a folder, with video and pairs.

Layout of a scene folder; files of a frame are named by its number:

    color/0.jpg
    depth/0.png                      uint16, millimetres
    instance/0.png                   uint16 object ids, 0 = none
    pose/0.txt                       4 x 4, camera to world
    intrinsic/intrinsic_depth.txt    4 x 4 or 3 x 3, in pixels of the depth map
    boxes.json                       {"instances": [{"id", "label", "center": [3], "size": [3], "heading": degrees}],
                                     optional: "axis_alignment": 4 x 4, "polygon": [[x, y], ...], "height": metres}

Boxes and outline are in the aligned world: metres, Z up. `size` is along x, y, z before the rotation by `heading` about
Z. Colour images are resized to the depth map, to which ScanNet registers them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvst.scenes.scene import Scene, SceneObject, View, observe, wide_pairs
from fastvst.spatial.camera import Camera, unproject

POINTS = 256  # surface points per object, from which its visibility is estimated


def read_posed(
    folder: str | Path,
    *,
    frames: int = 20,
    stills: int = 4,
    pairs: int = 6,
    fps: float = 2.0,
    source: str = "posed",
    seed: int = 0,
) -> Scene:
    """The scene of one folder.

    Args:
        frames: frames of the video, spread evenly over the scan.
        stills: views for single-image questions, spread evenly over these frames.
        pairs: at most so many wide pairs, see `scene.wide_pairs`.
        fps: frame rate of the video rows.
        source: `data_source` of the rows.
        seed: decides the surface points and the pairs.

    Raises:
        FileNotFoundError: a missing file; names it.
        ValueError: an unusable pose, depth map or box; names the scene and the frame or box.
    """
    folder = Path(folder)
    described = json.loads(_existing(folder / "boxes.json").read_text(encoding="utf-8"))
    align = np.array(described.get("axis_alignment", np.eye(4)), dtype=np.float64)
    objects = tuple(_object(folder, entry) for entry in described["instances"])
    numbers = sorted((p.stem for p in (folder / "pose").glob("*.txt")), key=lambda stem: (len(stem), stem))
    stored = {n: np.loadtxt(folder / "pose" / f"{n}.txt").reshape(4, 4) for n in numbers}
    numbers = [n for n in numbers if np.isfinite(stored[n]).all()]  # ScanNet writes -inf where tracking was lost
    poses = {n: align @ stored[n] for n in numbers}
    if len(numbers) < 2:
        raise ValueError(f"{folder}: {len(numbers)} frames with a usable pose; expected two or more in pose/*.txt")
    chosen = [numbers[k] for k in _spread(len(numbers), frames)]
    intrinsic = np.loadtxt(_existing(folder / "intrinsic" / "intrinsic_depth.txt"))
    raw = [_frame(folder, n, poses[n], intrinsic) for n in chosen]
    surface = _surfaces(raw, {item.id for item in objects}, np.random.default_rng([seed, 8]))
    views = [View(c, image, observe(c, depth, ids, surface), depth, ids) for c, image, depth, ids in raw]
    walk = tuple(range(len(views)))
    found = wide_pairs(views, walk, np.random.default_rng([seed, 9]), pairs)
    polygon = described.get("polygon")
    return Scene(
        name=folder.name,
        objects=objects,
        views=(*views, *(views[k] for k in _spread(len(views), stills))),
        polygon=None if polygon is None else np.array(polygon, dtype=np.float64),
        height=described.get("height"),
        pairs=tuple(found),
        walk=walk,
        fps=fps,
        metadata={"source": source},
    )


def _spread(length: int, count: int) -> list[int]:
    """Up to `count` indices spread evenly over a list of this length."""
    return np.unique(np.round(np.linspace(0, length - 1, count)).astype(int)).tolist()


def _existing(path: Path) -> Path:
    """`path`, or FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected the layout described in fastvst.scenes.adapters.posed")
    return path


def _object(folder: Path, entry: dict[str, Any]) -> SceneObject:
    try:
        x, y, z = (float(v) for v in entry["center"])
        dx, dy, dz = (float(v) for v in entry["size"])
        number = int(entry["id"])
        name = str(entry["label"])
        heading = float(entry.get("heading", 0.0))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: box {entry}: {error!r}; expected id, label, center, size, heading") from error
    if number <= 0 or min(dx, dy, dz) <= 0:
        raise ValueError(f"{folder}: box {number} ({name}): size {(dx, dy, dz)}; expected an id > 0 and sizes > 0")
    return SceneObject(number, name, (x, y, z, dx, dz, dy, -90.0, 0.0, heading))


def _frame(
    folder: Path, number: str, pose: np.ndarray, intrinsic: np.ndarray
) -> tuple[Camera, np.ndarray, np.ndarray, np.ndarray]:
    """Camera, image (H, W, 3), depth (H, W) in metres and ids (H, W) of one frame, all at the size of the depth map."""
    with Image.open(_existing(folder / "depth" / f"{number}.png")) as opened:
        depth = np.asarray(opened).astype(np.float32) / 1000
    if depth.ndim != 2:
        raise ValueError(f"{folder}: depth/{number}.png has shape {depth.shape}; expected one channel of millimetres")
    height, width = depth.shape
    colour = next((p for p in (folder / "color").glob(f"{number}.*")), folder / "color" / f"{number}.jpg")
    with Image.open(_existing(colour)) as opened:
        image = np.asarray(opened.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
    with Image.open(_existing(folder / "instance" / f"{number}.png")) as opened:
        ids = np.asarray(opened.resize((width, height), Image.Resampling.NEAREST)).astype(np.int32)
    rotation = pose[:3, :3]
    position = pose[:3, 3]
    determinant = float(np.linalg.det(rotation))
    if abs(abs(determinant) - 1) > 0.01:
        raise ValueError(f"{folder}: pose/{number}.txt has determinant {determinant:.3f}; expected a rotation")
    camera = Camera(
        width,
        height,
        float(intrinsic[0, 0]),
        float(intrinsic[1, 1]),
        float(intrinsic[0, 2]),
        float(intrinsic[1, 2]),
        rotation.T,
        -rotation.T @ position,
    )
    return camera, image, depth, ids


def _surfaces(raw: list, known: set[int], rng: np.random.Generator) -> dict[int, np.ndarray]:
    """Object id -> world points (S, 3) on its surface, from all frames that show it."""
    points: dict[int, list[np.ndarray]] = {}
    for camera, _, depth, ids in raw:
        for object_id in np.unique(ids):
            if int(object_id) not in known:
                continue
            rows, columns = np.nonzero((ids == object_id) & (depth > 0.05))
            if len(rows) == 0:
                continue
            k = rng.choice(len(rows), min(POINTS, len(rows)), replace=False)
            pixels = np.stack([columns[k] + 0.5, rows[k] + 0.5], 1)
            points.setdefault(int(object_id), []).append(
                unproject(camera, pixels, depth[rows[k], columns[k]].astype(np.float64))
            )
    found = {}
    for object_id, parts in points.items():
        cloud = np.concatenate(parts)
        found[object_id] = cloud[rng.choice(len(cloud), min(POINTS, len(cloud)), replace=False)]
    return found
