"""Recipes: one function furnishes each kind of room. `furnish(seed)` chooses the kind and runs its recipe."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fastvst.scenes.rooms import parts
from fastvst.scenes.rooms.assets import load_pack
from fastvst.scenes.rooms.layout import HANG_GAP, Builder, Room, outline_room
from fastvst.scenes.rooms.parts import Piece

SMALL = ("coffee cup", "cup", "glass", "bottle", "plant", "bread", "milk carton", "headphones", "calendar", "handbag")
FLOOR_THINGS = (
    "teddy bear",
    "ball",
    "briefcase",
    "umbrella",
    "rocking horse",
    "fan",
    "speaker",
    "guitar",
    "crate",
    "chest",
    "barrel",
    "trash can",
    "fire extinguisher",
    "potty",
    "stool",
    "bench",
)
CROWDS = ("teddy bear", "trash can", "speaker", "crate", "stool", "chair", "armchair", "barrel", "bench", "plant")


def model(b: Builder, *names: str, vary: float = 0.1) -> Piece:
    """A random model of the catalogue with one of these class names."""
    return catalogue(b, *load_pack().named(*names), vary=vary)


def catalogue(b: Builder, *keys: str, vary: float = 0.0, size: float | None = None) -> Piece:
    """A random model with one of these catalogue keys; `size`: its factor, see `parts.from_model`."""
    return parts.from_model(load_pack().models[keys[int(b.rng.integers(len(keys)))]], b.rng, vary, size)


def chance(b: Builder, probability: float) -> bool:
    """True with this probability."""
    return float(b.rng.uniform()) < probability


def hang(b: Builder, piece: Piece, low: float, high: float, tries: int = 25) -> int:
    """Hang a piece on a wall with its base `low` to `high` metres above the floor, or lower below a low ceiling."""
    base = min(float(b.rng.uniform(low, high)), b.height - 0.05 - piece.size[2])
    return b.on_wall(piece, base=base, gap=HANG_GAP, tries=tries)


def shell(b: Builder, windows: int) -> None:
    """A door with free floor in front of it, and up to 2 `windows` + 1 windows, some with a curtain."""
    index = b.on_wall(parts.door(b.rng), gap=HANG_GAP)
    if index >= 0:
        b.keep_free(index, 0.7)
    for _ in range(int(b.rng.integers(2 * windows + 2))):
        index = hang(b, parts.window(b.rng), 0.85, 1.0)
        if index >= 0 and chance(b, 0.35):
            pane = b.items[index]
            drape = parts.curtain(b.rng)
            side = (pane.piece.size[0] + drape.size[0]) / 2 + 0.05
            b.next_to(index, drape, right=side if chance(b, 0.5) else -side, front=0.05 - pane.piece.size[1] / 2)


def pictures(b: Builder, count: int) -> None:
    """One to 2 `count` pieces of framed art on the walls."""
    for _ in range(int(b.rng.integers(1, 2 * count + 1))):
        hang(b, parts.picture(b.rng), 1.25, 1.6, tries=8)


def small_things(b: Builder, carrier: int, count: int, spread: float = 1.0) -> None:
    """Books, vases and small models on top of the item `carrier`."""
    for _ in range(count):
        kind = int(b.rng.integers(4))
        piece = (parts.books, parts.vase)[kind](b.rng) if kind < 2 else model(b, *SMALL)
        b.on_top(carrier, piece, spread=spread)


def lamp_on(b: Builder, carrier: int) -> None:
    b.on_top(carrier, parts.table_lamp(b.rng) if chance(b, 0.7) else model(b, "lamp"))


def bed_group(b: Builder) -> None:
    """A bed with night stands, lamps and perhaps a bench."""
    bed = b.on_wall(model(b, "bed"), front=0.5)
    if bed < 0:
        bed = b.on_wall(model(b, "bed"))
    if bed < 0:
        return
    w, d, _ = b.items[bed].piece.size
    stand = parts.night_stand(b.rng) if chance(b, 0.7) else model(b, "night stand")
    for side in (-1, 1):
        if chance(b, 0.8):
            gap = float(b.rng.uniform(0.05, 0.12))
            index = b.next_to(
                bed, stand, right=side * (w / 2 + gap + stand.size[0] / 2), front=-(d - stand.size[1]) / 2
            )
            if index >= 0 and chance(b, 0.7):
                lamp_on(b, index)
    if chance(b, 0.3):
        bench = model(b, "bench")
        b.next_to(bed, bench, right=0.0, front=d / 2 + bench.size[1] / 2 + 0.06)


def desk_group(b: Builder) -> None:
    """A desk with a chair, a screen, perhaps a lamp and a trash can."""
    table = parts.work_desk(b.rng) if chance(b, 0.6) else catalogue(b, "lbDesk", "desk", vary=0.08)
    desk = b.on_wall(table, front=0.6)
    if desk < 0:
        return
    chair = model(b, "office chair") if chance(b, 0.6) else model(b, "chair")
    reach = (table.size[1] + chair.size[1]) / 2 + float(b.rng.uniform(0.05, 0.2))
    b.next_to(
        desk, chair, right=float(b.rng.uniform(-0.15, 0.15)), front=reach, turn=180 + float(b.rng.uniform(-25, 25))
    )
    b.on_top(desk, parts.monitor(b.rng) if chance(b, 0.5) else parts.laptop(b.rng), face=0.0)
    if chance(b, 0.6):
        lamp_on(b, desk)
    small_things(b, desk, int(b.rng.integers(0, 3)))
    if chance(b, 0.6):
        b.next_to(desk, model(b, "trash can"), right=table.size[0] / 2 + 0.25, front=0.0)


def table_group(b: Builder) -> None:
    """A dining table with chairs, away from the walls."""
    kind = int(b.rng.integers(4))
    table = (
        parts.dining_table(b.rng)
        if kind < 2
        else catalogue(b, ("oakTable", "tableWithTablecloth")[kind - 2], vary=0.08)
    )
    for _ in range(10):
        index = b.anywhere(table, margin=1.0, tries=3)
        if index >= 0:
            break
    else:
        return
    chair = model(b, "chair")
    w, d, _ = table.size
    seats = [(0.0, 1), (0.0, -1)] if w < 1.1 else [(x, y) for x in (-w / 4, w / 4) for y in (1, -1)]
    for right, side in seats:
        if chance(b, 0.85):
            reach = (d + chair.size[1]) / 2 + float(b.rng.uniform(0.03, 0.12))
            b.next_to(
                index,
                chair,
                right=right,
                front=side * reach,
                turn=(180 if side > 0 else 0) + float(b.rng.uniform(-8, 8)),
            )
    for side in (-1, 1):
        if chance(b, 0.5):
            reach = (w + chair.size[1]) / 2 + float(b.rng.uniform(0.03, 0.12))
            b.next_to(index, chair, right=side * reach, front=0.0, turn=side * 90.0)
    small_things(b, index, int(b.rng.integers(1, 4)), spread=0.65)


def sofa_group(b: Builder) -> None:
    """A sofa with a coffee table, and on each side an armchair, a side table or a lamp."""
    couch = catalogue(b, "couch", "sofa2", "winchesterSofa", "L_shaped_sofa", "couch2", vary=0.08)
    sofa = b.on_wall(couch, front=1.0)
    if sofa < 0:
        return
    w, d, _ = couch.size
    low = parts.coffee_table(b.rng)
    index = b.next_to(sofa, low, right=0.0, front=d / 2 + low.size[1] / 2 + float(b.rng.uniform(0.3, 0.45)))
    if index >= 0:
        small_things(b, index, int(b.rng.integers(0, 3)))
    for side in (-1, 1):
        if chance(b, 0.45):
            seat = model(b, "armchair")
            b.next_to(sofa, seat, right=side * (w / 2 + 0.1), front=d / 2 + 0.75, turn=side * -70.0)
        elif chance(b, 0.5):
            table = parts.side_table(b.rng)
            index = b.next_to(
                sofa, table, right=side * (w / 2 + table.size[0] / 2 + 0.06), front=-(d - table.size[1]) / 2
            )
            if index >= 0:
                lamp_on(b, index)
        else:
            lamp = parts.floor_lamp(b.rng)
            b.next_to(sofa, lamp, right=side * (w / 2 + lamp.size[0] / 2 + 0.08), front=-(d - lamp.size[1]) / 2)


def television(b: Builder) -> None:
    """A television on a stand, or a cabinet with one."""
    if chance(b, 0.25):
        b.on_wall(catalogue(b, "televisionCabinet", vary=0.08), front=0.5)
        return
    stand = b.on_wall(parts.tv_stand(b.rng), front=0.5)
    if stand >= 0:
        b.on_top(stand, model(b, "television", vary=0.2), face=0.0)
        small_things(b, stand, int(b.rng.integers(0, 2)))


def storage(b: Builder, count: int) -> None:
    """Dressers, cupboards and shelves along the walls."""
    for _ in range(count):
        kind = int(b.rng.integers(6))
        if kind == 0:
            index = b.on_wall(parts.dresser(b.rng))
            if index >= 0:
                small_things(b, index, int(b.rng.integers(0, 3)))
        elif kind == 1:
            b.on_wall(catalogue(b, "cupboard", vary=0.1))
        else:
            b.on_wall(model(b, "bookshelf", "shelves"))


def fillers(b: Builder, count: int) -> None:
    """Cartons, plants, lamps and other objects on the floor."""
    for _ in range(count):
        kind = int(b.rng.integers(5))
        if kind == 0:
            b.anywhere(parts.carton(b.rng))
        elif kind == 1:
            b.on_wall(catalogue(b, "plant", "decorativePlant", vary=0.15), gap=0.05)
        elif kind == 2:
            b.on_wall(parts.floor_lamp(b.rng), gap=0.05)
        else:
            b.anywhere(model(b, *FLOOR_THINGS, vary=0.12))


def crowd(b: Builder) -> None:
    """In half of the rooms three to six copies of one object along the walls: otherwise few classes have so many."""
    if chance(b, 0.5):
        piece = model(b, *CROWDS)
        for _ in range(int(b.rng.integers(3, 7))):
            b.on_wall(piece, gap=0.05)


def bedroom(b: Builder) -> None:
    shell(b, 1)
    bed_group(b)
    if chance(b, 0.7):
        b.on_wall(catalogue(b, "wardrobeWithSlidingDoors", vary=0.08), front=0.4)
    if chance(b, 0.5):
        desk_group(b)
    if chance(b, 0.2):
        b.on_wall(model(b, "crib"))
    storage(b, int(b.rng.integers(1, 3)))
    pictures(b, 2)
    fillers(b, int(b.rng.integers(3, 6)))


def living_room(b: Builder) -> None:
    shell(b, 2)
    sofa_group(b)
    television(b)
    if chance(b, 0.4):
        table_group(b)
    if chance(b, 0.15):
        b.on_wall(model(b, "piano"), front=0.3)
    storage(b, int(b.rng.integers(1, 4)))
    pictures(b, 3)
    fillers(b, int(b.rng.integers(3, 7)))


def office(b: Builder) -> None:
    shell(b, 1)
    for _ in range(int(b.rng.integers(1, 4))):
        desk_group(b)
    if chance(b, 0.6):
        b.on_wall(model(b, "whiteboard"), front=0.3)
    storage(b, int(b.rng.integers(2, 4)))
    if chance(b, 0.6):
        b.on_wall(model(b, "radiator"))
    pictures(b, 1)
    fillers(b, int(b.rng.integers(2, 6)))


def kitchen(b: Builder) -> None:
    shell(b, 1)
    walls = b.walls()
    order = b.rng.permutation(len(walls))
    wall = int(max(order, key=lambda k: walls[int(k)][3]))
    units = ["sinkCabinet", "lowerCabinet", "drawersCabinet", "lowerCabinet"]
    b.rng.shuffle(units)
    s = 0.4
    size = parts.stretch(b.rng, 2.17, most=1.1)  # one factor for the row; 2.17 m is the tallest of its cabinets
    row = [("largeFridge", "refrigerator")[int(b.rng.integers(2))], *units[: int(b.rng.integers(3, 5))], "highCabinet"]
    for key in row:
        piece = catalogue(b, key, size=size)
        w = piece.size[0]
        index = b.on_wall(piece, wall=wall, at=s + w / 2, tries=1)
        if index >= 0:
            small_things(b, index, int(b.rng.integers(0, 2)))
            if key in units and chance(b, 0.7):
                hung = catalogue(b, "upperCabinet", "glassDoorCabinet", size=size)
                b.on_wall(hung, wall=wall, at=s + w / 2, base=1.45 * size, gap=HANG_GAP, tries=1)
        s += w + 0.035
    table_group(b)
    if chance(b, 0.5):
        b.on_wall(model(b, "oven", vary=0.05))
    fillers(b, int(b.rng.integers(2, 5)))
    pictures(b, 2)


def bathroom(b: Builder) -> None:
    shell(b, int(b.rng.integers(0, 2)))
    if chance(b, 0.6):
        b.on_wall(parts.bathtub(b.rng))
    else:
        b.on_wall(model(b, "shower stall"), gap=0.03)
    index = b.on_wall(model(b, "sink"), front=0.5)
    if index >= 0:
        sink = b.items[index]
        glass = parts.mirror(b.rng)
        for k, (start, along, normal, _) in enumerate(b.walls()):
            offset = np.array(sink.position[:2]) - start
            if float(offset @ normal) < sink.piece.size[1] / 2 + 0.05:
                base = max(1.25, sink.piece.size[2] + 0.05)
                b.on_wall(glass, wall=k, at=float(offset @ along), base=base, gap=HANG_GAP, tries=1)
                break
    b.on_wall(model(b, "toilet", vary=0.06), front=0.4)
    for name, probability in (("bidet", 0.5), ("trash can", 0.7), ("radiator", 0.4), ("potty", 0.2), ("stool", 0.4)):
        if chance(b, probability):
            b.on_wall(model(b, name))
    if chance(b, 0.7):
        hang(b, model(b, "towel rack"), 0.7, 1.1)
    if chance(b, 0.4):
        b.on_wall(catalogue(b, "verticalShelves", vary=0.1))
    fillers(b, int(b.rng.integers(1, 3)))


def hobby_room(b: Builder) -> None:
    shell(b, 1)
    b.anywhere(model(b, "pool table", "football table"), margin=0.9)
    if chance(b, 0.6):
        sofa_group(b)
    if chance(b, 0.5):
        b.on_wall(model(b, "piano"), front=0.3)
    television(b)
    storage(b, 2)
    pictures(b, 3)
    fillers(b, int(b.rng.integers(4, 8)))


# kind: (recipe, probability, smallest and largest side in metres)
KINDS: dict[str, tuple[Callable[[Builder], None], float, float, float]] = {
    "bedroom": (bedroom, 0.26, 3.4, 5.0),
    "living room": (living_room, 0.28, 4.2, 6.5),
    "office": (office, 0.18, 3.4, 5.5),
    "kitchen": (kitchen, 0.12, 3.8, 5.5),
    "bathroom": (bathroom, 0.08, 2.8, 3.6),
    "hobby room": (hobby_room, 0.08, 4.8, 6.5),
}


def furnish(seed: int, l_shape: float = 0.25) -> Room:
    """The room with this seed, with at least six pieces; the same seed always gives the same room."""
    rng = np.random.default_rng([seed, 1])
    while True:
        names = list(KINDS)
        weights = np.array([KINDS[name][1] for name in names])
        kind = names[int(rng.choice(len(names), p=weights / weights.sum()))]
        recipe, _, low, high = KINDS[kind]
        builder = Builder(rng, outline_room(rng, low, high, l_shape), float(rng.uniform(2.45, 2.9)))
        recipe(builder)
        crowd(builder)
        if len(builder.items) >= 6:
            return Room(kind, seed, builder.polygon, builder.height, tuple(builder.items))
