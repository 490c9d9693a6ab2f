"""ARKitScenes (3D object detection set) as it is distributed: one folder a video.

    <video>_3dod_annotation.json
    <video>_frames/lowres_wide.traj                               the files may also lie in the folder itself
    <video>_frames/lowres_wide/<video>_<time>.png                 256 x 192; vga_wide (640 x 480) is preferred
    <video>_frames/lowres_depth/<video>_<time>.png                uint16, millimetres
    <video>_frames/lowres_wide_intrinsics/<video>_<time>.pincam   width height fx fy cx cy; also vga_wide_intrinsics

A line of the trajectory holds the time, the rotation from world to camera as an axis times its angle, and the
translation. The world has Z up. Some scans are held sideways: the frames are turned by the poses, because the table
"sky_direction" of the data set is often wrong. Boxes are given in metres in some releases and in centimetres in others:
the depth decides.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fastvst.scenes.adapters.boxes import named_object, oriented_box, read_json
from fastvst.scenes.adapters.checks import Problems, Report, intrinsics_problem
from fastvst.scenes.adapters.depth import read_depth
from fastvst.scenes.adapters.frames import Frame, ScanOptions, assemble_from, make_frame, named, spread
from fastvst.scenes.adapters.images import stored_image
from fastvst.scenes.adapters.units import unit_of_boxes
from fastvst.scenes.scene import Scene, SceneObject

LATE = 0.05  # seconds between a frame and its pose or intrinsics; frames come every 0.1 s or faster


def read_arkitscenes(
    folder: str | Path,
    options: ScanOptions | None = None,
    *,
    report: Report | None = None,
) -> Scene:
    """The scene of one video.

    Args:
        report: called with every problem of one object or frame; that object or frame is then left out.

    Raises:
        FileNotFoundError: a missing file; names it.
        ValueError: a damaged file, or depth that does not lie in the boxes; without `report` also any problem.
    """
    folder = Path(folder)
    name = folder.name
    problems = Problems(report)
    options = named(options, "arkitscenes")
    frames = folder / f"{name}_frames" if (folder / f"{name}_frames").is_dir() else folder
    annotation = read_json(folder / f"{name}_3dod_annotation.json")
    if not isinstance(annotation, dict) or not isinstance(annotation.get("data"), list):
        raise ValueError(f"{folder}: {name}_3dod_annotation.json has no list 'data' of objects")
    if annotation.get("skipped"):
        raise ValueError(f"{folder}: the annotation says that this video was skipped")
    trajectory = read_trajectory(frames / "lowres_wide.traj", problems)
    color = "vga_wide" if (frames / "vga_wide").is_dir() else "lowres_wide"
    images = _by_time(frames / color, ".png")
    depths = _by_time(frames / "lowres_depth", ".png")
    lenses = _by_time(frames / f"{color}_intrinsics", ".pincam")
    times = []
    poses = []
    for time in sorted(images):
        near = int(np.argmin(np.abs(trajectory[0] - time)))
        if abs(trajectory[0][near] - time) <= LATE:
            times.append(time)
            poses.append(trajectory[1][near])

    def load(k: int, objects: tuple[SceneObject, ...]) -> Frame:
        image = stored_image(images[times[k]], options.width)
        width, height, fx, fy, cx, cy = np.loadtxt(_at(lenses, times[k], "pincam"))
        scale = np.diag([image.size[0] / width, image.size[1] / height, 1.0])
        k3 = scale @ np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])
        fault = intrinsics_problem(k3, *image.size)
        if fault is not None:
            raise ValueError(fault)
        depth = read_depth(_at(depths, times[k], "depth"))
        return make_frame(images[times[k]].stem, image, depth, k3, poses[k], objects, options)

    bare = [load(k, ()) for k in spread(len(times), 6)] if times else []
    unheard = Problems(lambda _: None)
    unit = unit_of_boxes(name, lambda u: _objects(name, annotation, u, unheard), bare, (1.0, 0.01))
    objects = _objects(name, annotation, unit, problems)
    scene = assemble_from(name, objects, poses, lambda k: load(k, objects), options=options, problems=problems)
    return dataclasses.replace(scene, metadata={**scene.metadata, "format": "arkitscenes"})


def read_trajectory(path: Path, problems: Problems | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Times (N,) in seconds and camera-to-world poses (N, 4, 4).

    Args:
        problems: gets the lines without seven finite numbers, which are left out; None raises the first one.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: no usable line; without `problems` a line without seven finite numbers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            values = [float(word) for word in line.split()]
        except ValueError:
            values = []
        if len(values) == 7 and np.isfinite(values).all():
            rows.append(values)
        elif line.strip():
            error = ValueError(
                f"{path}: line {number}: {line[:80]!r}; expected time, rotation, translation as 7 numbers"
            )
            if problems is None:
                raise error
            problems.add(ValueError(f"{error}; it is left out"))
    if not rows:
        raise ValueError(f"{path}: no line of 7 numbers")
    table = np.array(rows)
    poses = np.zeros((len(table), 4, 4))
    poses[:, 3, 3] = 1
    turn = _rodrigues(table[:, 1:4])  # world to camera
    poses[:, :3, :3] = turn.transpose(0, 2, 1)
    poses[:, :3, 3] = -np.einsum("nji,nj->ni", turn, table[:, 4:7])
    return table[:, 0], poses


def _rodrigues(vectors: np.ndarray) -> np.ndarray:
    """Axis times angle (N, 3) -> rotations (N, 3, 3)."""
    angle = np.linalg.norm(vectors, axis=1)
    axis = vectors / np.maximum(angle, 1e-12)[:, None]
    k = np.zeros((len(vectors), 3, 3))
    k[:, 0, 1] = -axis[:, 2]
    k[:, 0, 2] = axis[:, 1]
    k[:, 1, 2] = -axis[:, 0]
    k = k - k.transpose(0, 2, 1)
    sine = np.sin(angle)[:, None, None]
    return np.eye(3) + sine * k + (1 - np.cos(angle))[:, None, None] * (k @ k)


def _by_time(folder: Path, ending: str) -> dict[float, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing")
    return {float(p.stem.split("_")[-1]): p for p in folder.glob(f"*{ending}")}


def _at(files: dict[float, Path], time: float, what: str) -> Path:
    """The file of a time: names of one frame differ by a millisecond between the folders."""
    near = min(files, key=lambda t: abs(t - time), default=None)
    if near is None or abs(near - time) > LATE:
        raise ValueError(f"no {what} within {LATE} s of {time}")
    return files[near]


def _objects(name: str, annotation: dict[str, Any], unit: float, problems: Problems) -> tuple[SceneObject, ...]:
    """`unit`: metres of one unit of the annotation."""
    found = []
    uids = Counter(str(entry["uid"]) for entry in annotation["data"] if isinstance(entry, dict) and "uid" in entry)
    for number, entry in enumerate(annotation["data"], 1):
        if not isinstance(entry, dict):
            problems.add(ValueError(f"{name}: object {number}: {entry!r}; expected label and segments; it is left out"))
            continue

        def box(entry: dict[str, Any] = entry) -> tuple[float, ...]:
            obb = entry["segments"].get("obbAligned") or entry["segments"]["obb"]
            return oriented_box(
                np.array(obb["centroid"], dtype=np.float64) * unit,
                obb["normalizedAxes"],
                np.array(obb["axesLengths"], dtype=np.float64) * unit,
            )

        item = named_object(name, number, entry.get("label"), box, problems)
        if item is not None and uids[str(entry.get("uid"))] > 1:
            problems.add(ValueError(f"{name}: object {number} ({item.name}): several have the uid {entry['uid']}"))
            item = dataclasses.replace(item, known=False)
        if item is not None:
            found.append(item)
    return tuple(found)
