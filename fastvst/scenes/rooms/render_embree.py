"""Ray-casting backend: Embree finds the hits, numpy shades them. It needs no system library.

Its depth and ids are the reference for the other backend.
"""

from __future__ import annotations

import numpy as np
from embreex import rtcore_scene
from embreex.mesh_construction import TriangleMesh

from fastvst.scenes.rooms.geometry import Geometry
from fastvst.scenes.rooms.render_base import FAR, NEAR
from fastvst.spatial.camera import Camera


class EmbreeRenderer:
    """A `Renderer` with one thread. Colours follow the formula of the GL shader, with nearest texels."""

    name = "embree"

    def __init__(self) -> None:
        self.geometry: Geometry | None = None

    def load(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.scene = rtcore_scene.EmbreeScene()
        corners = geometry.positions[geometry.triangles]
        self.mesh = TriangleMesh(self.scene, corners)
        normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).astype(np.float64)
        self.normals = normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-20)
        self.face_ids = geometry.ids[geometry.triangles[:, 0]]

    def draw(self, camera: Camera) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.geometry is None:
            raise RuntimeError("EmbreeRenderer.draw: load a geometry first")
        width = camera.width
        height = camera.height
        x = (np.arange(width) + 0.5 - camera.cx) / camera.fx
        y = (np.arange(height) + 0.5 - camera.cy) / camera.fy
        u, v = np.meshgrid(x, y)
        local = np.stack([u, v, np.ones_like(u)], -1).reshape(-1, 3)
        rays = local @ camera.rotation  # one unit of the ray parameter is one metre of planar depth
        start = camera.position + rays * NEAR  # the same near plane as the rasteriser
        hit = self.scene.run(start.astype(np.float32), rays.astype(np.float32), output=True)
        face = hit["primID"].astype(np.int64)
        depth = hit["tfar"].astype(np.float64) + NEAR
        found = (face >= 0) & (depth < FAR)
        face = np.where(found, face, 0)
        depth = np.where(found, depth, 0.0)
        ids = np.where(found, self.face_ids[face], 0).astype(np.int32)
        world = camera.position + rays * depth[:, None]
        colour = self._shade(face, hit["u"], hit["v"], world, camera.position)
        rgb = (np.clip(np.where(found[:, None], colour, 0), 0, 1) * 255 + 0.5).astype(np.uint8)
        return (
            rgb.reshape(height, width, 3),
            depth.astype(np.float32).reshape(height, width),
            ids.reshape(height, width),
        )

    def _shade(self, face: np.ndarray, u: np.ndarray, v: np.ndarray, world: np.ndarray, eye: np.ndarray) -> np.ndarray:
        """Colours (P, 3) of hits: `face`, barycentric `u`, `v` (P,), points `world` (P, 3), camera at `eye` (3,)."""
        g = self.geometry
        assert g is not None
        triangle = g.triangles[face]
        weights = np.stack([1 - u - v, u, v], 1)[..., None]
        rgba = (g.rgba[triangle] * weights).sum(1)
        uv = (g.uv[triangle] * weights).sum(1)
        layer = g.layer[triangle[:, 0]]
        size = g.textures.shape[1]
        column = np.floor((uv[:, 0] % 1.0) * size).astype(np.int64) % size
        row = np.floor((1 - uv[:, 1] % 1.0) * size).astype(np.int64) % size
        texel = g.textures[np.maximum(layer, 0), row, column] / 255.0
        base = np.where(layer[:, None] >= 0, rgba[:, :3] * texel, rgba[:, :3])

        view = eye - world
        view /= np.maximum(np.linalg.norm(view, axis=1, keepdims=True), 1e-9)
        normal = self.normals[face]
        facing = (normal * view).sum(1)
        normal = np.where(facing[:, None] < 0, -normal, normal)
        to_light = g.light - world
        d2 = (to_light**2).sum(1)
        lit = self._lit(world, normal, to_light)
        diffuse = np.maximum((normal * to_light).sum(1) / np.sqrt(d2), 0) * lit * 3.4 / (2.2 + d2 * 0.35)
        sky = g.ambient * (0.78 + 0.22 * normal[:, 2]) + 0.14 * np.abs(facing)
        strength = (sky + g.lamp * diffuse) * (1 - rgba[:, 3]) + 1.1 * rgba[:, 3]
        return base * strength[:, None]

    def _lit(self, world: np.ndarray, normal: np.ndarray, to_light: np.ndarray) -> np.ndarray:
        """(P,) 1.0 where nothing is between the point and the lamp, else 0.0."""
        start = world + normal * 0.01
        hit = self.scene.run(start.astype(np.float32), to_light.astype(np.float32), output=True)
        blocked = (hit["primID"] >= 0) & (hit["tfar"] < 0.98)
        return (~blocked).astype(np.float64)
