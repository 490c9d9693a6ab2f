"""Question generators, one file per family. A new family is a module with `make` and one line in a dict below.

`SINGLE`: make(scene, view index, rng, config, index) -> Sample | None, called for every still.
`PAIRS`: make(scene, (first, second, kind), rng, config, index) -> Sample | None, called for every pair of views.
"""

from __future__ import annotations

from fastvst.spatial.tasks import (
    camera_motion,
    correspondence,
    depth_comparison,
    detection_3d,
    distance,
    measurement,
)
from fastvst.spatial.tasks.common import TaskConfig

SINGLE = {
    "depth_comparison": depth_comparison.make,
    "distance": distance.make,
    "measurement": measurement.make,
    "detection_3d": detection_3d.make,
}
PAIRS = {
    "correspondence": correspondence.make,
    "camera_motion": camera_motion.make,
}

__all__ = ["PAIRS", "SINGLE", "TaskConfig"]
