"""The truth about a rendered room, computed without the question generators.

Embree rays against the meshes, vertices, convex optimisation for distances, complex numbers for directions.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
from embreex import rtcore_scene
from embreex.mesh_construction import TriangleMesh
from scipy.optimize import lsq_linear
from scipy.spatial.transform import Rotation
from shapely import MultiPoint, Polygon

from fastvst.data.sample import Sample
from fastvst.scenes.rooms.geometry import build_geometry
from fastvst.scenes.rooms.recipes import furnish
from fastvst.scenes.scene import Scene
from fastvst.spatial.camera import Camera

COMPASS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
MIN_PIXELS = 60
GHOST = 12


def question(sample: Sample) -> str:
    return sample.messages[0]["content"][-1]["text"]


def reply(sample: Sample) -> str:
    return sample.messages[-1]["content"][0]["text"]


def homogeneous(camera: Camera) -> np.ndarray:
    m = np.eye(4)
    m[:3, :3] = camera.rotation
    m[:3, 3] = camera.translation
    return m


def direction(vector: np.ndarray) -> complex:
    """A floor vector as a complex number of length 1: multiplying by -1j turns it 90 degrees clockwise."""
    z = complex(float(vector[0]), float(vector[1]))
    return z / abs(z)


def clockwise(start: np.ndarray, end: np.ndarray) -> float:
    return -math.degrees(np.angle(direction(end) / direction(start))) % 360


def off(angle: float, other: float) -> float:
    """Degrees between two directions."""
    return abs((angle - other + 180) % 360 - 180)


class Truth:
    """The meshes of one room, and what each view of its scene shows, by ray casting on every second pixel."""

    def __init__(self, scene: Scene):
        self.scene = scene
        self.room = furnish(scene.metadata["room_seed"])
        self.geometry = build_geometry(self.room)
        self.maps: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.whole: dict[int, np.ndarray] = {}
        self._places: dict[int, np.ndarray] = {}

    @cached_property
    def rays(self) -> tuple[rtcore_scene.EmbreeScene, np.ndarray]:
        scene = rtcore_scene.EmbreeScene()
        self.mesh = TriangleMesh(scene, self.geometry.positions[self.geometry.triangles])
        return scene, self.geometry.ids[self.geometry.triangles[:, 0]]

    def cast(self, camera: Camera, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Planar depth (N,) and object id (N,) at pixels (N, 2)."""
        scene, ids = self.rays
        pixels = np.asarray(pixels, dtype=np.float64)
        local = np.stack(
            [(pixels[:, 0] - camera.cx) / camera.fx, (pixels[:, 1] - camera.cy) / camera.fy, np.ones(len(pixels))], 1
        )
        rays = local @ camera.rotation
        start = camera.position + 0.05 * rays
        hit = scene.run(start.astype(np.float32), rays.astype(np.float32), output=True)
        face = hit["primID"].astype(np.int64)
        return hit["tfar"].astype(np.float64) + 0.05, np.where(face >= 0, ids[face], -1)

    def look(self, view: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and depths of a view, (H/2, W/2) each."""
        if view not in self.maps:
            camera = self.scene.views[view].camera
            u, v = np.meshgrid(np.arange(0, camera.width, 2) + 0.5, np.arange(0, camera.height, 2) + 0.5)
            depth, ids = self.cast(camera, np.stack([u.ravel(), v.ravel()], 1))
            self.maps[view] = ids.reshape(u.shape), depth.reshape(u.shape)
        return self.maps[view]

    def pixels(self, view: int, object_id: int) -> int:
        """Number of pixels of a view that show an object."""
        if view not in self.whole:
            camera = self.scene.views[view].camera
            u, v = np.meshgrid(np.arange(camera.width) + 0.5, np.arange(camera.height) + 0.5)
            self.whole[view] = self.cast(camera, np.stack([u.ravel(), v.ravel()], 1))[1]
        return int((self.whole[view] == object_id).sum())

    def middle(self, view: int, object_id: int) -> np.ndarray:
        """Middle of the visible part in a view, as shares of width and height (2,)."""
        rows, columns = np.nonzero(self.look(view)[0] == object_id)
        h, w = self.look(view)[0].shape
        return np.array([(columns.min() + columns.max() + 1) / 2 / w, (rows.min() + rows.max() + 1) / 2 / h])

    def vertices(self, object_id: int) -> np.ndarray:
        return self.geometry.positions[self.geometry.ids == object_id].astype(np.float64)

    def extents(self, object_id: int) -> np.ndarray:
        """Size (3,) of the mesh along its own axes: width, depth, height."""
        points = self.vertices(object_id)
        yaw = math.radians(self.scene.object(object_id).box[8])
        flat = points[:, :2] @ np.array([[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]])
        return np.array([*np.ptp(flat, axis=0), np.ptp(points[:, 2])])

    def place(self, object_id: int) -> np.ndarray:
        """Centre (2,) of the mesh in plan: middle of its extent along its own axes."""
        if object_id not in self._places:
            points = self.vertices(object_id)
            yaw = math.radians(self.scene.object(object_id).box[8])
            turn = np.array([[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]])
            flat = points[:, :2] @ turn
            self._places[object_id] = (flat.min(0) + flat.max(0)) / 2 @ turn.T
        return self._places[object_id]

    def outline(self, object_id: int) -> Polygon:
        return MultiPoint(self.vertices(object_id)[:, :2]).convex_hull

    def gap(self, a: int, b: int) -> float:
        """Smallest distance between the boxes of two objects, as a bounded least-squares problem."""
        one, two = (np.array(self.scene.object(i).box) for i in (a, b))
        turn = [Rotation.from_euler("xyz", x[6:9], degrees=True).as_matrix() for x in (one, two)]
        half = np.r_[one[3:6], two[3:6]] / 2
        found = lsq_linear(np.c_[turn[0], -turn[1]], two[:3] - one[:3], bounds=(-half, half), tol=1e-14)
        return math.sqrt(2 * found.cost)

    def named(self, name: str) -> list[int]:
        """Ids of all objects of a class in the room."""
        return [k + 1 for k, item in enumerate(self.room.items) if item.piece.name == name]

    def shown(self, view: int) -> set[str]:
        """Class names of which a view shows GHOST pixels or more."""
        return {o.name for o in self.scene.objects if self.pixels(view, o.id) >= GHOST}

    def id_of(self, name: str, view: int | None = None) -> int:
        """The id of the only object of a class, in the room or among those that a view shows."""
        ids = [i for i in self.named(name) if view is None or self.pixels(view, i) >= GHOST]
        assert len(ids) == 1, f"{len(ids)} objects called {name!r}"
        return ids[0]
