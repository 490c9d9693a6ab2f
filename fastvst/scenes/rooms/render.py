"""Opens a renderer backend.

`open_renderer("gl")` rasterises with moderngl through EGL (Mesa's llvmpipe on a machine without a GPU).
`open_renderer("embree")` casts rays with Embree and shades in numpy; it needs only pip packages. The two agree on depth
and ids except for pixels on a silhouette. Their colours are similar, not equal.
"""

from __future__ import annotations

import logging

import numpy as np

from fastvst.scenes.rooms.geometry import Geometry
from fastvst.scenes.rooms.render_base import Renderer
from fastvst.spatial.camera import Camera

logger = logging.getLogger(__name__)


def open_renderer(backend: str = "auto") -> Renderer:
    """A new renderer. "auto" chooses "gl" if an EGL context can be made, else "embree", and logs the choice.

    Raises:
        ValueError: an unknown backend.
        RuntimeError: the requested backend, or with "auto" both, cannot run here.
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
                    f"no OpenGL through EGL: {error}. Install moderngl (pip) and libegl1, libgl1-mesa-dri (Debian), "
                    "or use backend 'embree'"
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
    """`Renderer.draw` of one view with a new renderer. For several views open one renderer and keep it."""
    renderer = open_renderer(backend)
    renderer.load(geometry)
    return renderer.draw(camera)
