"""Omni3D JSON (SUN RGB-D, ARKitScenes, Hypersim) -> scenes of one image each, world frame = camera frame.

Format (arXiv 2207.10660): images {id, file_path, width, height, K}; annotations {image_id, category_name, valid3D,
bbox2D_tight / bbox2D_trunc / bbox2D_proj, center_cam, dimensions = [width, height, length], R_cam, behind_camera,
visibility, truncation, lidar_pts, segmentation_pts, depth_error}. Length lies on the box's local X, height on Y, width
on Z. The axes are those of VST.

Objects that Omni3D's own loader ignores (valid3D false, behind the camera, sizes <= 0, no points, a depth error above
0.5, truncation >= 0.99, visibility <= 0.01) are never asked about, but the image may show them: they count for the
uniqueness of names and for "all".

There is no depth map. The point of a sighting is therefore the projected centre of its box, and its depth is only known
to lie between the nearest and the farthest corner of the box (`Sighting.span`). An object whose centre lies in the 2D
box of an object that may be nearer gets visibility 0, so no question marks it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastvst import jsonl
from fastvst.data.media_files import opened_image
from fastvst.scenes.adapters.checks import (
    Problems,
    Report,
    box_problem,
    intrinsics_problem,
    rotation_problem,
    size_problem,
)
from fastvst.scenes.adapters.labels import clean_label
from fastvst.scenes.scene import Scene, SceneObject, Sighting, View
from fastvst.spatial.boxes import angles, corners, rotations
from fastvst.spatial.camera import Camera, project

UNKNOWN_BOX = (math.nan,) * 9
LARGEST = 20.0  # metres; if the median object of an image is larger, its sizes are not in metres


def read_omni3d(
    annotation_file: str | Path,
    image_folder: str | Path,
    *,
    source: str = "omni3d",
    exclude: Collection[str] = (),
    report: Report | None = None,
) -> Iterator[Scene]:
    """One scene for each image with at least one valid box.

    Args:
        image_folder: folder that every `file_path` is relative to.
        source: `data_source` of the rows.
        exclude: file paths, or ids as text, of images to leave out, such as a test split.
        report: called with every problem of one image or annotation; None raises the first one after all good scenes.

    Raises:
        ValueError: a file in another format; without `report` also an image or annotation that cannot be used, named.
        FileNotFoundError: without `report`, a missing image; names it.
    """
    data = jsonl.loads(Path(annotation_file).read_text(encoding="utf-8"))
    if not isinstance(data, dict) or not {"images", "annotations"} <= set(data):
        raise ValueError(f"{annotation_file}: expected Omni3D JSON with images and annotations; got {_keys(data)}")
    problems = Problems(report)
    names = {c["id"]: c["name"] for c in data.get("categories", [])}
    groups: dict[Any, list[dict[str, Any]]] = {}
    for annotation in data["annotations"]:
        groups.setdefault(annotation.get("image_id"), []).append(annotation)
    left_out = set(exclude)
    seen: set[Any] = set()
    for entry in data["images"]:
        if str(entry.get("id")) in left_out or entry.get("file_path") in left_out:
            continue
        try:
            if entry["id"] in seen:
                raise ValueError(f"two images have the id {entry['id']}")
            seen.add(entry["id"])
            scene = _scene(entry, groups.get(entry["id"], []), names, Path(image_folder), source, problems)
        except (OSError, ValueError, KeyError, TypeError) as error:
            problems.leave_out(f"{annotation_file}: image {entry.get('id')}", error)
            continue
        if scene is not None:
            yield scene
    problems.finish()


def _keys(data: Any) -> str:
    return f"keys {sorted(data)[:8]}" if isinstance(data, dict) else f"a {type(data).__name__}"


def _scene(
    entry: dict[str, Any], annotations: list[dict[str, Any]], names: dict, folder: Path, source: str, problems: Problems
) -> Scene | None:
    """The scene of one image, or None if no annotation is valid."""
    path = folder / entry["file_path"]
    if not path.is_file():
        raise FileNotFoundError(f"no such file {path}; set image_folder")
    objects = []
    described = []
    for number, annotation in enumerate(annotations):
        item = _object(annotation, number, names, f"image {entry['id']}", problems)
        if item is not None:
            objects.append(item)
            described.append(annotation)
    if not any(item.known for item in objects):
        return None
    typical = float(np.median([max(item.box[3:6]) for item in objects if item.known]))
    if typical > LARGEST:
        raise ValueError(f"the median object is {typical:.0f} units large; expected metres")
    with opened_image(path) as opened:
        image = np.asarray(opened.convert("RGB"))
    camera = _camera(entry, image)
    boxes_2d = [_box_2d(a, image.shape[1] / entry["width"], image.shape[0] / entry["height"]) for a in described]
    _check_boxes_2d(camera, objects, boxes_2d)
    view = View(camera, image, tuple(_sightings(camera, objects, boxes_2d, described)))
    metadata = {"source": source, "file": entry["file_path"]}
    return Scene(
        f"{source}-{entry['id']}",
        tuple(item for item in objects if item.known),
        (view,),
        up=_up(objects),
        ignored=tuple(item for item in objects if not item.known),
        metadata=metadata,
    )


def _camera(entry: dict[str, Any], image: np.ndarray) -> Camera:
    """The camera of the stored image, which may be smaller than the annotated one."""
    height, width = image.shape[:2]
    fault = intrinsics_problem(entry["K"], entry["width"], entry["height"])
    fault = fault or size_problem((width, height), (entry["width"], entry["height"]))
    if fault is not None:
        raise ValueError(fault)
    k = np.array(entry["K"], dtype=np.float64)
    sx = width / entry["width"]
    sy = height / entry["height"]
    return Camera(width, height, k[0, 0] * sx, k[1, 1] * sy, k[0, 2] * sx, k[1, 2] * sy, np.eye(3), np.zeros(3))


def _object(annotation: dict[str, Any], number: int, names: dict, image: str, problems: Problems) -> SceneObject | None:
    """The annotation with index `number` in its image as an object with id `number` + 1; None without a class name."""
    called = f"{image}: annotation {annotation.get('id', number)}"
    try:
        name = clean_label(annotation.get("category_name", names.get(annotation.get("category_id"))))
    except ValueError as error:
        problems.add(ValueError(f"{called}: {error}; it is left out"))
        return None
    if ignored(annotation):
        return SceneObject(number + 1, name, UNKNOWN_BOX, known=False)
    try:
        width, height, length = (float(x) for x in annotation["dimensions"])
        rotation = np.array(annotation["R_cam"], dtype=np.float64)
        fault = rotation_problem(rotation)
        box: tuple[float, ...] = UNKNOWN_BOX
        if fault is None:
            turn = angles(rotation[None])[0]
            box = (*(float(x) for x in annotation["center_cam"]), length, height, width, *(float(x) for x in turn))
            fault = box_problem(box)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        fault = f"no usable 3D box ({error!r})"
        box = UNKNOWN_BOX
    if fault is not None:
        problems.add(ValueError(f"{called} ({name}): {fault}; no usable 3D box: no question is about it"))
    return SceneObject(number + 1, name, box, known=fault is None)


def ignored(annotation: dict[str, Any]) -> bool:
    """Whether Omni3D's own loader ignores an annotation (`is_ignore` in facebookresearch/omni3d)."""

    def number(key: str) -> float:
        value = annotation.get(key)
        return -1.0 if value is None else float(value)

    if not annotation.get("valid3D", True) or annotation.get("behind_camera", False):
        return True
    sizes = annotation.get("dimensions")
    if isinstance(sizes, (list, tuple)) and any(isinstance(x, (int, float)) and x <= 0 for x in sizes):
        return True
    return (
        number("lidar_pts") == 0
        or number("segmentation_pts") == 0
        or number("depth_error") > 0.5
        or number("truncation") >= 0.99
        or 0 <= number("visibility") <= 0.01
    )


