"""ScanNet as it is distributed: one folder a scan, sceneXXXX_XX.

    sceneXXXX_XX.sens                                    or color/0.jpg, depth/0.png, pose/0.txt, intrinsic/*.txt
    sceneXXXX_XX.txt                                     "axisAlignment = 16 numbers"
    sceneXXXX_XX.aggregation.json                        objects as groups of segments
    sceneXXXX_XX_vh_clean_2.0.010000.segs.json           segment of each vertex of
    sceneXXXX_XX_vh_clean_2.ply                          the mesh
    instance-filt/0.png                                  optional: object id + 1 of each pixel

The annotation of the full mesh (_vh_clean.aggregation.json, _vh_clean.segs.json, _vh_clean.ply) is read where that of
the small mesh is missing. An object's box is the upright box of least floor area around its vertices.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fastvst.data.media_files import opened_image
from fastvst.scenes.adapters.boxes import read_json, read_ply_points, segment_boxes
from fastvst.scenes.adapters.checks import Problems, Report, intrinsics_problem, rotation_problem
from fastvst.scenes.adapters.depth import read_depth
from fastvst.scenes.adapters.frames import Frame, ScanOptions, assemble_from, make_frame, named
from fastvst.scenes.adapters.images import StoredImage, stored_image
from fastvst.scenes.adapters.sens import SensFile
from fastvst.scenes.scene import Scene, SceneObject

Shot = tuple[np.ndarray | StoredImage, np.ndarray, tuple[int, int]]  # image, depth, its stored size (width, height)


def read_scannet(
    folder: str | Path,
    options: ScanOptions | None = None,
    *,
    label_map: str | Path | None = None,
    label_column: str = "nyu40class",
    report: Report | None = None,
) -> Scene:
    """The scene of one scan.

    Args:
        label_map: scannetv2-labels.combined.tsv; None keeps the annotators' own labels.
        label_column: column of that table with the class names.
        report: called with every problem of one object or frame; that object or frame is then left out.

    Raises:
        FileNotFoundError: a missing file; names it.
        ValueError: a damaged file, or depth that does not lie in the boxes; without `report` also any problem.
    """
    folder = Path(folder)
    problems = Problems(report)
    options = named(options, "scannet")
    align = axis_alignment(folder, problems)
    labels = None if label_map is None else _label_map(Path(label_map), label_column)
    objects = _objects(folder, align, labels, problems)
    if (folder / "color").is_dir():
        numbers, poses, color, load = _exported(folder, options.width, problems)
        return _scene(folder, objects, align, numbers, poses, color, load, options, problems)
    path = folder / f"{folder.name}.sens"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: neither {path.name} nor color/, depth/, pose/ and intrinsic/")
    with SensFile(path) as sens:
        numbers = [str(k) for k in range(sens.count)]
        load = lambda name: (*sens.shot(int(name), options.width), sens.color_size)  # noqa: E731
        return _scene(folder, objects, align, numbers, sens.poses, sens.color_intrinsics, load, options, problems)


def axis_alignment(folder: Path, problems: Problems) -> np.ndarray:
    """The matrix (4, 4) from the scan's world to the aligned one, from sceneXXXX_XX.txt; the identity if absent."""
    path = folder / f"{folder.name}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it holds axisAlignment")
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition("=")
        if key.strip() == "axisAlignment":
            try:
                matrix = np.array(value.split(), dtype=np.float64).reshape(4, 4)
            except ValueError as error:
                raise ValueError(f"{path}: axisAlignment: {error}; expected 16 numbers") from error
            fault = rotation_problem(matrix[:3, :3])
            if fault is not None:
                raise ValueError(f"{path}: axisAlignment: {fault}")
            return matrix
    problems.add(ValueError(f"{path}: no axisAlignment (the test scans have none); the scan's own axes are taken"))
    return np.eye(4)


