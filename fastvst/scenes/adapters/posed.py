"""Scans with posed frames and instance boxes (ScanNet, ScanNet++ style): one scene a folder, with video and pairs.

Layout of a scene folder; files of a frame are named by its number:

    color/0.jpg
    depth/0.png                      uint16, millimetres; 0 and 65535 = not measured
    instance/0.png                   uint16 object ids, 0 = none
    pose/0.txt                       4 x 4, camera to world
    intrinsic/intrinsic_depth.txt    4 x 4 or 3 x 3, in pixels of the depth map
    boxes.json                       {"instances": [{"id", "label", "center": [3], "size": [3], "heading": degrees}],
                                     optional: "axis_alignment": 4 x 4, "polygon": [[x, y], ...], "height": metres}

Boxes and outline are in the aligned world: metres, Z up. `size` is along x, y, z before the rotation by `heading` about
Z. Colour images are resized to the depth map, to which ScanNet registers them.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastvst import jsonl
from fastvst.data.media_files import opened_image
from fastvst.scenes.adapters.boxes import one_of_each_id
from fastvst.scenes.adapters.checks import (
    Convention,
    Problems,
    Report,
    box_problem,
    intrinsics_problem,
    outline_of,
    rotation_problem,
    size_problem,
)
from fastvst.scenes.adapters.depth import read_depth
from fastvst.scenes.adapters.frames import Frame, ScanOptions, assemble_from, camera_at
from fastvst.scenes.adapters.labels import clean_label
from fastvst.scenes.scene import Scene, SceneObject


def read_posed(
    folder: str | Path,
    *,
    frames: int = 20,
    stills: int = 4,
    pairs: int = 6,
    motions: int = 4,
    fps: float = 2.0,
    source: str = "posed",
    seed: int = 0,
    convention: Convention | None = None,
    report: Report | None = None,
) -> Scene:
    """The scene of one folder.

    Args:
        frames: frames of the video, spread evenly over the scan.
        stills: views for single-image questions, spread evenly over these frames.
        pairs: at most so many wide pairs, see `scene.wide_pairs`.
        motions: at most so many pairs for camera motion, see `frames.motion_pairs`.
        fps: frame rate of the video rows.
        source: `data_source` of the rows.
        seed: decides the surface points and the pairs.
        convention: how pose/*.txt are written; None is the layout above. The depth must lie in the boxes: otherwise the
            scene is refused, and the message names the convention that fits.
        report: called with every problem of one box or frame; that box or frame is then left out.

    Raises:
        FileNotFoundError: a missing file; names it.
        ValueError: depth and boxes that do not belong together; without `report` also an unusable pose, depth map or
            box. Names the scene and the frame or box.
    """
    folder = Path(folder)
    problems = Problems(report)
    described = jsonl.loads(_existing(folder / "boxes.json").read_text(encoding="utf-8"))
    objects = read_boxes(folder.name, described["instances"], problems)
    problems.finish()
    align = np.array(described.get("axis_alignment", np.eye(4)), dtype=np.float64)
    fault = rotation_problem(align[:3, :3])
    if fault is not None:
        raise ValueError(f"{folder}: axis_alignment: {fault}")
    poses = _poses(folder, align, convention or Convention(), problems)
    numbers = sorted(poses, key=lambda stem: (len(stem), stem))
    intrinsic = np.loadtxt(_existing(folder / "intrinsic" / "intrinsic_depth.txt"))
    polygon = described.get("polygon")
    return assemble_from(
        folder.name,
        objects,
        [poses[number][0] for number in numbers],
        lambda k: _frame(folder, numbers[k], poses[numbers[k]], intrinsic),
        options=ScanOptions(frames, stills, pairs, motions, fps, source=source, seed=seed),
        problems=problems,
        polygon=None if polygon is None else outline_of(polygon),
        height=described.get("height"),
    )


def _existing(path: Path) -> Path:
    """`path`, or FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected the layout described in fastvst.scenes.adapters.posed")
    return path


def read_boxes(scene: str, entries: list[dict[str, Any]], problems: Problems) -> tuple[SceneObject, ...]:
    """Boxes in the form of boxes.json as objects. One with an unusable box is kept with `known` = False, if it has an
    id and a label; two boxes of one id are both unusable."""
    found = []
    for entry in entries:
        try:
            item = _object(entry)
        except (KeyError, TypeError, ValueError) as error:
            problems.leave_out(f"{scene}: box {entry}: expected id, label, center, size, heading", error)
            continue
        fault = box_problem(item.box)
        if fault is not None:
            problems.add(ValueError(f"{scene}: box {item.id} ({item.name}): {fault}; no question is about it"))
            item = dataclasses.replace(item, known=False)
        found.append(item)
    return one_of_each_id(scene, found, problems)


def _object(entry: dict[str, Any]) -> SceneObject:
    x, y, z = (float(v) for v in entry["center"])
    dx, dy, dz = (float(v) for v in entry["size"])
    number = int(entry["id"])
    heading = float(entry.get("heading", 0.0))
    if number <= 0:
        raise ValueError(f"id {number}; expected an id > 0")
    return SceneObject(number, clean_label(entry["label"]), (x, y, z, dx, dz, dy, -90.0, 0.0, heading))


def _poses(
    folder: Path, align: np.ndarray, convention: Convention, problems: Problems
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Frame -> camera-to-world pose (4, 4) in the aligned world, and the aligned pose as stored."""
    found = {}
    for path in (folder / "pose").glob("*.txt"):
        try:
            stored = np.loadtxt(path).reshape(4, 4)
        except ValueError as error:
            problems.add(ValueError(f"{folder}: pose/{path.name}: {error}; expected 4 x 4 numbers; it is left out"))
            continue
        if not np.isfinite(stored).all():  # ScanNet writes -inf where tracking was lost
            continue
        fault = rotation_problem(stored[:3, :3])
        if fault is not None:
            determinant = float(np.linalg.det(stored[:3, :3]))
            text = f"{folder}: pose/{path.name} has determinant {determinant:.3f}; {fault}; the frame is left out"
            problems.add(ValueError(text))
            continue
        found[path.stem] = (align @ convention.read(stored), align @ stored)
    return found


def _frame(folder: Path, number: str, poses: tuple[np.ndarray, np.ndarray], intrinsic: np.ndarray) -> Frame:
    """One frame at the size of its depth map."""
    depth = read_depth(_existing(folder / "depth" / f"{number}.png"))
    height, width = depth.shape
    fault = intrinsics_problem(intrinsic, width, height)
    if fault is not None:
        raise ValueError(f"{folder}: intrinsic/intrinsic_depth.txt: {fault}")
    colour = next((p for p in (folder / "color").glob(f"{number}.*")), folder / "color" / f"{number}.jpg")
    with opened_image(_existing(colour)) as opened:
        fault = size_problem((width, height), opened.size)
        if fault is not None and abs(math.log(width * opened.height / height / opened.width)) > 0.05:
            raise ValueError(f"{folder}: color/{colour.name} and depth/{number}.png differ in shape: {fault}")
        image = np.asarray(opened.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
    with opened_image(_existing(folder / "instance" / f"{number}.png")) as opened:
        ids = np.asarray(opened.resize((width, height), Image.Resampling.NEAREST)).astype(np.int32)
    if ids.ndim != 2:
        raise ValueError(f"{folder}: instance/{number}.png has shape {ids.shape}; expected one channel of object ids")
    return Frame(number, camera_at(width, height, intrinsic, poses[0]), poses[1], image, depth, ids)
