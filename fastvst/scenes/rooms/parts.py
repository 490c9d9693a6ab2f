"""Parametric pieces that the furniture pack lacks: doors, windows, framed art, lamps, low tables, a bathtub, books.

Every public function with only a Generator returns a random `Piece` whose mesh touches all six sides of its box.
"""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fastvst.scenes.rooms.assets import Block, Mesh, Model, boxes_mesh, join, lathe_mesh

# Least and greatest factor by which a piece differs from its usual size. With less, the name alone gives the size: at
# 0.9 to 1.1 the best number for each name is within 10 % of the truth in 62 % of the questions.
SPREAD = (0.7, 1.4)
LONGEST = 2.4  # metres; longer pieces leave no place for others
GRID = 48  # cells along each side of the top of a piece that carries others


@dataclass(frozen=True, eq=False)
class Piece:
    """An object to place: class name, size (width, depth, height) in metres, mesh in the frame of `assets.Mesh`.

    `top`: height of a flat top that covers the whole footprint and can carry objects, or -1.
    """

    name: str
    size: tuple[float, float, float]
    mesh: Mesh
    top: float = -1.0


def stretch(rng: np.random.Generator, longest: float, least: float = SPREAD[0], most: float = SPREAD[1]) -> float:
    """A random factor for all sides of a piece whose longest side is `longest` metres.

    Its logarithm is uniform from `least` to `most`. No piece becomes longer than LONGEST, except by its own design.
    """
    most = max(min(most, LONGEST / longest), 1.0)
    return math.exp(rng.uniform(math.log(least), math.log(most)))