def _up(objects: list[SceneObject]) -> tuple[float, float, float] | None:
    """The direction up: boxes of indoor data sets stand on the floor, so their local Y axes all point down.

    None if two of the boxes differ by more than 3 degrees.
    """
    turned = rotations(np.array([item.box[6:9] for item in objects if item.known]))
    axes = -turned[:, :, 1]
    mean = axes.mean(0)
    length = float(np.linalg.norm(mean))
    if length < 0.9 or (axes @ (mean / length)).min() < math.cos(math.radians(1.5)):
        return None
    return tuple(float(x) for x in mean / length)  # type: ignore[return-value]


def _box_2d(a: dict[str, Any], sx: float, sy: float) -> np.ndarray | None:
    """x1, y1, x2, y2 in pixels of the stored image. Omni3D writes -1 where a box is missing."""
    for key in ("bbox2D_tight", "bbox2D_trunc", "bbox2D_proj"):
        box = a.get(key)
        if (
            box is not None
            and len(box) == 4
            and np.isfinite(box).all()
            and box[2] > max(box[0], 0)
            and box[3] > max(box[1], 0)
        ):
            return np.array(box, dtype=np.float64) * [sx, sy, sx, sy]
    return None


def _check_boxes_2d(camera: Camera, objects: list[SceneObject], boxes_2d: list[np.ndarray | None]) -> None:
    """Raise ValueError if the 3D boxes do not project to the 2D boxes: wrong intrinsics, axes or units.

    What is visible of an object lies inside the projection of its 3D box: of most 2D boxes more than half must.
    """
    shares = []
    for item, box in zip(objects, boxes_2d, strict=True):
        pixels, ahead = project(camera, corners([item.box])[0])
        if not item.known or box is None or ahead.min() <= 0.1:
            continue
        low = np.maximum(pixels.min(0), box[:2])
        high = np.minimum(pixels.max(0), box[2:])
        shares.append(float(np.prod(np.maximum(high - low, 0)) / np.prod(box[2:] - box[:2])))
    if shares and np.median(shares) < 0.5:
        raise ValueError(
            f"the 3D boxes do not project to the 2D boxes (median share inside: {np.median(shares):.0%}); "
            "are the intrinsics, the axes or the units others?"
        )


