"""Hypersim as it is distributed: one folder a scene, ai_VVV_NNN, with several camera trajectories.

    _detail/metadata_scene.csv                            "meters_per_asset_unit"
    _detail/cam_XX/camera_keyframe_positions.hdf5         (N, 3), asset units
    _detail/cam_XX/camera_keyframe_orientations.hdf5      (N, 3, 3), camera to world, OpenGL axes
    _detail/cam_XX/camera_keyframe_frame_indices.hdf5     (N,)
    _detail/mesh/metadata_semantic_instance_bounding_box_object_aligned_2d_{positions,extents,orientations}.hdf5
    images/scene_cam_XX_final_preview/frame.IIII.tonemap.jpg
    images/scene_cam_XX_geometry_hdf5/frame.IIII.depth_meters.hdf5         metres along the ray
    images/scene_cam_XX_geometry_hdf5/frame.IIII.semantic{,_instance}.hdf5 NYU40 classes; ids of objects, -1 = none

The world has Z up. The cameras have a horizontal field of view of 60 degrees; a scene that differs (tilted lenses) is
refused because its depth does not lie in the boxes. Frames are single images, not a video.
"""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np

from fastvst.scenes.adapters.boxes import named_object, oriented_box
from fastvst.scenes.adapters.checks import Problems, Report
from fastvst.scenes.adapters.depth import planar_depth
from fastvst.scenes.adapters.frames import Frame, ScanOptions, assemble_from, make_frame, named, spread
from fastvst.scenes.adapters.images import stored_image
from fastvst.scenes.scene import Scene, SceneObject

# Class names of NYU40, from 1.
NYU40 = (
    "wall",
    "floor",
    "cabinet",
    "bed",
    "chair",
    "sofa",
    "table",
    "door",
    "window",
    "bookshelf",
    "picture",
    "counter",
    "blinds",
    "desk",
    "shelves",
    "curtain",
    "dresser",
    "pillow",
    "mirror",
    "floor mat",
    "clothes",
    "ceiling",
    "books",
    "refrigerator",
    "television",
    "paper",
    "towel",
    "shower curtain",
    "box",
    "whiteboard",
    "person",
    "night stand",
    "toilet",
    "sink",
    "lamp",
    "bathtub",
    "bag",
    "other structure",
    "other furniture",
    "other prop",
)
HFOV = np.pi / 3
MOST_BYTES = 1 << 30  # of one array


