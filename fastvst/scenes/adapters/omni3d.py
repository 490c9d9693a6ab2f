"""Omni3D JSON (SUN RGB-D, ARKitScenes, Hypersim) -> scenes of one picture each, world frame = camera frame.

Format (arXiv 2207.10660): images {id, file_path, width, height, K}; annotations {image_id, category_name, valid3D,
bbox2D_tight / bbox2D_trunc / bbox2D_proj, center_cam, dimensions = [width, height, length], R_cam, behind_camera,
visibility, truncation}. Length lies on the box's local X, height on Y, width on Z; the axes are those of VST.

There is no depth map, so an object's dot is the projection of its centre and its depth that of the centre; an object
whose centre is covered by the box of a nearer one is not asked about by its dot.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvst.scenes.scene import Scene, SceneObject, Sighting, View
from fastvst.spatial.boxes import angles
from fastvst.spatial.camera import Camera

logger = logging.getLogger(__name__)


def read_omni3d(
    annotation_file: str | Path, image_folder: str | Path, *, source: str = "omni3d", exclude: Collection[str] = ()
) -> Iterator[Scene]:
    """One scene for each picture that has a valid box.

    Args:
        image_folder: where the `file_path`s start.
        source: `data_source` of the rows.
        exclude: file paths, or ids as text, of pictures to leave out (a test split).

    Raises:
        ValueError: a file that is not Omni3D's, an annotation without its box; names the annotation.
        FileNotFoundError: a picture that is not there; names it.
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
        raise FileNotFoundError(f"{file}: image {entry['id']}: no such picture {path}; set image_folder")
    with Image.open(path) as opened:
        image = np.asarray(opened.convert("RGB"))
    height, width = image.shape[:2]
    k = np.array(entry["K"], dtype=np.float64)
    sx = width / entry["width"]
    sy = height / entry["height"]  # stored pictures may be smaller than annotated
    camera = Camera(width, height, k[0, 0] * sx, k[1, 1] * sy, k[0, 2] * sx, k[1, 2] * sy, np.eye(3), np.zeros(3))
    objects = []
    boxes_2d = []
    for number, a in enumerate(annotations):
        name = a.get("category_name", names.get(a.get("category_id")))
        try:
            w, h, length = (float(x) for x in a["dimensions"])
            turn = angles(np.array(a["R_cam"], dtype=np.float64)[None])[0]
            box = (*(float(x) for x in a["center_cam"]), length, h, w, *(float(x) for x in turn))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{file}: annotation {a.get('id', number)}: no usable 3D box ({error!r})") from error
        if name is None or not np.isfinite(box).all() or min(w, h, length) <= 0:
            raise ValueError(
                f"{file}: annotation {a.get('id', number)}: name {name!r}, box {box}; expected finite sizes > 0"
            )
        objects.append(SceneObject(number + 1, str(name).replace("_", " "), box))
        boxes_2d.append(_box_2d(a, sx, sy))
    sightings = _sightings(camera, objects, boxes_2d, annotations)
    view = View(camera, image, tuple(sightings))
    return Scene(
        f"{source}-{entry['id']}", tuple(objects), (view,), metadata={"source": source, "file": entry["file_path"]}
    )


def _box_2d(a: dict[str, Any], sx: float, sy: float) -> np.ndarray | None:
    """x1, y1, x2, y2 in pixels of the picture; Omni3D writes -1 where it has none."""
    for key in ("bbox2D_tight", "bbox2D_trunc", "bbox2D_proj"):
        box = a.get(key)
        if box is not None and len(box) == 4 and min(box[2:]) > 0:
            return np.array(box, dtype=np.float64) * [sx, sy, sx, sy]
    return None


def _sightings(
    camera: Camera, objects: list[SceneObject], boxes_2d: list[np.ndarray | None], annotations: list[dict[str, Any]]
) -> list[Sighting]:
    found = []
    centres = np.array([thing.box[:3] for thing in objects])
    u = camera.fx * centres[:, 0] / np.maximum(centres[:, 2], 1e-6) + camera.cx
    v = camera.fy * centres[:, 1] / np.maximum(centres[:, 2], 1e-6) + camera.cy
    for k, (thing, box, a) in enumerate(zip(objects, boxes_2d, annotations, strict=True)):
        if box is None or centres[k, 2] <= 0.1:
            continue
        box = np.clip(box, 0, [camera.width, camera.height, camera.width, camera.height])
        inside = box[0] <= u[k] <= box[2] and box[1] <= v[k] <= box[3]
        covered = any(
            other is not None
            and centres[j, 2] < centres[k, 2]
            and other[0] <= u[k] <= other[2]
            and other[1] <= v[k] <= other[3]
            for j, other in enumerate(boxes_2d)
            if j != k
        )
        seen = a.get("visibility", -1)
        cut = a.get("truncation", -1)
        visibility = (1.0 if seen is None or seen < 0 else float(seen)) * (
            1.0 if cut is None or cut < 0 else 1.0 - float(cut)
        )
        x1, y1, x2, y2 = (float(x) for x in box)
        found.append(
            Sighting(
                object_id=thing.id,
                visibility=visibility if inside and not covered else 0.0,
                pixels=int(0.5 * (x2 - x1) * (y2 - y1)),  # a thing fills about half of its 2D box
                box_2d=(x1, y1, x2, y2),
                point=(float(u[k]), float(v[k])),
                depth=float(centres[k, 2]),
            )
        )
    return found
