"""The furniture pack: meshes in metres at the origin. Loading it unpickles nothing."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

PACK = Path(__file__).parent / "assets" / "furniture.npz"
TEXTURE_SIZE = 128
# A block of `boxes_mesh`: low corner, high corner, and a colour: rgb or rgb + emission, each in [0, 1].
Block = tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, ...]]


@dataclass(frozen=True, eq=False)
class Mesh:
    """Triangles of one piece. Frame: X is the width, Y goes from front (-Y) to back, Z is up; the origin is the centre
    of the base of its box.

    positions (V, 3) float32 metres; uv (V, 2) float32; rgba (V, 4) float32, colour in [0, 1] with the emission in the
    last channel; layer (V,) int32 texture index, or -1; triangles (F, 3) int32.
    """

    positions: np.ndarray
    uv: np.ndarray
    rgba: np.ndarray
    layer: np.ndarray
    triangles: np.ndarray


@dataclass(frozen=True, eq=False)
class Model:
    """A model of the catalogue, at catalogue size.

    `size`: width, depth, height in metres. `drop`: height of the surface that carries other objects, negative for none.
    `elevation`: height of the base above the floor.
    """

    key: str
    name: str
    size: np.ndarray
    drop: float
    elevation: float
    mesh: Mesh


@dataclass(frozen=True, eq=False)
class Pack:
    """All models by catalogue key and the texture stack (T, 128, 128, 3) uint8."""

    models: dict[str, Model]
    textures: np.ndarray

    def named(self, *names: str) -> list[str]:
        """Catalogue keys of the models with one of these class names, in pack order."""
        return [key for key, model in self.models.items() if model.name in names]


@cache
def load_pack() -> Pack:
    """The furniture pack of the package, read once per process (2 MB, about 0.2 s)."""
    with np.load(PACK, allow_pickle=False) as data:
        raw = {name: data[name] for name in data.files}
    blob = raw["texture_bytes"].tobytes()
    starts = raw["texture_start"]
    textures = np.stack(
        [np.asarray(Image.open(io.BytesIO(blob[a:b])).convert("RGB")) for a, b in zip(starts, starts[1:], strict=False)]
    )
    models = {}
    for k, key in enumerate(raw["key"].tolist()):
        v = slice(raw["vertex_start"][k], raw["vertex_start"][k + 1])
        f = slice(raw["triangle_start"][k], raw["triangle_start"][k + 1])
        size = raw["size"][k].astype(np.float64)
        fraction = raw["positions"][v].astype(np.float64) / 65535 - np.array([0.5, 0.5, 0.0])
        material = raw["material"][v].astype(np.int64)
        rgb = raw["rgb"][material].astype(np.float32) / 255
        models[key] = Model(
            key=key,
            name=str(raw["name"][k]),
            size=size,
            drop=float(raw["drop"][k]),
            elevation=float(raw["elevation"][k]),
            mesh=Mesh(
                positions=(fraction * size).astype(np.float32),
                uv=raw["uv"][v].astype(np.float32),
                rgba=np.concatenate([rgb, np.zeros((len(rgb), 1), np.float32)], 1),
                layer=raw["layer"][material].astype(np.int32),
                triangles=raw["triangles"][f].astype(np.int32),
            ),
        )
    return Pack(models, textures)


def boxes_mesh(parts: Sequence[Block]) -> Mesh:
    """A mesh of axis-aligned blocks."""
    quads = np.array([[0, 3, 2, 1], [4, 5, 6, 7], [0, 1, 5, 4], [2, 3, 7, 6], [1, 2, 6, 5], [3, 0, 4, 7]])
    faces = np.concatenate([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    unit = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1], [1, 1, 1], [0, 1, 1]])
    positions: list[np.ndarray] = []
    rgba: list[np.ndarray] = []
    triangles: list[np.ndarray] = []
    for low, high, colour in parts:
        triangles.append(faces + 8 * len(positions))
        positions.append(np.array(low) + unit * (np.array(high) - np.array(low)))
        rgba.append(np.tile([*colour[:3], colour[3] if len(colour) > 3 else 0.0], (8, 1)))
    return _untextured(np.concatenate(positions), np.concatenate(rgba), np.concatenate(triangles))


def lathe_mesh(profiles: list[tuple[list[tuple[float, float]], tuple[float, ...]]], sides: int = 20) -> Mesh:
    """A mesh of surfaces of revolution about Z, each (list of (radius, height), rgb or rgb + emission)."""
    turn = np.arange(sides) * 2 * np.pi / sides
    ring = np.stack([np.cos(turn), np.sin(turn)], 1)
    positions = []
    rgba = []
    triangles = []
    count = 0
    for profile, colour in profiles:
        for radius, height in profile:
            positions.append(np.concatenate([ring * radius, np.full((sides, 1), height)], 1))
            rgba.append(np.tile([*colour[:3], colour[3] if len(colour) > 3 else 0.0], (sides, 1)))
        k = np.arange(sides)
        for level in range(len(profile) - 1):
            a = count + level * sides
            low = a + k
            low_next = a + (k + 1) % sides
            high = a + sides + k
            high_next = a + sides + (k + 1) % sides
            triangles += [np.stack([low, low_next, high_next], 1), np.stack([low, high_next, high], 1)]
        count += len(profile) * sides
    return _untextured(np.concatenate(positions), np.concatenate(rgba), np.concatenate(triangles))


def join(*meshes: Mesh) -> Mesh:
    """Several meshes as one."""
    offsets = np.cumsum([0] + [len(m.positions) for m in meshes])
    return Mesh(
        np.concatenate([m.positions for m in meshes]),
        np.concatenate([m.uv for m in meshes]),
        np.concatenate([m.rgba for m in meshes]),
        np.concatenate([m.layer for m in meshes]),
        np.concatenate([m.triangles + o for m, o in zip(meshes, offsets, strict=False)]).astype(np.int32),
    )


def _untextured(positions: np.ndarray, rgba: np.ndarray, triangles: np.ndarray) -> Mesh:
    count = len(positions)
    return Mesh(
        positions.astype(np.float32),
        np.zeros((count, 2), np.float32),
        rgba.astype(np.float32),
        np.full(count, -1, np.int32),
        triangles.astype(np.int32),
    )
