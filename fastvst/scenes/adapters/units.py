"""Which unit the boxes of a scan are written in: the depth decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fastvst.scenes.adapters.box_pixels import NEAR
from fastvst.scenes.adapters.checks import FITS, inside_box
from fastvst.scenes.adapters.frames import Frame
from fastvst.scenes.scene import SceneObject
from fastvst.spatial.camera import unproject


def unit_of_boxes(
    scene: str, objects_in: Callable[[float], Sequence[SceneObject]], frames: Sequence[Frame], units: Sequence[float]
) -> float:
    """The unit (metres) in which most boxes hold measured surface.

    A box that a camera looks into holds some points of the depth map. In a wrong unit the boxes lie elsewhere.

    Raises:
        ValueError: no unit fits, or two fit equally well.
    """
    points = [_cloud(frame) for frame in frames]
    cloud = np.concatenate(points) if points else np.zeros((0, 3))
    shares = {}
    for unit in units:
        known = [item for item in objects_in(unit) if item.known]
        hit = [inside_box(cloud, item.box, 0.0).sum() >= 5 for item in known]
        size = float(np.median([max(item.box[3:6]) for item in known])) if known else 0.0
        shares[unit] = float(np.mean(hit)) if hit and 0.05 < size < 20 else 0.0
    ordered = sorted(units, key=lambda unit: -shares[unit])
    best = ordered[0]
    if shares[best] == 0.0 or (len(ordered) > 1 and shares[ordered[1]] > FITS * shares[best]):
        tried = ", ".join(f"{unit:g} m a unit: {share:.0%}" for unit, share in shares.items())
        raise ValueError(f"{scene}: share of the boxes that hold measured surface: {tried}; expected one clear unit")
    return best


def _cloud(frame: Frame, step: int = 4) -> np.ndarray:
    """World points (N, 3) of every fourth pixel with a depth."""
    depth = frame.depth[::step, ::step]
    rows, columns = np.nonzero(depth > NEAR)
    pixels = np.stack([columns * step + 0.5, rows * step + 0.5], 1)
    return unproject(frame.camera, pixels, depth[rows, columns].astype(np.float64))
