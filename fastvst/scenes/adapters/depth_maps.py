"""Single images with a depth map and nothing else: questions about the order of marked points in depth.

    images/NAME.jpg     depth/NAME.png (16 bits, millimetres) or depth/NAME.npy (metres, or relative)

VST takes relative depth of an expert model for web images (arXiv 2511.05491). Relative depth has no unit: a question is
asked only if the depths differ by 10 % or more, and no answer names a number.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from fastvst.data.media_files import opened_image
from fastvst.scenes.adapters.checks import Problems, Report, size_problem
from fastvst.scenes.adapters.depth import nearest, read_depth
from fastvst.scenes.scene import Scene, SceneObject, Sighting, View
from fastvst.spatial.camera import Camera

Meaning = Literal["metric", "relative", "inverse"]
POINTS = 24  # points offered in an image
FLAT = 0.03  # relative depth range of the neighbourhood in which a point counts as one spot
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


def read_depth_maps(
    folder: str | Path,
    *,
    meaning: Meaning = "metric",
    source: str = "depth",
    seed: int = 0,
    report: Report | None = None,
) -> Iterator[Scene]:
    """One scene for each image that has a depth map.

    Args:
        meaning: "metric" = depth in metres; "relative" = larger is farther, without a unit; "inverse" = larger is
            nearer (disparity, as many expert models give it).
        seed: decides the points.
        report: called with every problem of one image; None raises the first one after all good scenes.

    Raises:
        FileNotFoundError: no folder images or depth; without `report`, an image without a depth map.
        ValueError: without `report`, a damaged image or depth map; names it.
    """
    folder = Path(folder)
    for part in ("images", "depth"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"{folder / part} is missing")
    problems = Problems(report)
    for number, path in enumerate(sorted((folder / "images").iterdir())):
        if path.suffix.lower() not in EXTENSIONS:
            problems.add(ValueError(f"{path}: not an image of {EXTENSIONS}; it is left out"))
            continue
        try:
            yield _scene(folder, path, meaning, source, np.random.default_rng([seed, number]))
        except (OSError, ValueError) as error:
            problems.add(error)
    problems.finish()


def _scene(folder: Path, path: Path, meaning: Meaning, source: str, rng: np.random.Generator) -> Scene:
    with opened_image(path) as opened:
        image = np.asarray(opened.convert("RGB"))
    height, width = image.shape[:2]
    files = [folder / "depth" / f"{path.stem}{ending}" for ending in (".npy", ".png")]
    stored = next((file for file in files if file.is_file()), None)
    if stored is None:
        raise FileNotFoundError(f"{path}: neither {files[0]} nor {files[1]}")
    depth = read_depth(stored)
    fault = size_problem((width, height), (depth.shape[1], depth.shape[0]))
    if fault is not None:
        raise ValueError(f"{path} and {stored} differ in shape: {fault}")
    depth = nearest(depth, (width, height))
    if meaning == "inverse":
        depth = np.where(depth > 0, 1 / np.maximum(depth, 1e-9), 0).astype(np.float32)
    points = list(_spots(depth, rng))
    objects = tuple(SceneObject(k + 1, "point", (float("nan"),) * 9) for k in range(len(points)))
    sightings = tuple(
        Sighting(k + 1, 1.0, 10_000, (u - 1, v - 1, u + 1, v + 1), (u, v), z, None if meaning == "metric" else (z, z))
        for k, (u, v, z) in enumerate(points)
    )
    camera = Camera(width, height, float(width), float(width), width / 2, height / 2, np.eye(3), np.zeros(3))
    view = View(camera, image, sightings)
    return Scene(f"{source}-{path.stem}", objects, (view,), up=None, metadata={"source": source, "file": path.name})


def _spots(depth: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[float, float, float]]:
    """Points (u, v, depth) of smooth, measured neighbourhoods, 5 % of the image away from its border."""
    height, width = depth.shape
    found = 0
    for _ in range(40 * POINTS):
        row = int(rng.integers(int(0.05 * height), max(int(0.95 * height), 1)))
        column = int(rng.integers(int(0.05 * width), max(int(0.95 * width), 1)))
        near = depth[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3]
        if (near > 0).all() and np.ptp(near) <= FLAT * near.mean():
            yield column + 0.5, row + 0.5, float(depth[row, column])
            found += 1
            if found == POINTS:
                return
