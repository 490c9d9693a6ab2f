"""Furniture layout: the outline of a room, placement of pieces, and collision tests between upright boxes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fastvst.scenes.rooms.parts import GRID, Piece, support

# Metres.
WALL_GAP = 0.02  # between a wall and a piece on the floor; skirting boards are thinner
HANG_GAP = 0.004  # between a wall and a piece that hangs on it; prevents z-fighting
CLEARANCE = 0.03  # least distance between the footprints of two pieces whose height ranges overlap


@dataclass(frozen=True, eq=False)
class Item:
    """A placed piece.

    `position`: centre of its base (x, y, z) in the world, metres. `yaw`: degrees counter-clockwise; at yaw 0 the front
    faces -Y. `anchored`: its back is to a wall. `on`: index of the item that carries it, or -1.
    """

    piece: Piece
    position: tuple[float, float, float]
    yaw: float
    anchored: bool = False
    on: int = -1

    @property
    def box(self) -> tuple[float, ...]:
        """Nine numbers in the world frame; local axes as in `SceneObject` (Y down, Z from front to back)."""
        x, y, z = self.position
        w, d, h = self.piece.size
        return (x, y, z + h / 2, w, h, d, -90.0, 0.0, self.yaw)


@dataclass(frozen=True, eq=False)
class Room:
    """A furnished room: `polygon` is its outline (K, 2), counter-clockwise, metres; `height` is in metres."""

    kind: str
    seed: int
    polygon: np.ndarray
    height: float
    items: tuple[Item, ...]


@dataclass(frozen=True, eq=False)
class Prism:
    """An upright box: centre and half sizes in plan (half sizes along its own axes), yaw in degrees, height range."""

    x: float
    y: float
    half_w: float
    half_d: float
    yaw: float
    low: float
    high: float

    def outline(self, grow: float = 0.0) -> np.ndarray:
        """Corners in plan (4, 2), counter-clockwise; `grow` metres are added on every side."""
        c = math.cos(math.radians(self.yaw))
        s = math.sin(math.radians(self.yaw))
        w = self.half_w + grow
        d = self.half_d + grow
        local = np.array([[-w, -d], [w, -d], [w, d], [-w, d]])
        return local @ np.array([[c, s], [-s, c]]) + np.array([self.x, self.y])


def prism_of(item: Item) -> Prism:
    """The prism that an item occupies."""
    x, y, z = item.position
    w, d, h = item.piece.size
    return Prism(x, y, w / 2, d / 2, item.yaw, z, z + h)


def collide(a: Prism, b: Prism, clearance: float = 0.0) -> bool:
    """Whether two prisms overlap in height and are closer than `clearance` in plan (separating axes)."""
    if a.low >= b.high or b.low >= a.high:
        return False
    pa = a.outline(clearance)
    pb = b.outline()
    for outline in (pa, pb):
        for k in range(2):
            axis = outline[k + 1] - outline[k]
            sa = pa @ axis
            sb = pb @ axis
            if sa.max() <= sb.min() or sb.max() <= sa.min():
                return False
    return True


def rests(piece: Piece, carrier: Piece, right: float, back: float, turn: float) -> bool:
    """Whether the flat top of `carrier` is below every part of a piece on it.

    A piece on the corner of a round table or on a tap would hang in the air.

    Args:
        right, back: centre of the piece in the axes of the carrier, metres.
        turn: yaw of the piece relative to the carrier, radians.
    """
    w, d, _ = carrier.size
    cells = (np.arange(GRID) + 0.5) / GRID - 0.5
    x, y = np.meshgrid(cells * w - right, cells * d - back)
    along = np.abs(math.cos(turn) * x + math.sin(turn) * y) <= piece.size[0] / 2 + 0.5 * w / GRID
    across = np.abs(-math.sin(turn) * x + math.cos(turn) * y) <= piece.size[1] / 2 + 0.5 * d / GRID
    return bool(support(carrier)[along & across].all())


def inside(polygon: np.ndarray, outline: np.ndarray, eps: float = 1e-9) -> bool:
    """Whether a convex outline (4, 2) lies in a rectangular or L-shaped polygon (K, 2) with axis-aligned walls.

    An L is its bounding rectangle without one corner. The outline must be in the rectangle and must not meet that
    corner, which is tested on the axes of the outline and of the world (separating axes).
    """
    low = polygon.min(0)
    high = polygon.max(0)
    if (outline < low - eps).any() or (outline > high + eps).any():
        return False
    notch = notch_of(polygon)
    if notch is None:
        return True
    corner = np.array([[notch[0], notch[1]], [notch[2], notch[1]], [notch[2], notch[3]], [notch[0], notch[3]]])
    axes = [np.array([1.0, 0.0]), np.array([0.0, 1.0]), outline[1] - outline[0], outline[2] - outline[1]]
    for axis in axes:
        a = outline @ axis
        b = corner @ axis
        if a.max() <= b.min() + eps or b.max() <= a.min() + eps:
            return True
    return False


def notch_of(polygon: np.ndarray) -> tuple[float, float, float, float] | None:
    """The rectangle (x0, y0, x1, y1) that an L-shaped polygon lacks; None for a rectangular polygon."""
    if len(polygon) == 4:
        return None
    low = polygon.min(0)
    high = polygon.max(0)
    before = np.roll(polygon, 1, axis=0)
    after = np.roll(polygon, -1, axis=0)
    e = polygon - before
    f = after - polygon
    reflex = polygon[int(np.argmin(e[:, 0] * f[:, 1] - e[:, 1] * f[:, 0]))]
    corners = np.array([[x, y] for x in (low[0], high[0]) for y in (low[1], high[1])])
    missing = corners[int(np.argmin([np.abs(polygon - c).sum(1).min() < 1e-9 for c in corners]))]
    x0, x1 = sorted((float(reflex[0]), float(missing[0])))
    y0, y1 = sorted((float(reflex[1]), float(missing[1])))
    return x0, y0, x1, y1


def outline_room(rng: np.random.Generator, low: float, high: float, l_shape: float) -> np.ndarray:
    """A random outline (K, 2): a rectangle, or with probability `l_shape` an L; sides of `low` to `high` metres."""
    w, d = rng.uniform(low, high, 2)
    if rng.uniform() >= l_shape or min(w, d) < 3.4:
        return np.array([[0, 0], [w, 0], [w, d], [0, d]])
    a, b = rng.uniform(0.25, 0.45, 2) * np.array([w, d])
    shape = np.array([[0, 0], [w, 0], [w, d - b], [w - a, d - b], [w - a, d], [0, d]])
    turns = int(rng.integers(4))
    for _ in range(turns):
        shape = np.stack([-shape[:, 1], shape[:, 0]], 1)
    return shape - shape.min(0)


class Builder:
    """Places one piece after the other. Every method that places returns the index of the item.

    A piece without a free place after some tries is left out; the method then returns -1.
    """

    def __init__(self, rng: np.random.Generator, polygon: np.ndarray, height: float):
        self.rng = rng
        self.polygon = polygon
        self.height = height
        self.items: list[Item] = []
        self.keepouts: list[Prism] = []

    def walls(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, float]]:
        """(start, direction, inward normal, length) of every wall."""
        result = []
        for p, q in zip(self.polygon, np.roll(self.polygon, -1, axis=0), strict=True):
            length = float(np.linalg.norm(q - p))
            along = (q - p) / length
            result.append((p, along, np.array([-along[1], along[0]]), length))
        return result

    def free(self, prism: Prism, clearance: float = CLEARANCE) -> bool:
        """Whether a prism is inside the room and clear of all items and of space that is kept free."""
        if prism.high > self.height - 0.02 or not inside(self.polygon, prism.outline()):
            return False
        others = [prism_of(item) for item in self.items] + self.keepouts
        return not any(collide(prism, other, clearance) for other in others)

    def add(self, item: Item, clearance: float = CLEARANCE) -> int:
        """Add the item if it fits at its position."""
        if not self.free(prism_of(item), clearance):
            return -1
        self.items.append(item)
        return len(self.items) - 1

    def on_wall(
        self,
        piece: Piece,
        *,
        base: float = 0.0,
        gap: float = WALL_GAP,
        wall: int | None = None,
        tries: int = 25,
        at: float | None = None,
        front: float = 0.0,
    ) -> int:
        """Place a piece with its back to a wall.

        Args:
            base: height of its base, metres.
            gap: distance from the wall, metres.
            wall: index of the wall; None tries random walls.
            at: position of the centre along the wall, metres; None tries random positions.
            front: metres that must be free in front of it now. Later pieces may use them.
        """
        walls = self.walls()
        w, d, h = piece.size
        for _ in range(tries):
            start, along, normal, length = walls[int(self.rng.integers(len(walls))) if wall is None else wall]
            margin = w / 2 + 0.03
            if length < 2 * margin:
                continue
            s = float(self.rng.uniform(margin, length - margin)) if at is None else at
            centre = start + along * s + normal * (gap + d / 2)
            yaw = math.degrees(math.atan2(normal[0], -normal[1]))
            if front > 0:
                ahead = centre + normal * (d / 2 + front / 2)
                if not self.free(Prism(ahead[0], ahead[1], w / 2, front / 2 - 0.01, yaw, 0.0, max(h, 1.0)), 0.0):
                    continue
            index = self.add(Item(piece, (float(centre[0]), float(centre[1]), base), yaw, anchored=True))
            if index >= 0:
                return index
        return -1

    def next_to(self, other: int, piece: Piece, *, right: float, front: float, turn: float = 0.0) -> int:
        """Place a piece on the floor relative to the item `other`, in the axes of that item.

        Args:
            right: metres along its +X between the two centres.
            front: metres along its -Y, the side that it faces.
            turn: degrees to add to its yaw.
        """
        base = self.items[other]
        c = math.cos(math.radians(base.yaw))
        s = math.sin(math.radians(base.yaw))
        x = base.position[0] + c * right + s * front
        y = base.position[1] + s * right - c * front
        return self.add(Item(piece, (x, y, 0.0), (base.yaw + turn + 180) % 360 - 180), clearance=0.01)

    def anywhere(self, piece: Piece, *, margin: float = 0.05, tries: int = 25) -> int:
        """Place a piece on the floor at a random position and angle, `margin` metres inside the bounding rectangle."""
        low = self.polygon.min(0)
        high = self.polygon.max(0)
        for _ in range(tries):
            x, y = self.rng.uniform(low + margin, high - margin)
            item = Item(piece, (float(x), float(y), 0.0), float(self.rng.uniform(-180, 180)))
            index = self.add(item, clearance=0.08)
            if index >= 0:
                return index
        return -1

    def on_top(
        self, other: int, piece: Piece, *, spread: float = 1.0, face: float | None = None, tries: int = 30
    ) -> int:
        """Place a piece on the flat top of the item `other`, inside its outline scaled by `spread`.

        `face`: yaw relative to the item; None tries random angles.
        """
        base = self.items[other]
        if base.piece.top < 0:
            return -1
        w, d, _ = base.piece.size
        z = base.position[2] + base.piece.top + 0.002
        for _ in range(tries):
            turn = float(self.rng.uniform(-180, 180)) if face is None else face
            t = math.radians(turn)
            half_w = (abs(math.cos(t)) * piece.size[0] + abs(math.sin(t)) * piece.size[1]) / 2
            half_d = (abs(math.sin(t)) * piece.size[0] + abs(math.cos(t)) * piece.size[1]) / 2
            room_w = w / 2 * spread - half_w - 0.01
            room_d = d / 2 * spread - half_d - 0.01
            if room_w <= 0 or room_d <= 0:
                return -1
            right = self.rng.uniform(-room_w, room_w)
            back = self.rng.uniform(-room_d, room_d)
            if not rests(piece, base.piece, right, back, t):
                continue
            c = math.cos(math.radians(base.yaw))
            s = math.sin(math.radians(base.yaw))
            x = base.position[0] + c * right - s * back
            y = base.position[1] + s * right + c * back
            yaw = (base.yaw + turn + 180) % 360 - 180
            index = self.add(Item(piece, (float(x), float(y), z), yaw, on=other), clearance=0.015)
            if index >= 0:
                return index
        return -1

    def keep_free(self, other: int, depth: float) -> None:
        """Keep `depth` metres in front of the item `other` free up to a height of 2 m, such as the swing of a door."""
        base = self.items[other]
        w, d, _ = base.piece.size
        s = math.sin(math.radians(base.yaw))
        c = math.cos(math.radians(base.yaw))
        ahead = d / 2 + depth / 2 + 0.005
        self.keepouts.append(
            Prism(base.position[0] + s * ahead, base.position[1] - c * ahead, w / 2, depth / 2, base.yaw, 0.0, 2.0)
        )
