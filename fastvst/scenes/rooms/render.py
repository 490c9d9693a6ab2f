"""Pictures with exact labels: one interface, two backends.

`open_renderer("gl")` rasterises with moderngl through EGL (Mesa's llvmpipe on a machine without a GPU);
`open_renderer("embree")` casts rays with Embree and shades in numpy (pip only, no system library). They agree on
depth and ids but for pixels on a silhouette; colours are similar, not equal.
"""

from __future__ import annotations

import logging
from typing import Protocol

import numpy as np

from fastvst.scenes.rooms.geometry import Geometry
from fastvst.spatial.camera import Camera

logger = logging.getLogger(__name__)

NEAR, FAR = 0.05, 60.0  # metres; what is nearer or farther is not drawn


class Renderer(Protocol):
    """Keeps the geometry of one room; `load` it once, then `draw` as many views as needed."""

    name: str

    def load(self, geometry: Geometry) -> None:
        """Take over a room's triangles and textures."""

    def draw(self, camera: Camera) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """rgb (H, W, 3) uint8; depth (H, W) float32 planar metres, 0 where nothing is; ids (H, W) int32."""


def open_renderer(backend: str = "auto") -> Renderer:
    """A renderer. "auto" takes "gl" where an EGL context can be made, else "embree", and logs which.

    Raises:
        ValueError: an unknown name.
        RuntimeError: the backend asked for by name does not work here.
    """
    if backend not in ("auto", "gl", "embree"):
        raise ValueError(f"renderer backend {backend!r}; expected 'auto', 'gl' or 'embree'")
    problem = None
    if backend in ("auto", "gl"):
        try:
            from fastvst.scenes.rooms.render_gl import GLRenderer

            renderer = GLRenderer()
            logger.info("rooms: drawing with OpenGL (%s)", renderer.device)
            return renderer
        except Exception as error:  # moderngl raises plain Exception when EGL is missing
            if backend == "gl":
                raise RuntimeError(
                    f"no OpenGL through EGL here: {error}. Install moderngl (pip) and libegl1, libgl1-mesa-dri "
                    "(Debian), or use backend 'embree'"
                ) from error
            problem = error
    try:
        from fastvst.scenes.rooms.render_embree import EmbreeRenderer
    except ImportError as error:
        raise RuntimeError(f"no renderer: {error}; pip install 'fastvst[rooms]' (OpenGL: {problem})") from error
    if problem is not None:
        logger.warning("rooms: no OpenGL through EGL (%s); drawing with Embree", problem)
    return EmbreeRenderer()


def render(geometry: Geometry, camera: Camera, backend: str = "auto") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One picture: rgb (H, W, 3) uint8, depth (H, W) float32 planar metres, ids (H, W) int32. For many, keep a
    renderer."""
    renderer = open_renderer(backend)
    renderer.load(geometry)
    return renderer.draw(camera)
