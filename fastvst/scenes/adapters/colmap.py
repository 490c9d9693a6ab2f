"""Posed images of COLMAP and nerfstudio (transforms.json), and scans that come with them: ScanNet++.

nerfstudio (docs.nerf.studio): {"fl_x", "fl_y", "cx", "cy", "w", "h", "frames": [{"file_path", "transform_matrix",
"depth_file_path"}]}; camera to world, OpenGL axes; intrinsics may stand in each frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastvst.data.media_files import opened_image
from fastvst.scenes.adapters.boxes import named_object, object_number, one_of_each_id, oriented_box, read_json
from fastvst.scenes.adapters.checks import (
    Convention,
    Problems,
    Report,
    intrinsics_problem,
    outline_of,
    rotation_problem,
)
from fastvst.scenes.adapters.colmap_model import PARAMETERS, ColmapCamera, read_model
from fastvst.scenes.adapters.depth import read_depth
from fastvst.scenes.adapters.frames import Frame, ScanOptions, assemble_from, make_frame, named
from fastvst.scenes.adapters.images import stored_image
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
    """The images of a COLMAP model, text or binary, sorted by name.

    Raises:
        FileNotFoundError: no model.
        ValueError: a damaged line or file, a camera model with strong distortion, or an unknown one.
    """
    images = read_model(folder)
    matrices: dict[ColmapCamera, np.ndarray] = {}
    for camera in {item.camera for item in images}:
        try:
            matrices[camera] = colmap_intrinsics(camera.model, camera.width, camera.height, list(camera.params))
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
    return [PosedImage(item.name, matrices[item.camera], item.pose) for item in images]


def colmap_intrinsics(model: str, width: float, height: float, values: list[float]) -> np.ndarray:
    """Intrinsics (3, 3) of a COLMAP camera without its distortion.

    Raises:
        ValueError: an unknown model, another number of parameters, or distortion that moves a corner of the image by
            more than 1 % of the width.
    """
    if model not in PINHOLE:
        raise ValueError(f"camera model {model}; expected one of {sorted(PINHOLE)} (undistort the images first)")
    if len(values) != PARAMETERS[model]:
        raise ValueError(f"camera model {model} has {len(values)} parameters; expected {PARAMETERS[model]}")
    focal = values[: PINHOLE[model]]
    fx = focal[0]
    fy = focal[-1]
    cx, cy, *bend = values[PINHOLE[model] :]
    padded = bend + [0.0] * (8 - len(bend))
    k1, k2, p1, p2, k3, k4, k5, k6 = padded
    matrix = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])
    check_distortion(matrix, (width, height), (k1, k2, k3), (p1, p2), (k4, k5, k6))
    return matrix


def check_distortion(
    matrix: np.ndarray,
    size: tuple[float, float],
    radial: tuple[float, ...],
    tangential: tuple[float, float],
    below: tuple[float, ...] = (),
) -> None:
    """Check that a lens moves no corner of the image (width, height) by more than 1 % of the width.

    Args:
        radial: k1, k2, ... of 1 + k1 r^2 + k2 r^4 + ...; below: the same of the denominator (OpenCV's k4 to k6).
        tangential: p1, p2.

    Raises:
        ValueError: it does, or the parameters are not finite.
    """
    u = np.array([0.0, 1, 0, 1]) * size[0]
    v = np.array([0.0, 0, 1, 1]) * size[1]
    with np.errstate(all="ignore"):  # parameters of a damaged file may be of any size
        x = (u - matrix[0, 2]) / matrix[0, 0]
        y = (v - matrix[1, 2]) / matrix[1, 1]
        square = x * x + y * y
        factor, divisor = (1 + sum(k * square ** (i + 1) for i, k in enumerate(ks)) for ks in (radial, below))
        p1, p2 = tangential
        right = x * (factor / divisor - 1) + 2 * p1 * x * y + p2 * (square + 2 * x * x)
        down = y * (factor / divisor - 1) + p1 * (square + 2 * y * y) + 2 * p2 * x * y
        moved = float(np.hypot(matrix[0, 0] * right, matrix[1, 1] * down).max())
    if not moved <= BENT * size[0]:
        raise ValueError(f"distortion moves a corner by {moved:.0f} pixels; undistort the images first")


def read_transforms(path: Path, convention: Convention, problems: Problems) -> list[PosedImage]:
    """The images of a nerfstudio transforms.json in its own order."""
    data = read_json(path)
    found = []
    for k, entry in enumerate(data.get("frames", [])):
        try:
            model = str(entry.get("camera_model", data.get("camera_model", "OPENCV")))
            if model not in PINHOLE:
                raise ValueError(
                    f"camera model {model}; expected one of {sorted(PINHOLE)} (undistort the images first)"
                )
            values = [float(entry.get(key, data.get(key, np.nan))) for key in ("fl_x", "fl_y", "cx", "cy", "w", "h")]
            bend = {key: float(entry.get(key, data.get(key, 0.0))) for key in ("k1", "k2", "k3", "k4", "p1", "p2")}
            stored = np.array(entry["transform_matrix"], dtype=np.float64).reshape(4, 4)
            fault = rotation_problem(stored[:3, :3])
            if fault is not None:
                raise ValueError(fault)
            fx, fy, cx, cy, width, height = values
            matrix = np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])
            *radial, p1, p2 = bend.values()
            check_distortion(matrix, (width, height), tuple(radial), (p1, p2))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            called = entry.get("file_path") if isinstance(entry, dict) else entry
            problems.add(ValueError(f"{path}: frame {k} ({called}): {error!r}; it is left out"))
            continue
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
    pixels = stored_image(image, options.width)
    fault = intrinsics_problem(item.intrinsics, *pixels.stored)
    if fault is not None:
        raise ValueError(f"{image}: {fault}")
    matrix = np.diag([pixels.size[0] / pixels.stored[0], pixels.size[1] / pixels.stored[1], 1.0]) @ item.intrinsics
    ids = None
    if masks is not None and masks.is_file():
        with opened_image(masks) as opened:
            ids = np.asarray(opened).astype(np.int32)
    return make_frame(item.name, pixels, read_depth(depth), matrix, pose, objects, options, ids)


def read_scannetpp(folder: str | Path, options: ScanOptions | None = None, *, report: Report | None = None) -> Scene:
    """The scene of one ScanNet++ scan (iPhone frames), as its toolkit extracts them.

        scans/segments_anno.json              {"segGroups": [{"objectId", "label", "obb"}]}
        iphone/colmap/cameras.txt, images.txt
        iphone/rgb/frame_000000.jpg           from rgb.mkv
        iphone/depth/frame_000000.png         uint16, millimetres; from depth.bin

    `scannetpp_dslr.read_scannetpp_dslr` reads the DSLR images.

    Raises:
        FileNotFoundError: a missing file; names it, and the toolkit's command that makes it.
        ValueError: depth that does not lie in the boxes; without `report` any problem.
    """
    folder = Path(folder)
    problems = Problems(report)
    options = named(options, "scannetpp")
    objects = obb_objects(folder.name, read_json(folder / "scans" / "segments_anno.json"), problems)
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


def obb_objects(scene: str, annotation: dict[str, Any], problems: Problems) -> tuple[SceneObject, ...]:
    """Objects from oriented boxes {"centroid", "axesLengths", "normalizedAxes"}; each axis is three numbers."""
    found = []
    for entry in annotation["segGroups"]:

        def box(entry: dict[str, Any] = entry) -> tuple[float, ...]:
            obb = entry["obb"]
            return oriented_box(obb["centroid"], obb["normalizedAxes"], obb["axesLengths"])

        number = object_number(scene, entry, 1, problems)
        if number is None:
            continue
        found.append(named_object(scene, number, entry.get("label"), box, problems))
    return one_of_each_id(scene, found, problems)
