"""Posed images of COLMAP (text models) and nerfstudio (transforms.json), and scans that come with them: ScanNet++.

COLMAP text model (colmap.github.io/format.html): cameras.txt "id model width height params...", images.txt "id qw qx qy
qz tx ty tz camera name" on every other line, world to camera, OpenCV axes.

nerfstudio (docs.nerf.studio): {"fl_x", "fl_y", "cx", "cy", "w", "h", "frames": [{"file_path", "transform_matrix",
"depth_file_path"}]}; camera to world, OpenGL axes; intrinsics may stand in each frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvst.scenes.adapters.boxes import named_object, one_of_each_id, oriented_box, read_json
from fastvst.scenes.adapters.checks import (
    Convention,
    Problems,
    Report,
    intrinsics_problem,
    outline_of,
    rotation_problem,
)
from fastvst.scenes.adapters.depth import read_depth
from fastvst.scenes.adapters.frames import Frame, ScanOptions, assemble_from, make_frame, named
from fastvst.scenes.adapters.posed import read_boxes
from fastvst.scenes.scene import Scene, SceneObject

BENT = 0.01  # largest accepted distortion at the image's corner, as a share of the image's width
PINHOLE = {"SIMPLE_PINHOLE": 1, "PINHOLE": 2, "SIMPLE_RADIAL": 1, "RADIAL": 1, "OPENCV": 2, "FULL_OPENCV": 2}


@dataclass(frozen=True, eq=False)
class PosedImage:
    """One image: `name` as the model calls it, intrinsics (3, 3) in its own pixels, camera-to-world pose (4, 4)."""

    name: str
    intrinsics: np.ndarray
    pose: np.ndarray
    depth_name: str | None = None


def read_colmap_model(folder: Path) -> list[PosedImage]:
    """The images of a COLMAP text model, sorted by name.

    Raises:
        FileNotFoundError: no text model; a binary one is named with the command that converts it.
        ValueError: a damaged line, a camera model with strong distortion, or an unknown one.
    """
    if not (folder / "cameras.txt").is_file() and (folder / "cameras.bin").is_file():
        convert = f"colmap model_converter --input_path {folder} --output_path {folder} --output_type TXT"
        raise FileNotFoundError(f"{folder} holds a binary model; convert it: {convert}")
    cameras = {}
    for line in _lines(folder / "cameras.txt"):
        number, model, width, height, *values = line.split()
        try:
            cameras[number] = colmap_intrinsics(model, float(width), float(height), [float(v) for v in values])
        except ValueError as error:
            raise ValueError(f"{folder}/cameras.txt: camera {number}: {error}") from error
    found = []
    for line in list(_lines(folder / "images.txt", keep_empty=True))[::2]:
        if not line.strip():
            continue
        _, qw, qx, qy, qz, tx, ty, tz, camera, *name = line.split()
        pose = np.eye(4)
        turn = _rotation(float(qw), float(qx), float(qy), float(qz))
        pose[:3, :3] = turn.T
        pose[:3, 3] = -turn.T @ np.array([float(tx), float(ty), float(tz)])
        found.append(PosedImage(" ".join(name), cameras[camera], pose))
    return sorted(found, key=lambda item: item.name)


def _lines(path: Path, keep_empty: bool = False) -> Iterator[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") and (keep_empty or line.strip()):
            yield line


def _rotation(w: float, x: float, y: float, z: float) -> np.ndarray:
    n = w * w + x * x + y * y + z * z
    if not n > 0.5:
        raise ValueError(f"quaternion {(w, x, y, z)}; expected a unit quaternion")
    s = 2 / n
    return np.array(
        [
            [1 - s * (y * y + z * z), s * (x * y - w * z), s * (x * z + w * y)],
            [s * (x * y + w * z), 1 - s * (x * x + z * z), s * (y * z - w * x)],
            [s * (x * z - w * y), s * (y * z + w * x), 1 - s * (x * x + y * y)],
        ]
    )


def colmap_intrinsics(model: str, width: float, height: float, values: list[float]) -> np.ndarray:
    """Intrinsics (3, 3) of a COLMAP camera without its distortion.

    Raises:
        ValueError: an unknown model, or distortion that moves the image's corner by more than 1 % of the width.
    """
    if model not in PINHOLE:
        raise ValueError(f"camera model {model}; expected one of {sorted(PINHOLE)} (undistort the images first)")
    focal = values[: PINHOLE[model]]
    fx = focal[0]
    fy = focal[-1]
    cx, cy, *bend = values[PINHOLE[model] :]
    _check_distortion(fx, fy, cx, cy, width, bend)
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])


def _check_distortion(fx: float, fy: float, cx: float, cy: float, width: float, bend: list[float]) -> None:
    """`bend`: k1, k2, p1, p2, ... as OpenCV orders them; missing ones are 0."""
    k1, k2 = (*bend, 0.0, 0.0)[:2]
    x = max(cx, width - cx) / fx
    y = cy / fy
    r2 = x * x + y * y
    moved = fx * np.sqrt(r2) * abs(k1 * r2 + k2 * r2 * r2)
    if moved > BENT * width:
        raise ValueError(f"distortion moves the corner by {moved:.0f} pixels; undistort the images first")


def read_transforms(path: Path, convention: Convention, problems: Problems) -> list[PosedImage]:
    """The images of a nerfstudio transforms.json in its own order."""
    data = read_json(path)
    found = []
    for k, entry in enumerate(data.get("frames", [])):
        try:
            values = {key: float(entry.get(key, data.get(key, np.nan))) for key in ("fl_x", "fl_y", "cx", "cy", "w")}
            bend = [float(entry.get(key, data.get(key, 0.0))) for key in ("k1", "k2")]
            stored = np.array(entry["transform_matrix"], dtype=np.float64).reshape(4, 4)
            fault = rotation_problem(stored[:3, :3])
            if fault is not None:
                raise ValueError(fault)
            fx, fy, cx, cy, width = values.values()
            _check_distortion(fx, fy, cx, cy, width, bend)
        except (KeyError, TypeError, ValueError) as error:
            problems.add(ValueError(f"{path}: frame {k} ({entry.get('file_path')}): {error!r}; it is left out"))
            continue
        matrix = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])
        found.append(PosedImage(entry["file_path"], matrix, convention.read(stored), entry.get("depth_file_path")))
    return found


def read_nerfstudio(
    folder: str | Path,
    options: ScanOptions | None = None,
    *,
    convention: Convention | None = None,
    report: Report | None = None,
) -> Scene:
    """The scene of a folder with transforms.json (nerfstudio) or sparse/0 (COLMAP), depth maps and boxes.json.

    boxes.json has the form of `fastvst.scenes.adapters.posed`. Depth maps are 16-bit PNG in millimetres: the file that
    `depth_file_path` names, or depth/<image>.png. instance/<image>.png is optional.

    Args:
        convention: of transform_matrix; None is camera to world with OpenGL axes and Z up, as nerfstudio writes it.

    Raises:
        FileNotFoundError: a missing file; names it.
        ValueError: depth that does not lie in the boxes; names the convention that fits. Without `report` any problem.
    """
    folder = Path(folder)
    problems = Problems(report)
    options = named(options, "nerfstudio")
    described = read_json(folder / "boxes.json")
    objects = read_boxes(folder.name, described["instances"], problems)
    if (folder / "transforms.json").is_file():
        images = read_transforms(folder / "transforms.json", convention or Convention(axes="opengl"), problems)
        root = folder
    else:
        images = read_colmap_model(folder / "sparse" / "0")
        root = folder / "images"
    align = np.array(described.get("axis_alignment", np.eye(4)), dtype=np.float64)
    poses = [align @ item.pose for item in images]

    def load(k: int) -> Frame:
        item = images[k]
        stem = Path(item.name).stem
        depth = folder / (item.depth_name or f"depth/{stem}.png")
        return _frame(root / item.name, depth, item, poses[k], folder / "instance" / f"{stem}.png", objects, options)

    polygon = described.get("polygon")
    return assemble_from(
        folder.name,
        objects,
        poses,
        load,
        options=options,
        problems=problems,
        polygon=None if polygon is None else outline_of(polygon),
    )


def _frame(
    image: Path,
    depth: Path,
    item: PosedImage,
    pose: np.ndarray,
    masks: Path | None,
    objects: tuple[SceneObject, ...],
    options: ScanOptions,
) -> Frame:
    with Image.open(image) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    fault = intrinsics_problem(item.intrinsics, pixels.shape[1], pixels.shape[0])
    if fault is not None:
        raise ValueError(f"{image}: {fault}")
    ids = None
    if masks is not None and masks.is_file():
        with Image.open(masks) as opened:
            ids = np.asarray(opened).astype(np.int32)
    return make_frame(item.name, pixels, read_depth(depth), item.intrinsics, pose, objects, options, ids)


def read_scannetpp(folder: str | Path, options: ScanOptions | None = None, *, report: Report | None = None) -> Scene:
    """The scene of one ScanNet++ scan (iPhone frames), as its toolkit extracts them.

        scans/segments_anno.json              {"segGroups": [{"objectId", "label", "obb"}]}
        iphone/colmap/cameras.txt, images.txt
        iphone/rgb/frame_000000.jpg           from rgb.mkv
        iphone/depth/frame_000000.png         uint16, millimetres; from depth.bin

    DSLR images have no depth map: nothing says what hides what, so no question can be asked about them.

    Raises:
        FileNotFoundError: a missing file; names it, and the toolkit's command that makes it.
        ValueError: depth that does not lie in the boxes; without `report` any problem.
    """
    folder = Path(folder)
    problems = Problems(report)
    options = named(options, "scannetpp")
    objects = _obb_objects(folder.name, read_json(folder / "scans" / "segments_anno.json"), problems)
    phone = folder / "iphone"
    for part in ("rgb", "depth"):
        if not (phone / part).is_dir():
            raise FileNotFoundError(
                f"{phone / part} is missing; ScanNet++'s toolkit extracts it (iphone/prepare_iphone_data.py)"
            )
    images = read_colmap_model(phone / "colmap")

    def load(k: int) -> Frame:
        item = images[k]
        name = Path(item.name).name
        depth = phone / "depth" / f"{Path(name).stem}.png"
        return _frame(phone / "rgb" / name, depth, item, item.pose, None, objects, options)

    return assemble_from(folder.name, objects, [item.pose for item in images], load, options=options, problems=problems)


def _obb_objects(scene: str, annotation: dict[str, Any], problems: Problems) -> tuple[SceneObject, ...]:
    """Objects from oriented boxes {"centroid", "axesLengths", "normalizedAxes"}; each axis is three numbers."""
    found = []
    for entry in annotation["segGroups"]:

        def box(entry: dict[str, Any] = entry) -> tuple[float, ...]:
            obb = entry["obb"]
            return oriented_box(obb["centroid"], obb["normalizedAxes"], obb["axesLengths"])

        number = int(entry.get("objectId", entry.get("id", -1))) + 1
        found.append(named_object(scene, number, entry.get("label"), box, problems))
    return one_of_each_id(scene, found, problems)