def _label_map(path: Path, column: str) -> dict[str, str]:
    with open(path, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    if not rows or "raw_category" not in rows[0] or column not in rows[0]:
        raise ValueError(f"{path}: columns {sorted(rows[0]) if rows else []}; expected raw_category and {column}")
    return {row["raw_category"]: row[column] for row in rows if row[column]}


def _objects(
    folder: Path, align: np.ndarray, labels: dict[str, str] | None, problems: Problems
) -> tuple[SceneObject, ...]:
    name = folder.name
    small = (f"{name}.aggregation.json", f"{name}_vh_clean_2.0.010000.segs.json", f"{name}_vh_clean_2.ply")
    full = (f"{name}_vh_clean.aggregation.json", f"{name}_vh_clean.segs.json", f"{name}_vh_clean.ply")
    for files in (small, full):
        if all((folder / file).is_file() for file in files):
            break
    else:
        missing = [file for file in small if not (folder / file).is_file()]
        raise FileNotFoundError(f"{folder}: {', '.join(missing)} missing; also no complete annotation of the full mesh")
    groups = read_json(folder / files[0])["segGroups"]
    segments = np.array(read_json(folder / files[1])["segIndices"])
    points = read_ply_points(folder / files[2])
    aligned = points @ align[:3, :3].T + align[:3, 3]
    return segment_boxes(name, groups, segments, aligned, problems, labels=labels)


def _exported(
    folder: Path, longest: int, problems: Problems
) -> tuple[list[str], np.ndarray, np.ndarray, Callable[[str], Shot]]:
    """Names, poses (N, 4, 4), colour intrinsics and a loader of the frames that SensReader wrote."""
    found = {}
    for path in (folder / "pose").glob("*.txt"):
        try:
            found[path.stem] = np.loadtxt(path).reshape(4, 4)
        except ValueError as error:
            problems.add(ValueError(f"{path}: {error}; expected 4 x 4 numbers; the frame is left out"))
    numbers = sorted(found, key=lambda stem: (len(stem), stem))
    poses = np.array([found[n] for n in numbers]).reshape(-1, 4, 4)

    def load(name: str) -> Shot:
        image = stored_image(folder / "color" / f"{name}.jpg", longest)
        return image, read_depth(folder / "depth" / f"{name}.png"), image.stored

    return numbers, poses, np.loadtxt(folder / "intrinsic" / "intrinsic_color.txt")[:3, :3], load


def _scene(
    folder: Path,
    objects: tuple[SceneObject, ...],
    align: np.ndarray,
    numbers: list[str],
    poses: np.ndarray,
    color: np.ndarray,
    load: Callable[[str], Shot],
    options: ScanOptions,
    problems: Problems,
) -> Scene:
    good = []
    for k in range(len(numbers)):
        if np.isfinite(poses[k]).all():  # -inf where tracking was lost
            fault = rotation_problem(poses[k, :3, :3])
            if fault is None:
                good.append(k)
            else:
                problems.add(ValueError(f"{folder}: frame {numbers[k]}: {fault}; it is left out"))
    masks = folder / "instance-filt"

    def frame(k: int) -> Frame:
        image, depth, (width, height) = load(numbers[good[k]])
        fault = intrinsics_problem(color, width, height)
        if fault is not None:
            raise ValueError(fault)
        size = image.size if isinstance(image, StoredImage) else (width, height)
        matrix = np.diag([size[0] / width, size[1] / height, 1.0]) @ color
        ids = None
        if masks.is_dir():
            with opened_image(masks / f"{numbers[good[k]]}.png") as opened:
                ids = np.asarray(opened).astype(np.int32)
        return make_frame(numbers[good[k]], image, depth, matrix, align @ poses[good[k]], objects, options, ids)

    scene = assemble_from(
        folder.name, objects, [align @ poses[k] for k in good], frame, options=options, problems=problems
    )
    return dataclasses.replace(scene, metadata={**scene.metadata, "format": "scannet"})
