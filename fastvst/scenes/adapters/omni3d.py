"""Omni3D JSON (SUN RGB-D, ARKitScenes, Hypersim) -> scenes of one image each, world frame = camera frame.

Format (arXiv 2207.10660): images {id, file_path, width, height, K}; annotations {image_id, category_name, valid3D,
bbox2D_tight / bbox2D_trunc / bbox2D_proj, center_cam, dimensions = [width, height, length], R_cam, behind_camera,
visibility, truncation}. Length lies on the box's local X, height on Y, width on Z. The axes are those of VST.

There is no depth map. The point of a sighting is therefore the projected centre of its box, with the depth of the
centre. An object whose centre lies in the 2D box of a nearer object gets visibility 0, so no question marks it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvst.scenes.scene import Scene, SceneObject, Sighting, View
from fastvst.spatial.boxes import angles
from fastvst.spatial.camera import Camera


def read_omni3d(
    annotation_file: str | Path, image_folder: str | Path, *, source: str = "omni3d", exclude: Collection[str] = ()
) -> Iterator[Scene]:
    """One scene for each image with at least one valid box.

    Args:
        image_folder: folder that every `file_path` is relative to.
        source: `data_source` of the rows.
        exclude: file paths, or ids as text, of images to leave out, such as a test split.

    Raises:
        ValueError: a file in another format, or an annotation without a usable box; names the annotation.
        FileNotFoundError: a missing image; names it.
    """
    data = json.loads(Path(annotation_file).read_text(encoding="utf-8"))
    if not isinstance(data, dict) or not {"images", "annotations"} <= set(data):
        raise ValueError(f"{annotation_file}: expected Omni3D JSON with images and annotations; got {_keys(data)}")
    names = {c["id"]: c["name"] for c in data.get("categories", [])}
    groups: dict[Any, list[dict[str, Any]]] = {}
    for annotation in data["annotations"]:
        groups.setdefault(annotation["image_id"], []).append(annotation)
    left_out = set(exclude)
    for entry in data["images"]:
        if str(entry["id"]) in left_out or entry["file_path"] in left_out:
            continue
        found = [a for a in groups.get(entry["id"], []) if a.get("valid3D", True) and not a.get("behind_camera", False)]
        if found:
            yield _scene(entry, found, names, Path(image_folder), source, str(annotation_file))


def _keys(data: Any) -> str:
    return f"keys {sorted(data)[:8]}" if isinstance(data, dict) else f"a {type(data).__name__}"


def _scene(
    entry: dict[str, Any], annotations: list[dict[str, Any]], names: dict, folder: Path, source: str, file: str
) -> Scene:
    path = folder / entry["file_path"]
    if not path.is_file():
        raise FileNotFoundError(f"{file}: image {entry['id']}: no such file {path}; set image_folder")
    with Image.open(path) as opened:
        image = np.asarray(opened.convert("RGB"))
    height, width = image.shape[:2]
    k = np.array(entry["K"], dtype=np.float64)
    sx = width / entry["width"]  # the stored image may be smaller than the annotated one
    sy = height / entry["height"]
    camera = Camera(width, height, k[0, 0] * sx, k[1, 1] * sy, k[0, 2] * sx, k[1, 2] * sy, np.eye(3), np.zeros(3))
    objects = [_object(a, number, names, file) for number, a in enumerate(annotations)]
    boxes_2d = [_box_2d(a, sx, sy) for a in annotations]
    view = View(camera, image, tuple(_sightings(camera, objects, boxes_2d, annotations)))
    metadata = {"source": source, "file": entry["file_path"]}
    return Scene(f"{source}-{entry['id']}", tuple(objects), (view,), metadata=metadata)


def _object(annotation: dict[str, Any], number: int, names: dict, file: str) -> SceneObject:
    """The annotation with index `number` in its image as an object with id `number` + 1."""
    called = f"{file}: annotation {annotation.get('id', number)}"
    name = annotation.get("category_name", names.get(annotation.get("category_id")))
    try:
        width, height, length = (float(x) for x in annotation["dimensions"])
        turn = angles(np.array(annotation["R_cam"], dtype=np.float64)[None])[0]
        box = (*(float(x) for x in annotation["center_cam"]), length, height, width, *(float(x) for x in turn))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{called}: no usable 3D box ({error!r})") from error
    if name is None or not np.isfinite(box).all() or min(width, height, length) <= 0:
        raise ValueError(f"{called}: name {name!r}, box {box}; expected a name and finite sizes > 0")
    return SceneObject(number + 1, str(name).replace("_", " "), box)


def _box_2d(a: dict[str, Any], sx: float, sy: float) -> np.ndarray | None:
    """x1, y1, x2, y2 in pixels of the stored image. Omni3D writes -1 where a box is missing."""
    for key in ("bbox2D_tight", "bbox2D_trunc", "bbox2D_proj"):
        box = a.get(key)
        if box is not None and len(box) == 4 and min(box[2:]) > 0:
            return np.array(box, dtype=np.float64) * [sx, sy, sx, sy]
    return None


def _sightings(
    camera: Camera, objects: list[SceneObject], boxes_2d: list[np.ndarray | None], annotations: list[dict[str, Any]]
) -> list[Sighting]:
    found = []
    centres = np.array([item.box[:3] for item in objects])
    u = camera.fx * centres[:, 0] / np.maximum(centres[:, 2], 1e-6) + camera.cx
    v = camera.fy * centres[:, 1] / np.maximum(centres[:, 2], 1e-6) + camera.cy
    for k, (item, box, annotation) in enumerate(zip(objects, boxes_2d, annotations, strict=True)):
        if box is None or centres[k, 2] <= 0.1:
            continue
        box = np.clip(box, 0, [camera.width, camera.height, camera.width, camera.height])
        covered = any(
            other is not None and centres[j, 2] < centres[k, 2] and _contains(other, u[k], v[k])
            for j, other in enumerate(boxes_2d)
            if j != k
        )
        x1, y1, x2, y2 = (float(x) for x in box)
        found.append(
            Sighting(
                object_id=item.id,
                visibility=_visibility(annotation) if _contains(box, u[k], v[k]) and not covered else 0.0,
                pixels=int(0.5 * (x2 - x1) * (y2 - y1)),  # an object fills about half of its 2D box
                box_2d=(x1, y1, x2, y2),
                point=(float(u[k]), float(v[k])),
                depth=float(centres[k, 2]),
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
