"""The triangles of a room for the renderers: furniture, walls, floor, ceiling, and textures of floor and walls."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fastvst.scenes.rooms.assets import TEXTURE_SIZE, Mesh, load_pack
from fastvst.scenes.rooms.layout import Room, notch_of
from fastvst.scenes.rooms.parts import hue, wood

SURFACE_POINTS = 256  # per object, from which its visibility is estimated


@dataclass(frozen=True, eq=False)
class Geometry:
    """What a renderer draws: V vertices, F triangles, T textures.

    positions (V, 3) float32, world, metres; uv (V, 2) float32; rgba (V, 4) float32, last channel emission; layer (V,)
    int32 index into `textures` (T, 128, 128, 3) uint8, or -1; ids (V,) int32 object ids, 0 for the room itself;
    triangles (F, 3) int32; light (3,) position of the ceiling lamp; ambient, lamp: strengths of the light; surface:
    object id -> sample points (S, 3) on its surface, world.
    """

    positions: np.ndarray
    uv: np.ndarray
    rgba: np.ndarray
    layer: np.ndarray
    ids: np.ndarray
    triangles: np.ndarray
    textures: np.ndarray
    light: np.ndarray
    ambient: float
    lamp: float
    surface: dict[int, np.ndarray]


def build_geometry(room: Room) -> Geometry:
    """The triangles of a room in the world frame. The id of an object is 1 + the index of its item."""
    rng = np.random.default_rng([room.seed, 2])
    stack = load_pack().textures
    floor_texture = floor_pattern(rng)
    wall_texture = wall_pattern(rng)
    floor_layer = len(stack)
    wall_layer = len(stack) + 1
    meshes: list[tuple[int, Mesh]] = [(0, shell_mesh(room, rng, floor_layer, wall_layer))]
    surface: dict[int, np.ndarray] = {}
    for index, item in enumerate(room.items):
        c = math.cos(math.radians(item.yaw))
        s = math.sin(math.radians(item.yaw))
        turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
        world = item.piece.mesh.positions.astype(np.float64) @ turn + np.array(item.position)
        mesh = item.piece.mesh
        meshes.append((index + 1, Mesh(world.astype(np.float32), mesh.uv, mesh.rgba, mesh.layer, mesh.triangles)))
        surface[index + 1] = sample_surface(rng, world, mesh.triangles)
    offsets = np.cumsum([0] + [len(m.positions) for _, m in meshes])
    low = room.polygon.min(0)
    high = room.polygon.max(0)
    centre = (low + high) / 2
    notch = notch_of(room.polygon)
    if notch is not None and notch[0] <= centre[0] <= notch[2] and notch[1] <= centre[1] <= notch[3]:
        centre = room.polygon.mean(0)
    light = np.array([*(centre + rng.uniform(-0.5, 0.5, 2)), room.height - 0.15])
    return Geometry(
        positions=np.concatenate([m.positions for _, m in meshes]),
        uv=np.concatenate([m.uv for _, m in meshes]),
        rgba=np.concatenate([m.rgba for _, m in meshes]),
        layer=np.concatenate([m.layer for _, m in meshes]),
        ids=np.concatenate([np.full(len(m.positions), i, np.int32) for i, m in meshes]),
        triangles=np.concatenate([m.triangles + o for (_, m), o in zip(meshes, offsets, strict=False)]).astype(
            np.int32
        ),
        textures=np.concatenate([stack, floor_texture[None], wall_texture[None]]),
        light=light,
        ambient=float(rng.uniform(0.42, 0.55)),
        lamp=float(rng.uniform(0.55, 0.75)),
        surface=surface,
    )


def sample_surface(rng: np.random.Generator, points: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """(SURFACE_POINTS, 3) points distributed evenly over the area of a mesh."""
    a = points[triangles[:, 0]]
    b = points[triangles[:, 1]]
    c = points[triangles[:, 2]]
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    pick = rng.choice(len(triangles), SURFACE_POINTS, p=area / area.sum())
    u, v = rng.uniform(size=(2, SURFACE_POINTS, 1))
    fold = u + v > 1
    u = np.where(fold, 1 - u, u)
    v = np.where(fold, 1 - v, v)
    return a[pick] + u * (b[pick] - a[pick]) + v * (c[pick] - a[pick])


class _Quads:
    """Collects quadrilaterals; `mesh` returns them as triangles."""

    def __init__(self) -> None:
        self.corners: list[np.ndarray] = []
        self.uvs: list[np.ndarray] = []
        self.colours: list[tuple[float, ...]] = []
        self.layers: list[int] = []

    def add(self, corners: list, colour: tuple[float, ...], uv: list | None = None, layer: int = -1) -> None:
        """corners: four (x, y, z); colour: rgb and emission; uv: four (u, v), needed with a texture `layer`."""
        self.corners.append(np.array(corners, dtype=np.float64))
        self.uvs.append(np.array(uv or [(0, 0)] * 4, dtype=np.float64))
        self.colours.append(colour)
        self.layers.append(layer)

    def mesh(self) -> Mesh:
        first = np.arange(len(self.corners))[:, None] * 4
        return Mesh(
            np.concatenate(self.corners).astype(np.float32),
            np.concatenate(self.uvs).astype(np.float32),
            np.repeat(np.array(self.colours, np.float32), 4, axis=0),
            np.repeat(np.array(self.layers, np.int32), 4),
            np.concatenate([first + np.array([0, 1, 2]), first + np.array([0, 2, 3])]).astype(np.int32),
        )


def shell_mesh(room: Room, rng: np.random.Generator, floor_layer: int, wall_layer: int) -> Mesh:
    """Floor, ceiling, walls, skirting boards, and in 45 % of the rooms a rug."""
    quads = _Quads()
    for x0, y0, x1, y1 in rectangles(room.polygon):
        # 5 mm larger than the room: no cracks along the walls.
        x0 = x0 - 0.005
        y0 = y0 - 0.005
        x1 = x1 + 0.005
        y1 = y1 + 0.005
        plan = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
        quads.add([(x, y, 0.0) for x, y in plan], (1, 1, 1, 0), [(x / 1.6, y / 1.6) for x, y in plan], floor_layer)
        quads.add([(x, y, room.height) for x, y in plan], (0.93, 0.93, 0.92, 0.4))
    _add_walls(quads, room, rng, wall_layer)
    if rng.uniform() < 0.45:
        _add_rug(quads, room, rng)
    return quads.mesh()


def _add_walls(quads: _Quads, room: Room, rng: np.random.Generator, layer: int) -> None:
    """Walls with skirting boards of 1.2 cm, which is less than the gap behind furniture."""
    skirting = tuple(float(c) for c in np.array([0.9, 0.89, 0.87]) * rng.uniform(0.5, 1.0))
    top = room.height + 0.005
    for p, q in zip(room.polygon, np.roll(room.polygon, -1, axis=0), strict=True):
        length = float(np.linalg.norm(q - p))
        n = np.array([-(q - p)[1], (q - p)[0]]) / length * 0.012
        u = length / 1.2
        v = room.height / 1.2
        wall = [(*p, -0.005), (*q, -0.005), (*q, top), (*p, top)]
        quads.add(wall, (1, 1, 1, 0), [(0, 0), (u, 0), (u, v), (0, v)], layer)
        quads.add([(*(p + n), 0), (*(q + n), 0), (*(q + n), 0.08), (*(p + n), 0.08)], (*skirting, 0))
        quads.add([(*(p + n), 0.08), (*(q + n), 0.08), (*q, 0.08), (*p, 0.08)], (*skirting, 0))


def _add_rug(quads: _Quads, room: Room, rng: np.random.Generator) -> None:
    """Two rectangles on the floor; furniture may be on them."""
    low = room.polygon.min(0)
    high = room.polygon.max(0)
    centre = room.polygon.mean(0) + rng.uniform(-0.4, 0.4, 2)
    half = np.minimum(rng.uniform(0.5, 1.3, 2), np.minimum(centre - low, high - centre) - 0.15)
    edge = hue(rng, 0.6, 0.6)
    middle = hue(rng, 0.5, 0.75)
    for z, shrink, colour in ((0.004, 0.0, edge), (0.006, 0.12, middle)):
        x, y = half - shrink
        if min(x, y) > 0.1:
            plan = [(centre[0] + a * x, centre[1] + b * y) for a, b in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
            quads.add([(u, v, z) for u, v in plan], (*colour, 0))


def rectangles(polygon: np.ndarray) -> list[tuple[float, float, float, float]]:
    """Rectangles (x0, y0, x1, y1) that tile a rectangular or L-shaped outline (K, 2)."""
    x0, y0 = polygon.min(0)
    x1, y1 = polygon.max(0)
    notch = notch_of(polygon)
    if notch is None:
        return [(x0, y0, x1, y1)]
    a0, b0, a1, b1 = notch
    full = (x0, b1, x1, y1) if b0 <= y0 + 1e-9 else (x0, y0, x1, b0)
    rest = (a1, b0, x1, b1) if a0 <= x0 + 1e-9 else (x0, b0, a0, b1)
    return [full, rest]


def floor_pattern(rng: np.random.Generator) -> np.ndarray:
    """A tileable texture of planks, tiles or carpet, (128, 128, 3) uint8."""
    n = TEXTURE_SIZE
    y, x = np.mgrid[0:n, 0:n]
    kind = int(rng.integers(3))
    if kind == 0:
        base = np.array(wood(rng))
        boards = 8
        board = y * boards // n
        shade = rng.uniform(0.85, 1.12, boards)[board]
        grain = 0.04 * np.sin((x + rng.uniform(0, n, boards)[board]) * 2 * np.pi / n * 3 + 2 * np.sin(y * 1.3))
        seam = (y % (n // boards) == 0) | ((x + board * 37) % n == 0)
        image = base * (shade + grain)[..., None] * np.where(seam, 0.6, 1.0)[..., None]
    elif kind == 1:
        a = np.array(hue(rng, 0.1, 0.85))
        b = a * rng.uniform(0.75, 1.0)
        tiles = 4
        check = ((x * tiles // n + y * tiles // n) % 2 == 0)[..., None]
        seam = ((x % (n // tiles)) < 2) | ((y % (n // tiles)) < 2)
        image = np.where(check, a, b) * np.where(seam, 0.7, 1.0)[..., None]
    else:
        image = np.array(hue(rng, 0.35, 0.65)) * rng.uniform(0.88, 1.08, (n, n, 1))
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def wall_pattern(rng: np.random.Generator) -> np.ndarray:
    """A tileable texture of light paint, stripes or a faint weave, (128, 128, 3) uint8."""
    n = TEXTURE_SIZE
    y, x = np.mgrid[0:n, 0:n]
    base = np.array(hue(rng, 0.18, 0.9))
    kind = int(rng.integers(4))
    if kind == 0:
        factor = np.where((x * 8 // n) % 2 == 0, 1.0, 0.9)
    elif kind == 1:
        factor = 1.0 - 0.04 * ((x * 32 // n + y * 32 // n) % 2)
    else:
        factor = np.ones((n, n))
    image = base * (factor * rng.uniform(0.985, 1.015, (n, n)))[..., None]
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)
