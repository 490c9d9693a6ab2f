"""Placement checked by other geometry than the layout uses: shapely footprints, exact box IoU, mesh vertices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import shapely
from embreex import rtcore_scene
from embreex.mesh_construction import TriangleMesh
from shapely.geometry import MultiPoint, Point, Polygon

from fastvst.scenes.rooms.assets import PACK, load_pack
from fastvst.scenes.rooms.cameras import motion, second, still
from fastvst.scenes.rooms.geometry import build_geometry
from fastvst.scenes.rooms.layout import Item, Prism, Room, collide, inside, notch_of, rests
from fastvst.scenes.rooms.parts import from_model, support
from fastvst.scenes.rooms.recipes import KINDS, furnish
from fastvst.spatial.boxes import corners, iou_3d


def outline(item: Item) -> Polygon:
    return MultiPoint(corners([item.box])[0][:, :2]).convex_hull


def check_room(room: Room) -> None:
    walls = Polygon(room.polygon)
    assert walls.is_valid and walls.exterior.is_ccw
    boxes = np.array([item.box for item in room.items])
    points = corners(boxes)
    assert (points[..., 2] > -1e-9).all() and (points[..., 2] < room.height).all()
    outlines = [outline(item) for item in room.items]
    for item, shape in zip(room.items, outlines, strict=True):
        where = f"room {room.seed}: {item.piece.name}"
        assert shape.within(walls.buffer(1e-6)), f"{where} leaves the room"
        if item.anchored:
            gap = shape.distance(walls.exterior)
            assert gap <= 0.06, f"{where} should touch a wall but is {gap:.3f} m away"
            assert min(np.sort(shapely.distance(shapely.points(shape.exterior.coords[:4]), walls.exterior))[:2]) <= 0.06
        if item.on >= 0:
            carrier = room.items[item.on]
            assert item.position[2] == pytest.approx(carrier.position[2] + carrier.piece.size[2], abs=0.011)
            assert shape.within(outlines[item.on].buffer(1e-6)), f"{where} sticks out over what carries it"
        elif not item.anchored:
            assert item.position[2] == 0 or item.piece.name == "curtain", f"{where} floats"
    iou = iou_3d(boxes, boxes)
    size = boxes[:, 3:6].prod(1)
    volumes = iou / (1 + iou) * (size[:, None] + size)  # of the intersections
    np.fill_diagonal(volumes, 0)
    assert volumes.max() < 1e-9, f"room {room.seed}: boxes {np.unravel_index(volumes.argmax(), volumes.shape)} overlap"
    low = points[..., 2].min(1)
    high = points[..., 2].max(1)
    for i in range(len(boxes)):
        for j in range(i):
            if low[i] < high[j] and low[j] < high[i]:
                assert outlines[i].intersection(outlines[j]).area < 1e-9


def check_rests(room: Room) -> None:
    """Every piece touches what carries it to within 1 cm: the floor, a wall, or another piece under all of its base."""
    geometry = build_geometry(room)
    walls = Polygon(room.polygon).exterior
    faces = geometry.ids[geometry.triangles[:, 0]]
    for index, item in enumerate(room.items):
        points = geometry.positions[geometry.ids == index + 1].astype(np.float64)
        where = f"room {room.seed}: {item.piece.name}"
        low = points[:, 2].min()
        if item.on < 0 and low < 0.01:
            continue
        if item.on < 0:
            assert shapely.distance(shapely.points(points[:, :2]), walls).min() < 0.01, f"{where} hangs in the air"
            continue
        scene = rtcore_scene.EmbreeScene()
        TriangleMesh(scene, geometry.positions[geometry.triangles[faces == item.on + 1]])
        base = points[points[:, 2] < low + 0.002]
        start = (base + [0, 0, 0.001]).astype(np.float32)
        hit = scene.run(start, np.tile(np.array([[0, 0, -1]], np.float32), (len(start), 1)), output=True)
        gap = np.where(hit["primID"] >= 0, hit["tfar"], np.inf)
        carrier = room.items[item.on].piece.name
        assert gap.max() < 0.01, f"{where} hangs {gap.max():.3f} m over the {carrier}"
        assert low >= room.items[item.on].position[2] + room.items[item.on].piece.top, f"{where} is in the {carrier}"


def test_layout_of_some_rooms() -> None:
    for seed in range(25):
        check_room(furnish(seed))
        check_rests(furnish(seed))


def test_nothing_stands_on_the_corner_of_a_round_table() -> None:
    models = load_pack().models
    table = from_model(models["oakTable"], np.random.default_rng(0))
    cup = from_model(models["plasticCup"], np.random.default_rng(0))
    edge = table.size[0] / 2 - cup.size[0]
    assert rests(cup, table, 0.0, 0.0, 0.3) and rests(cup, table, edge, 0.0, 0.3)
    assert not rests(cup, table, edge, table.size[1] / 2 - cup.size[1], 0.3)
    assert 0.7 < support(table).mean() < 0.85  # pi / 4 is 0.785


def test_sizes_vary_and_stay_below_the_ceiling() -> None:
    """The best height for each class is within a tenth of the truth for less than 45 % of the pieces."""
    heights: dict[str, list[float]] = {}
    for seed in range(60):
        room = furnish(seed)
        for item in room.items:
            heights.setdefault(item.piece.name, []).append(item.piece.size[2])
            assert item.piece.size[2] < room.height
    found = {name: np.array(values) for name, values in heights.items() if len(values) >= 15}
    hits = {n: max(np.sum(np.abs(v - guess) <= 0.1 * v) for guess in v) / len(v) for n, v in found.items()}
    assert len(hits) > 10
    assert sum(hits[n] * len(v) for n, v in found.items()) / sum(len(v) for v in found.values()) < 0.45, hits


@pytest.mark.slow
def test_layout_of_two_hundred_rooms() -> None:
    kinds = set()
    for seed in range(1000, 1200):
        room = furnish(seed)
        check_room(room)
        check_rests(room)
        kinds.add(room.kind)
        kinds.add(f"{len(room.polygon)} corners")
    assert kinds == {*KINDS, "4 corners", "6 corners"}


def test_the_same_seed_is_the_same_room() -> None:
    a = build_geometry(furnish(5))
    b = build_geometry(furnish(5))
    c = build_geometry(furnish(6))
    for name in ("positions", "uv", "rgba", "layer", "ids", "triangles", "textures", "light"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert len(a.positions) != len(c.positions) or not np.array_equal(a.positions, c.positions)


def test_boxes_are_tight_around_the_meshes() -> None:
    for seed in range(6):
        room = furnish(seed)
        geometry = build_geometry(room)
        for index, item in enumerate(room.items):
            vertices = geometry.positions[geometry.ids == index + 1].astype(np.float64)
            c = math.cos(math.radians(item.yaw))
            s = math.sin(math.radians(item.yaw))
            local = (vertices - item.box[:3]) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
            low = local.min(0)
            high = local.max(0)
            half = np.array([item.box[3], item.box[5], item.box[4]]) / 2
            np.testing.assert_allclose(low, -half, atol=2e-3, err_msg=item.piece.name)
            np.testing.assert_allclose(high, half, atol=2e-3, err_msg=item.piece.name)


def test_collide_agrees_with_shapely() -> None:
    rng = np.random.default_rng(0)
    met = 0
    for _ in range(600):
        a, b = (
            Prism(
                *rng.uniform(-1, 1, 2),
                *rng.uniform(0.1, 0.8, 2),
                float(rng.uniform(-180, 180)),
                *np.sort(rng.uniform(0, 2, 2)),
            )
            for _ in range(2)
        )
        share = a.low < b.high and b.low < a.high
        expected = share and Polygon(a.outline()).intersection(Polygon(b.outline())).area > 1e-12
        assert collide(a, b) == expected
        met += expected
    assert 100 < met < 500


def test_inside_agrees_with_shapely() -> None:
    rng = np.random.default_rng(1)
    room = np.array([[0, 0], [4, 0], [4, 2], [2.5, 2], [2.5, 5], [0, 5]], dtype=float)
    assert notch_of(room) == (2.5, 2.0, 4.0, 5.0)
    hits = 0
    for _ in range(800):
        prism = Prism(*rng.uniform(0, 5, 2), *rng.uniform(0.1, 0.9, 2), float(rng.uniform(-180, 180)), 0, 1)
        expected = Polygon(prism.outline()).within(Polygon(room))
        assert inside(room, prism.outline()) == expected
        hits += expected
    assert 100 < hits < 700


def test_cameras_are_in_free_space() -> None:
    stills = 0
    for seed in range(40, 60):
        room = furnish(seed)
        walls = Polygon(room.polygon)
        rng = np.random.default_rng(seed)
        first = still(room, rng, 320, 240)
        if first is None:
            continue
        stills += 1
        assert 1.2 <= first.position[2] <= 1.7
        pitch = math.degrees(math.asin(first.rotation[2, 2]))
        assert -25.01 <= pitch <= 0.01
        assert 0.75 * 320 <= first.fx <= 0.94 * 320
        other = [motion(room, first, rng, 0.0, 0.3), second(room, first, np.array(room.items[0].position), rng)]
        for camera in [first, *(c for c in other if c is not None)]:
            x, y, z = camera.position
            assert Point(x, y).within(walls.buffer(-0.29)) and 0.29 < z < room.height - 0.29
            for item in room.items:
                if item.position[2] < z + 0.1 and item.position[2] + item.piece.size[2] > z - 0.5:
                    assert outline(item).distance(Point(x, y)) > 0.29, f"room {seed}: camera in {item.piece.name}"
    assert stills >= 15


def test_the_pack_is_small_complete_and_credited() -> None:
    pack = load_pack()
    assert PACK.stat().st_size <= 4_000_000
    assert len(pack.models) >= 100
    text = (PACK.parent / "CREDITS.md").read_text(encoding="utf-8")
    for key, model in pack.models.items():
        assert f"| {key} |" in text
        assert 0 < len(model.mesh.triangles) <= 3000
        assert model.mesh.triangles.max() < len(model.mesh.positions)
        assert (model.size > 0).all() and model.mesh.layer.max() < len(pack.textures)
    named = {model.name for model in pack.models.values()}
    assert {
        "bed",
        "chair",
        "table",
        "sofa",
        "desk",
        "bookshelf",
        "cabinet",
        "night stand",
        "lamp",
        "sink",
        "toilet",
        "refrigerator",
        "television",
        "plant",
    } <= named
