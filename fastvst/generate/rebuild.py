"""The scenes of rendered rows. A row keeps its question and images, but not the annotation. Rooms are procedural, so a
scene is built again from the seed of its room, and then compared with the row.

    samples = list(open_source(folder))
    scenes = rebuild_scenes(folder, samples, workers=2)     # scenes[sample.metadata["scene"]]
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fastvst.data.images import load_rgb
from fastvst.data.sample import Sample
from fastvst.generate.rooms import GENERATOR_VERSION, process_renderer, start_worker
from fastvst.processes import helper_result
from fastvst.reasoning import claims
from fastvst.scenes.rooms.shoot import ShotConfig, WalkConfig, shoot
from fastvst.scenes.scene import Scene

SAME = 12.0  # grey levels of 255 by which images of one view may differ on average: JPEG, and the marks of the question


class OtherSceneError(ValueError):
    """A scene that was built again is not the one of the row, or cannot be built from what the folder says."""


def rebuild_scenes(folder: str | Path, samples: Sequence[Sample], workers: int = 2) -> dict[str, Scene]:
    """Name of the scene (`metadata["scene"]`) -> the scene, for all rows in `samples`.

    The views have cameras and sightings, but neither pixels nor depth maps nor ids, which would be 20 MB of each room.
    Every room is rendered once, in about a second of one core with the preset "cold_start".

    Args:
        folder: of `fastvst rooms make`; its rooms.json says how the rooms were rendered.
        samples: rows of this folder, without videos.
        workers: processes that render. 0 renders in this process, which must not import Triton: two LLVMs crash.

    Raises:
        OtherSceneError: no rooms.json; rows of another version of the generator; a row whose image or claims do not fit
            the scene that its seed gives.
    """
    described = _description(Path(folder))
    rooms: dict[int, list[Sample]] = {}
    for sample in samples:
        if not {"room_seed", "scene"} <= sample.metadata.keys() or "frames" in sample.metadata:
            raise OtherSceneError(f"{folder}: row {sample.id} is no row about still images of a rendered room")
        rooms.setdefault(sample.metadata["room_seed"], []).append(sample)
    if workers == 0:
        found = [_room(seed, described, rows) for seed, rows in rooms.items()]
    else:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker) as pool:
            jobs = [pool.submit(_room, seed, described, rows) for seed, rows in rooms.items()]
            found = [helper_result(job, "rooms") for job in jobs]
    return {scene.name: scene for scene in found}


def _description(folder: Path) -> dict[str, Any]:
    """The content of rooms.json."""
    path = folder / "rooms.json"
    try:
        described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = described["version"]
    except (OSError, ValueError, KeyError) as error:
        raise OtherSceneError(f"{path} does not say how the rooms were rendered: {error!r}") from error
    if version != GENERATOR_VERSION:
        raise OtherSceneError(
            f"{folder} has rows of version {version} of the generator, and this is version {GENERATOR_VERSION}: the "
            "same seed gives another room. Make the rows again"
        )
    return described


def _room(seed: int, described: dict[str, Any], rows: Sequence[Sample]) -> Scene:
    walk = described.get("walk")
    renderer = process_renderer(described["backend"])
    scene = shoot(seed, renderer, ShotConfig(**described["shots"]), WalkConfig(**walk) if walk else None)
    for row in rows:
        check_same(scene, row)
    nothing = np.zeros((0, 0, 3), dtype=np.uint8)
    views = [dataclasses.replace(view, pixels=nothing, depth=None, ids=None) for view in scene.views]
    return dataclasses.replace(scene, views=tuple(views))


def check_same(scene: Scene, row: Sample) -> None:
    """Compare a scene with a row: the name, every claim of the row's reasoning, the images.

    Raises:
        OtherSceneError: the first thing that differs.
    """
    where = f"row {row.id}: the scene that was built again"
    if row.metadata["scene"] != scene.name:
        raise OtherSceneError(f"{where} is {scene.name}, not {row.metadata['scene']}")
    views = row.metadata.get("views", [row.metadata.get("view")])
    images = row.parts("image")
    if len(images) != len(views):
        raise OtherSceneError(f"row {row.id}: the row has {len(images)} images of {len(views)} views")
    try:
        for text, claim in row.metadata.get("claims", []):
            if not claims.holds(scene, claim):
                raise OtherSceneError(f"{where} contradicts {text!r}")
        for view, part in zip(views, images, strict=True):
            image = load_rgb(part["image"], max_source_pixels=1 << 24, time_limit=10.0)
            shown = scene.views[view].photograph
            if shown.size != image.size:
                raise OtherSceneError(f"{where} has images of {shown.size} pixels, not {image.size}")
            difference = np.abs(np.asarray(shown, dtype=np.int16) - np.asarray(image, dtype=np.int16))
            if float(difference.mean()) > SAME:
                raise OtherSceneError(f"{where} looks different in view {view}: {difference.mean():.0f} grey levels")
    except (KeyError, IndexError) as error:
        raise OtherSceneError(f"{where} lacks an object or a view of the row: {error!r}") from error
