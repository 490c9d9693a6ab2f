"""What every renderer backend shares: the interface and the depth range."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from fastvst.scenes.rooms.geometry import Geometry
from fastvst.spatial.camera import Camera

# Metres. Nothing nearer or farther is drawn.
NEAR = 0.05
FAR = 60.0


class Renderer(Protocol):
    """Holds the geometry of one room: `load` it once, then `draw` any number of views."""

    name: str

    def load(self, geometry: Geometry) -> None:
        """Take over the triangles and textures of a room."""

    def draw(self, camera: Camera) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """rgb (H, W, 3) uint8; depth (H, W) float32, planar, metres, 0 where nothing is drawn; ids (H, W) int32."""
