"""DSLR images of ScanNet++: fisheye images and the depth that its toolkit renders from the mesh, both undistorted."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fastvst.data.media_files import opened_image
from fastvst.scenes.adapters.boxes import read_json
from fastvst.scenes.adapters.checks import Problems, Report, intrinsics_problem
from fastvst.scenes.adapters.colmap import obb_objects
from fastvst.scenes.adapters.colmap_model import ColmapCamera, read_model
from fastvst.scenes.adapters.depth import read_depth
from fastvst.scenes.adapters.fisheye import Fisheye, undistorted_depth, undistorted_image
from fastvst.scenes.adapters.frames import Frame, ScanOptions, assemble_from, make_frame, named
from fastvst.scenes.scene import Scene

RENDER = "python -m common.render common/configs/render.yml (with render_dslr)"
FOLDERS = ("colmap", "render_depth")


def read_scannetpp_dslr(
    folder: str | Path, options: ScanOptions | None = None, *, report: Report | None = None
) -> Scene:
    """The scene of one ScanNet++ scan, seen by its DSLR camera. The photographs are no video.

        scans/segments_anno.json              {"segGroups": [{"objectId", "label", "obb"}]}
        dslr/colmap/cameras.*, images.*       one OPENCV_FISHEYE camera, of the resized images
        dslr/render_depth/DSC00001.png        uint16, planar millimetres of the fisheye camera; the toolkit renders them
        dslr/resized_images/DSC00001.JPG      fisheye; or, as the toolkit undistorts them:
        dslr/resized_undistorted_images/ and dslr/nerfstudio/transforms_undistorted.json

    Without undistorted images the fisheye images are undistorted here. Poses are those of COLMAP: transforms.json has
    other axes of the world.

    Raises:
        FileNotFoundError: a missing file or folder; names it, and the toolkit's command that makes it.
        ValueError: another lens; depth that does not lie in the boxes; without `report` any problem.
    """
    folder = Path(folder)
    problems = Problems(report)
    options = named(options, "scannetpp_dslr")
    objects = obb_objects(folder.name, read_json(folder / "scans" / "segments_anno.json"), problems)
    dslr = folder / "dslr"
    for part in FOLDERS:
        if not (dslr / part).is_dir():
            made = f"; ScanNet++'s toolkit renders it: {RENDER}" if part == "render_depth" else ""
            raise FileNotFoundError(f"{dslr / part} is missing{made}")
    images = read_model(dslr / "colmap")
    lenses = {camera: _lens(dslr / "colmap", camera) for camera in {item.camera for item in images}}
    undistorted = dslr / "nerfstudio" / "transforms_undistorted.json"
    given = _pinhole(undistorted) if undistorted.is_file() else None
    if given is not None and not (dslr / "resized_undistorted_images").is_dir():
        raise FileNotFoundError(f"{dslr / 'resized_undistorted_images'} is missing, which {undistorted} describes")

    def load(k: int) -> Frame:
        item = images[k]
        lens = lenses[item.camera]
        path = dslr / ("resized_images" if given is None else "resized_undistorted_images") / item.name
        with opened_image(path) as opened:
            image = np.asarray(opened.convert("RGB"))
        depth = read_depth(dslr / "render_depth" / f"{Path(item.name).stem}.png")
        if depth.shape != (lens.height, lens.width):
            raise ValueError(
                f"{path}: depth of {depth.shape[::-1]} pixels; expected the camera's {lens.width, lens.height}"
            )
        if given is None:
            if image.shape[:2] != depth.shape:
                raise ValueError(
                    f"{path}: {image.shape[1::-1]} pixels; expected the camera's {lens.width, lens.height}"
                )
            matrix = lens.pinhole()
            image = undistorted_image(image, lens, matrix)
        else:
            matrix = given
            fault = intrinsics_problem(matrix, image.shape[1], image.shape[0])
            if fault is not None:
                raise ValueError(f"{path}: {fault}")
        depth = undistorted_depth(depth, lens, matrix, image.shape[1::-1])
        return make_frame(item.name, image, depth, matrix, item.pose, objects, options)

    poses = [item.pose for item in images]
    return assemble_from(folder.name, objects, poses, load, options=options, problems=problems, video=False)


def _lens(folder: Path, camera: ColmapCamera) -> Fisheye:
    if camera.model != "OPENCV_FISHEYE" or len(camera.params) != 8 or not np.isfinite(camera.params).all():
        raise ValueError(
            f"{folder}: camera {camera.model} {camera.params}; expected OPENCV_FISHEYE with 8 parameters (pinhole "
            "images with depth: format nerfstudio)"
        )
    fx, fy, cx, cy, k1, k2, k3, k4 = camera.params
    if not (fx > 0 and fy > 0 and camera.width >= 1 and camera.height >= 1):
        raise ValueError(f"{folder}: focal lengths {fx}, {fy} of an image of {camera.width} x {camera.height} pixels")
    return Fisheye(fx, fy, cx, cy, (k1, k2, k3, k4), int(camera.width), int(camera.height))


def _pinhole(path: Path) -> np.ndarray:
    """The intrinsics (3, 3) of undistorted images."""
    data = read_json(path)
    bend = [float(data.get(key, 0.0)) for key in ("k1", "k2", "k3", "k4")]
    if data.get("camera_model") != "PINHOLE" or any(bend):
        raise ValueError(
            f"{path}: camera {data.get('camera_model')} with distortion {bend}; expected PINHOLE without any"
        )
    fx, fy, cx, cy = (float(data[key]) for key in ("fl_x", "fl_y", "cx", "cy"))
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])