def read_hdf5(path: Path) -> np.ndarray:
    """The array of a Hypersim file.

    Raises:
        ImportError: h5py is missing (extra [scans]).
        FileNotFoundError: the file is missing.
        ValueError: no HDF5 file, no data set, or one above 1 GiB; names the file.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"{path}: reading HDF5 needs h5py: pip install 'fastvst[scans]'") from error
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with h5py.File(path, "r") as stored:
            data = stored["dataset"]
            if data.dtype.hasobject or data.nbytes > MOST_BYTES:
                raise ValueError(f"{data.dtype}, {data.nbytes} bytes")
            return np.asarray(data)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: {error}; expected an HDF5 file with numbers under 'dataset'") from error


def read_hypersim(
    folder: str | Path, options: ScanOptions | None = None, *, camera: str = "cam_00", report: Report | None = None
) -> Scene:
    """The images of one camera trajectory of a scene.

    Args:
        options: `frames` images are taken, spread over the trajectory.

    Raises:
        FileNotFoundError: a missing file; names it.
        ValueError: a damaged file, or depth that does not lie in the boxes; without `report` also any problem.
    """
    folder = Path(folder)
    problems = Problems(report)
    options = named(options, "hypersim")
    unit = metres_per_unit(folder / "_detail" / "metadata_scene.csv")
    track = folder / "_detail" / camera
    positions = read_hdf5(track / "camera_keyframe_positions.hdf5").astype(np.float64) * unit
    turns = read_hdf5(track / "camera_keyframe_orientations.hdf5").astype(np.float64)
    indices = read_hdf5(track / "camera_keyframe_frame_indices.hdf5").astype(int)
    images = folder / "images" / f"scene_{camera}_final_preview"
    geometry = folder / "images" / f"scene_{camera}_geometry_hdf5"
    present = [k for k in range(len(indices)) if (images / f"frame.{indices[k]:04d}.tonemap.jpg").is_file()]
    poses = []
    for k in present:  # Hypersim leaves out frames that show nothing or too much of a person
        pose = np.eye(4)
        pose[:3, :3] = turns[k] @ np.diag([1.0, -1.0, -1.0])
        pose[:3, 3] = positions[k]
        poses.append(pose)
    chosen = [int(indices[present[k]]) for k in spread(len(present), options.frames)] if present else []
    objects = _objects(folder, geometry, chosen, unit, problems)

    def load(k: int) -> Frame:
        number = int(indices[present[k]])
        image = stored_image(images / f"frame.{number:04d}.tonemap.jpg", options.width)
        along = read_hdf5(geometry / f"frame.{number:04d}.depth_meters.hdf5").astype(np.float64)
        ids = read_hdf5(geometry / f"frame.{number:04d}.semantic_instance.hdf5").astype(np.int64)
        height, width = along.shape
        focal = width / 2 / np.tan(HFOV / 2)
        intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])
        depth = planar_depth(np.where(np.isfinite(along), along, 0), intrinsics).astype(np.float32)
        to_image = np.diag([image.size[0] / width, image.size[1] / height, 1.0])
        masks = np.where(ids < 0, 0, ids + 1)
        return make_frame(f"{number:04d}", image, depth, to_image @ intrinsics, poses[k], objects, options, masks)

    return assemble_from(
        f"{folder.name}_{camera}", objects, poses, load, options=options, problems=problems, video=False
    )


def metres_per_unit(path: Path) -> float:
    """`meters_per_asset_unit` of metadata_scene.csv."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    with open(path, encoding="utf-8", newline="") as stream:
        table = {row["parameter_name"].strip(): row["parameter_value"] for row in csv.DictReader(stream)}
    value = float(table.get("meters_per_asset_unit", "nan"))
    if not 0 < value < 1000:
        raise ValueError(f"{path}: meters_per_asset_unit {value}; expected a number > 0")
    return value


def _objects(
    folder: Path, geometry: Path, frames: list[int], unit: float, problems: Problems
) -> tuple[SceneObject, ...]:
    """Objects that the frames show. An object's class is that of most of its pixels; the id is Hypersim's + 1."""
    votes: dict[int, Counter] = {}
    for number in frames:
        try:
            ids = read_hdf5(geometry / f"frame.{number:04d}.semantic_instance.hdf5").astype(np.int64)
            classes = read_hdf5(geometry / f"frame.{number:04d}.semantic.hdf5").astype(np.int64)
        except (OSError, ValueError):
            continue  # the frame itself is reported when it is read
        pairs, counts = np.unique(np.stack([ids.ravel(), classes.ravel()], 1), axis=0, return_counts=True)
        for (thing, label), count in zip(pairs.tolist(), counts.tolist(), strict=True):
            if thing >= 0:
                votes.setdefault(thing, Counter())[label] += count
    stem = "metadata_semantic_instance_bounding_box_object_aligned_2d"
    mesh = folder / "_detail" / "mesh"
    positions, extents, turns = (
        read_hdf5(mesh / f"{stem}_{part}.hdf5").astype(np.float64) for part in ("positions", "extents", "orientations")
    )
    found = []
    for thing, labels in sorted(votes.items()):
        label = labels.most_common(1)[0][0]

        def box(thing: int = thing) -> tuple[float, ...]:
            if thing >= len(positions):
                raise ValueError(f"only {len(positions)} boxes")
            return oriented_box(positions[thing] * unit, turns[thing].T, extents[thing] * unit)

        name = NYU40[label - 1] if 1 <= label <= len(NYU40) else "unknown"
        item = named_object(folder.name, thing + 1, name, box, problems)
        if item is not None:
            found.append(item)
    return tuple(found)