def _piece(
    rng: np.random.Generator, name: str, mesh: Mesh, carries: bool = False, spread: tuple[float, float] = SPREAD
) -> Piece:
    """A piece of the mesh in a random size, moved to the frame of `Mesh`; `carries`: its top is flat."""
    low = mesh.positions.min(0)
    high = mesh.positions.max(0)
    shift = np.array([(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, low[2]], dtype=np.float32)
    scale = np.float32(stretch(rng, float((high - low).max()), *spread))
    centred = Mesh((mesh.positions - shift) * scale, mesh.uv, mesh.rgba, mesh.layer, mesh.triangles)
    w, d, h = (float(s) for s in (high - low) * scale)
    return Piece(name, (w, d, h), centred, h if carries else -1.0)


@lru_cache(maxsize=8)  # a carrier is asked once for each thing on it
def support(piece: Piece) -> np.ndarray:
    """Where the top of a piece can carry something: (GRID, GRID) booleans over its footprint, [depth, width].

    A cell counts if a triangle at most 2 mm below `piece.top` covers its centre.
    """
    corners = piece.mesh.positions[piece.mesh.triangles].astype(np.float64)
    a, b, c = np.moveaxis(corners[(corners[..., 2] > piece.top - 0.002).all(1)][..., :2], 1, 0)
    steps = (np.arange(GRID) + 0.5) / GRID - 0.5
    x, y = np.meshgrid(steps * piece.size[0], steps * piece.size[1])
    points = np.stack([x.ravel(), y.ravel()], 1)[:, None]
    sides = []
    for start, end in ((a, b), (b, c), (c, a)):
        along = end - start
        off = points - start
        sides.append(along[:, 0] * off[..., 1] - along[:, 1] * off[..., 0])
    covered = (np.minimum.reduce(sides) >= 0) | (np.maximum.reduce(sides) <= 0)
    return covered.any(1).reshape(GRID, GRID)


def from_model(model: Model, rng: np.random.Generator, vary: float = 0.1, size: float | None = None) -> Piece:
    """A model of the catalogue in a random size and slightly changed colours.

    All sides are scaled by `size` (None draws it, see `stretch`), then each by up to 1 +- `vary`.
    """
    plan, tall = rng.uniform(1 - vary, 1 + vary, 2)
    if size is None:
        size = stretch(rng, float(model.size.max()) * (1 + vary))
    scale = np.array([plan * rng.uniform(1 - vary / 2, 1 + vary / 2), plan, tall], dtype=np.float32) * np.float32(size)
    tint = (np.array(hue(rng, 0.35, 0.9)) * 0.5 + 0.5) * rng.uniform(0.75, 1.15)
    rgba = model.mesh.rgba.copy()
    rgba[:, :3] = np.clip(rgba[:, :3] * tint, 0.02, 1.0)
    sides = model.size * scale
    flat_top = model.drop > 0 and abs(model.drop - model.size[2]) < 0.01
    mesh = Mesh(model.mesh.positions * scale, model.mesh.uv, rgba, model.mesh.layer, model.mesh.triangles)
    w, d, h = (float(s) for s in sides)
    return Piece(model.name, (w, d, h), mesh, h if flat_top else -1.0)


def hue(rng: np.random.Generator, saturation: float, value: float) -> tuple[float, float, float]:
    """A random colour (rgb in [0, 1]) of about this saturation and brightness."""
    return colorsys.hsv_to_rgb(
        rng.uniform(), min(1.0, saturation * rng.uniform(0.4, 1.6)), min(1.0, value * rng.uniform(0.75, 1.1))
    )


def wood(rng: np.random.Generator) -> tuple[float, float, float]:
    """A random brown (rgb in [0, 1]), from pale birch to dark walnut."""
    tone = np.array([0.72, 0.52, 0.34]) * rng.uniform(0.45, 1.25) + rng.uniform(-0.03, 0.03, 3)
    r, g, b = np.clip(tone, 0.05, 0.95)
    return float(r), float(g), float(b)


def door(rng: np.random.Generator) -> Piece:
    w = rng.uniform(0.8, 1.0)
    h = rng.uniform(1.98, 2.1)
    leaf, frame = (wood(rng), wood(rng)) if rng.uniform() < 0.6 else ((0.9, 0.9, 0.88), (0.8, 0.8, 0.78))
    panel = tuple(0.85 * c for c in leaf)
    blocks: list[Block] = [
        ((-w / 2, -0.03, 0), (w / 2, 0.03, h), frame),
        ((-w / 2 + 0.06, -0.04, 0.005), (w / 2 - 0.06, 0.0, h - 0.06), leaf),
        ((-w / 2 + 0.18, -0.045, 0.2), (w / 2 - 0.18, 0.0, h * 0.42), panel),
        ((-w / 2 + 0.18, -0.045, h * 0.5), (w / 2 - 0.18, 0.0, h - 0.25), panel),
        ((w / 2 - 0.15, -0.08, 1.0), (w / 2 - 0.09, -0.04, 1.04), (0.75, 0.7, 0.5)),
    ]
    return _piece(rng, "door", boxes_mesh(blocks), spread=(0.85, 1.12))


def window(rng: np.random.Generator) -> Piece:
    w = rng.uniform(0.9, 1.8)
    h = rng.uniform(0.9, 1.3)
    frame = (0.92, 0.92, 0.9) if rng.uniform() < 0.7 else wood(rng)
    sky = (0.62, 0.78, 0.95, 0.75)
    blocks: list[Block] = [((-w / 2, -0.01, 0), (w / 2, 0.03, h), sky)]
    bars = int(rng.integers(2, 4))
    for k in range(bars):
        x = -w / 2 + k * (w - 0.06) / (bars - 1)
        blocks.append(((x, -0.03, 0), (x + 0.06, 0.03, h), frame))
    blocks += [((-w / 2, -0.03, z), (w / 2, 0.03, z + 0.06), frame) for z in (0.0, h - 0.06)]
    return _piece(rng, "window", boxes_mesh(blocks))


def picture(rng: np.random.Generator) -> Piece:
    w = rng.uniform(0.35, 1.0)
    h = rng.uniform(0.35, 0.8)
    blocks: list[Block] = [
        ((-w / 2, -0.02, 0), (w / 2, 0.02, h), wood(rng)),
        ((-w / 2 + 0.04, -0.022, 0.04), (w / 2 - 0.04, 0.0, h - 0.04), hue(rng, 0.5, 0.8)),
    ]
    for _ in range(int(rng.integers(2, 5))):  # flat shapes as the painting
        a = np.sort(rng.uniform(-w / 2 + 0.06, w / 2 - 0.06, 2))
        b = np.sort(rng.uniform(0.06, h - 0.06, 2))
        blocks.append(((a[0], -0.024, b[0]), (a[1], 0.0, b[1]), hue(rng, 0.7, 0.8)))
    return _piece(rng, "picture", boxes_mesh(blocks))


def mirror(rng: np.random.Generator) -> Piece:
    w = rng.uniform(0.5, 0.9)
    h = rng.uniform(0.6, 0.9)
    blocks: list[Block] = [
        ((-w / 2, -0.015, 0), (w / 2, 0.015, h), (0.55, 0.55, 0.55)),
        ((-w / 2 + 0.03, -0.018, 0.03), (w / 2 - 0.03, 0.0, h - 0.03), (0.6, 0.64, 0.66, 0.15)),
    ]
    return _piece(rng, "mirror", boxes_mesh(blocks))


def curtain(rng: np.random.Generator) -> Piece:
    w = rng.uniform(0.35, 0.6)
    h = rng.uniform(1.9, 2.2)
    colour = hue(rng, 0.5, 0.8)
    folds = int(rng.integers(4, 7))
    step = w / folds
    blocks: list[Block] = [
        (
            (-w / 2 + k * step, -0.05 if k % 2 else -0.02, 0),
            (-w / 2 + (k + 1) * step, 0.05 if k % 2 else 0.02, h),
            tuple(c * (1.0 if k % 2 else 0.82) for c in colour),
        )
        for k in range(folds)
    ]
    return _piece(rng, "curtain", boxes_mesh(blocks))


def coffee_table(rng: np.random.Generator) -> Piece:
    w = rng.uniform(0.8, 1.3)
    d = rng.uniform(0.5, 0.75)
    h = rng.uniform(0.35, 0.5)
    return _piece(rng, "coffee table", _table(w, d, h, wood(rng)), carries=True)


def side_table(rng: np.random.Generator) -> Piece:
    w = rng.uniform(0.4, 0.55)
    h = rng.uniform(0.45, 0.6)
    return _piece(rng, "side table", _table(w, w, h, wood(rng)), carries=True)


def work_desk(rng: np.random.Generator) -> Piece:
    w = rng.uniform(1.1, 1.7)
    d = rng.uniform(0.6, 0.8)
    h = rng.uniform(0.7, 0.77)
    colour = wood(rng) if rng.uniform() < 0.7 else (0.85, 0.85, 0.85)
    drawers = [
        ((w / 2 - 0.42, -d / 2 + 0.05, 0.08), (w / 2 - 0.03, d / 2 - 0.03, h - 0.05), tuple(0.8 * c for c in colour))
    ]
    return _piece(rng, "desk", join(_table(w, d, h, colour), boxes_mesh(drawers)), carries=True)


def dining_table(rng: np.random.Generator) -> Piece:
    w = rng.uniform(1.2, 1.9)
    d = rng.uniform(0.75, 1.0)
    h = rng.uniform(0.71, 0.77)
    return _piece(rng, "table", _table(w, d, h, wood(rng)), carries=True)


def _table(w: float, d: float, h: float, colour: tuple[float, ...]) -> Mesh:
    leg = 0.06
    dark = tuple(0.75 * c for c in colour)
    blocks: list[Block] = [((-w / 2, -d / 2, h - 0.04), (w / 2, d / 2, h), colour)]
    for x in (-w / 2 + 0.03, w / 2 - 0.03 - leg):
        for y in (-d / 2 + 0.03, d / 2 - 0.03 - leg):
            blocks.append(((x, y, 0), (x + leg, y + leg, h - 0.04), dark))
    return boxes_mesh(blocks)


def _chest(
    rng: np.random.Generator,
    name: str,
    w: float,
    d: float,
    h: float,
    rows: int,
    columns: int,
    colour: tuple[float, ...],
) -> Piece:
    front = tuple(0.88 * c for c in colour)
    knob = (0.3, 0.3, 0.3)
    blocks: list[Block] = [
        ((-w / 2, -d / 2 + 0.02, 0.04), (w / 2, d / 2, h), colour),
        ((-w / 2 + 0.04, -d / 2 + 0.05, 0), (w / 2 - 0.04, d / 2 - 0.02, 0.04), knob),
    ]
    for r in range(rows):
        for c in range(columns):
            x0 = -w / 2 + 0.02 + c * (w - 0.02) / columns
            z0 = 0.06 + r * (h - 0.08) / rows
            x1 = x0 + (w - 0.02) / columns - 0.02
            z1 = z0 + (h - 0.08) / rows - 0.02
            blocks.append(((x0, -d / 2 + 0.01, z0), (x1, 0, z1), front))
            blocks.append(
                (((x0 + x1) / 2 - 0.05, -d / 2, (z0 + z1) / 2), ((x0 + x1) / 2 + 0.05, 0, (z0 + z1) / 2 + 0.02), knob)
            )
    return _piece(rng, name, boxes_mesh(blocks), carries=True)


def tv_stand(rng: np.random.Generator) -> Piece:
    return _chest(
        rng, "tv stand", rng.uniform(1.2, 1.8), rng.uniform(0.35, 0.5), rng.uniform(0.4, 0.6), 1, 3, wood(rng)
    )


def dresser(rng: np.random.Generator) -> Piece:
    colour = wood(rng) if rng.uniform() < 0.7 else hue(rng, 0.25, 0.9)
    return _chest(rng, "dresser", rng.uniform(0.8, 1.3), rng.uniform(0.4, 0.5), rng.uniform(0.75, 1.1), 4, 2, colour)


def night_stand(rng: np.random.Generator) -> Piece:
    return _chest(
        rng, "night stand", rng.uniform(0.4, 0.55), rng.uniform(0.36, 0.45), rng.uniform(0.42, 0.62), 2, 1, wood(rng)
    )


def floor_lamp(rng: np.random.Generator) -> Piece:
    h = rng.uniform(1.4, 1.75)
    r = rng.uniform(0.16, 0.24)
    shade = (*hue(rng, 0.25, 0.95), 0.35)
    metal = (0.2, 0.2, 0.22)
    return _piece(
        rng,
        "floor lamp",
        lathe_mesh(
            [
                ([(0.0, 0.0), (r * 0.8, 0.0), (r * 0.8, 0.03), (0.02, 0.04), (0.02, h - 0.1)], metal),
                ([(r, h - 0.35), (r * 0.65, h), (0.0, h)], shade),
            ]
        ),
    )


def table_lamp(rng: np.random.Generator) -> Piece:
    h = rng.uniform(0.35, 0.55)
    r = rng.uniform(0.11, 0.16)
    shade = (*hue(rng, 0.25, 0.95), 0.35)
    return _piece(
        rng,
        "lamp",
        lathe_mesh(
            [
                ([(0.0, 0.0), (r * 0.6, 0.0), (r * 0.5, 0.05), (0.03, h * 0.3), (0.015, h - 0.05)], hue(rng, 0.5, 0.6)),
                ([(r, h * 0.5), (r * 0.7, h), (0.0, h)], shade),
            ]
        ),
    )


def vase(rng: np.random.Generator) -> Piece:
    h = rng.uniform(0.22, 0.38)
    r = rng.uniform(0.06, 0.1)
    profile = [(0.0, 0.0), (r * 0.6, 0.0), (r, h * 0.4), (r * 0.45, h * 0.8), (r * 0.6, h)]
    return _piece(rng, "vase", lathe_mesh([(profile, hue(rng, 0.6, 0.75))]))


def books(rng: np.random.Generator) -> Piece:
    blocks: list[Block] = []
    z = 0.0
    w = rng.uniform(0.2, 0.28)
    d = rng.uniform(0.15, 0.2)
    for k in range(int(rng.integers(3, 7))):
        t = rng.uniform(0.025, 0.05)
        dx = 0.0 if k == 0 else rng.uniform(0, 0.02)
        blocks.append(((-w / 2 + dx, -d / 2 + dx, z), (w / 2 - dx, d / 2 - dx, z + t), hue(rng, 0.65, 0.7)))
        z += t
    return _piece(rng, "books", boxes_mesh(blocks))


def laptop(rng: np.random.Generator) -> Piece:
    w = rng.uniform(0.3, 0.37)
    d = rng.uniform(0.22, 0.26)
    grey = rng.uniform(0.2, 0.7)
    blocks: list[Block] = [
        ((-w / 2, -d / 2, 0), (w / 2, d / 2, 0.02), (grey, grey, grey)),
        ((-w / 2, d / 2 - 0.012, 0.02), (w / 2, d / 2, d), (grey, grey, grey)),
        ((-w / 2 + 0.015, d / 2 - 0.016, 0.04), (w / 2 - 0.015, d / 2 - 0.01, d - 0.015), (0.3, 0.5, 0.8, 0.4)),
    ]
    return _piece(rng, "laptop", boxes_mesh(blocks))


def monitor(rng: np.random.Generator) -> Piece:
    w = rng.uniform(0.5, 0.65)
    h = rng.uniform(0.42, 0.52)
    blocks: list[Block] = [
        ((-0.12, -0.1, 0), (0.12, 0.1, 0.015), (0.1, 0.1, 0.1)),
        ((-0.03, 0.01, 0.01), (0.03, 0.04, h * 0.5), (0.1, 0.1, 0.1)),
        ((-w / 2, -0.03, h * 0.28), (w / 2, 0.01, h), (0.1, 0.1, 0.1)),
        ((-w / 2 + 0.02, -0.033, h * 0.28 + 0.02), (w / 2 - 0.02, 0.0, h - 0.02), (*hue(rng, 0.6, 0.7), 0.5)),
    ]
    return _piece(rng, "monitor", boxes_mesh(blocks))


def carton(rng: np.random.Generator) -> Piece:
    w, d, h = rng.uniform(0.3, 0.6, 3)
    shade = rng.uniform(0.8, 1.1)
    brown = (0.66 * shade, 0.5 * shade, 0.33 * shade)
    blocks: list[Block] = [
        ((-w / 2, -d / 2, 0), (w / 2, d / 2, h), brown),
        ((-0.03, -d / 2, h), (0.03, d / 2, h + 0.002), (0.8, 0.72, 0.55)),
    ]
    return _piece(rng, "box", boxes_mesh(blocks))


def bathtub(rng: np.random.Generator) -> Piece:
    w = rng.uniform(1.5, 1.8)
    d = rng.uniform(0.7, 0.8)
    h = rng.uniform(0.5, 0.6)
    t = 0.07
    white = (0.93, 0.93, 0.93)
    inner = (0.82, 0.85, 0.88)
    blocks: list[Block] = [
        ((-w / 2, -d / 2, 0), (w / 2, d / 2, 0.12), white),
        ((-w / 2, -d / 2, 0.12), (-w / 2 + t, d / 2, h), white),
        ((w / 2 - t, -d / 2, 0.12), (w / 2, d / 2, h), white),
        ((-w / 2 + t, -d / 2, 0.12), (w / 2 - t, -d / 2 + t, h), white),
        ((-w / 2 + t, d / 2 - t, 0.12), (w / 2 - t, d / 2, h), white),
        ((-w / 2 + t, -d / 2 + t, 0.12), (w / 2 - t, d / 2 - t, 0.14), inner),
    ]
    return _piece(rng, "bathtub", boxes_mesh(blocks))