def _sightings(
    camera: Camera, objects: list[SceneObject], boxes_2d: list[np.ndarray | None], annotations: list[dict[str, Any]]
) -> list[Sighting]:
    """What the image shows. An object that is not known, or that has no 2D box, may be anywhere in the image."""
    size = np.array([camera.width, camera.height, camera.width, camera.height], dtype=np.float64)
    frame = np.array([0.0, 0.0, camera.width, camera.height])
    spans = [
        (float(z.min()), float(z.max())) if item.known else (0.0, math.inf)
        for item, z in ((item, corners([item.box])[0][:, 2]) for item in objects)
    ]
    found = []
    for k, (item, box, annotation) in enumerate(zip(objects, boxes_2d, annotations, strict=True)):
        if annotation.get("behind_camera", False) or (item.known and spans[k][1] <= 0.1):
            continue  # the image cannot show it
        whole = frame if box is None else np.clip(box, 0, size)
        x1, y1, x2, y2 = (float(x) for x in whole)
        u = (x1 + x2) / 2
        v = (y1 + y2) / 2
        depth = 0.0
        if item.known:
            x, y, depth = item.box[:3]
            u = camera.fx * x / max(depth, 1e-6) + camera.cx
            v = camera.fy * y / max(depth, 1e-6) + camera.cy
        covered = any(
            other is not None and spans[j][0] < depth and _contains(other, u, v)
            for j, other in enumerate(boxes_2d)
            if j != k
        )
        clear = item.known and box is not None and spans[k][0] > 0.1 and _contains(whole, u, v) and not covered
        found.append(
            Sighting(
                object_id=item.id,
                visibility=_visibility(annotation) if clear else 0.0,
                pixels=int(0.5 * (x2 - x1) * (y2 - y1)),  # an object fills about half of its 2D box
                box_2d=(x1, y1, x2, y2),
                point=(u, v),
                depth=depth,
                span=spans[k],
            )
        )
    return found


def _contains(box: np.ndarray, u: float, v: float) -> bool:
    return bool(box[0] <= u <= box[2] and box[1] <= v <= box[3])


def _visibility(annotation: dict[str, Any]) -> float:
    """Visible share times the share inside the image; Omni3D writes -1 where it does not know one of them."""
    visible = annotation.get("visibility", -1)
    truncated = annotation.get("truncation", -1)
    visible = 1.0 if visible is None or visible < 0 else float(visible)
    return visible * (1.0 if truncated is None or truncated < 0 else 1.0 - float(truncated))
