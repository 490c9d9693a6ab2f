"""Every answer is derived again from meshes, depth buffers and poses, independently of the generators."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
from embreex import rtcore_scene
from embreex.mesh_construction import TriangleMesh
from scipy.optimize import lsq_linear
from scipy.spatial.transform import Rotation
from scipy.stats import chisquare

from fastvst.data.sample import Sample
from fastvst.scenes.rooms.geometry import Geometry, build_geometry
from fastvst.scenes.rooms.recipes import furnish
from fastvst.scenes.rooms.render_base import Renderer
from fastvst.scenes.rooms.shoot import ShotConfig, shoot
from fastvst.scenes.scene import Scene
from fastvst.spatial.boxes import iou_3d, parse_boxes
from fastvst.spatial.camera import Camera
from fastvst.spatial.draw import COLOURS
from fastvst.spatial.prompts import to_fov_prompt
from fastvst.tasks import (
    PAIRS,
    SINGLE,
    TaskConfig,
    camera_motion,
    correspondence,
    depth_comparison,
    measurement,
)
from fastvst.tasks.common import mcq, rounded

CONFIG = TaskConfig()
HARD = TaskConfig(easy=0.4)
ROOMS = 20
ROWS = 26  # of the slow test: rooms, and rows per task and room


def make_all(scene: Scene, tries: int, config: TaskConfig = CONFIG) -> list[Sample]:
    rng = np.random.default_rng([scene.metadata["room_seed"], 99])
    rows = []
    for attempt in range(tries):
        for k in scene.stills():
            rows += [make(scene, k, rng, config, f"{k}-{attempt}") for name, make in SINGLE.items() if name in CHECKS]
        for n, pair in enumerate(scene.pairs):
            rows += [
                make(scene, pair, rng, config, f"p{n}-{attempt}") for name, make in PAIRS.items() if name in CHECKS
            ]
    return [row for row in rows if row is not None]


def reply(sample: Sample) -> str:
    return sample.messages[-1]["content"][0]["text"]


def question(sample: Sample, turn: int = 0) -> str:
    return sample.messages[2 * turn]["content"][-1]["text"]


def image_of(sample: Sample, number: int = 0) -> np.ndarray:
    return np.asarray(sample.parts("image")[number]["image"])


def homogeneous(camera: Camera) -> np.ndarray:
    m = np.eye(4)
    m[:3, :3] = camera.rotation
    m[:3, 3] = camera.translation
    return m


class Rays:
    """The room's triangles for ray casting: distances that do not come from the rasteriser."""

    def __init__(self, geometry: Geometry):
        self.scene = rtcore_scene.EmbreeScene()
        self.mesh = TriangleMesh(self.scene, geometry.positions[geometry.triangles])
        self.ids = geometry.ids[geometry.triangles[:, 0]]
        self.gaps: dict[tuple[int, int], float] = {}

    def gap(self, scene: Scene, a: int, b: int) -> float:
        """Least distance of the boxes of two objects, as a bounded least-squares problem."""
        if (a, b) not in self.gaps:
            one, two = (np.array(scene.object(i).box) for i in (a, b))
            turn = [Rotation.from_euler("xyz", x[6:9], degrees=True).as_matrix() for x in (one, two)]
            half = np.r_[one[3:6], two[3:6]] / 2
            found = lsq_linear(np.c_[turn[0], -turn[1]], two[:3] - one[:3], bounds=(-half, half), tol=1e-14)
            self.gaps[a, b] = math.sqrt(2 * found.cost)
        return self.gaps[a, b]

    def cast(self, camera: Camera, pixel: tuple[float, float]) -> tuple[np.ndarray, int]:
        """World point (3,) and object id under a pixel."""
        direction = (
            np.array([(pixel[0] - camera.cx) / camera.fx, (pixel[1] - camera.cy) / camera.fy, 1.0]) @ camera.rotation
        )
        start = camera.position + 0.05 * direction
        hit = self.scene.run(start[None].astype(np.float32), direction[None].astype(np.float32), output=True)
        return start + direction * float(hit["tfar"][0]), int(self.ids[hit["primID"][0]])


def check_depth_comparison(scene: Scene, geometry: Geometry, rays: Rays, sample: Sample) -> None:
    meta = sample.metadata
    view = scene.views[sample.metadata["view"]]
    names = [p[3] for p in meta["points"]]
    depths = {}
    for u, v, _, name in meta["points"]:
        point, _ = rays.cast(view.camera, (u, v))
        depths[name] = float((homogeneous(view.camera) @ [*point, 1])[2])
    gaps = np.diff(sorted(depths.values()))
    assert (gaps > 0.19).all()
    ranked = sorted(depths, key=lambda name: depths[name])
    near = re.search(r"clos|near", question(sample)) is not None
    if meta["form"].startswith("order"):
        first = re.search(r"(nearest|farthest)( first| to)", question(sample))
        assert first is not None
        expected = ", ".join(ranked if first[1] == "nearest" else ranked[::-1])
    else:
        expected = ranked[0] if near else ranked[-1]
    assert reply(sample) == sample.answer["value"] == expected
    assert sample.answer["candidates"] == names
    for u, v, _, name in meta["points"]:  # the mark that the text calls red is red in the image
        colour = re.fullmatch(r"(\w+) point", name) or re.search(
            re.escape(name) + r" \((\w+) point\)", question(sample)
        )
        assert colour is not None or re.fullmatch(r"point-\d|[A-E]", name) or "bbox_2d" in question(sample)
        if colour is not None:
            assert tuple(image_of(sample)[int(v), int(u)]) == COLOURS[colour[1]]


def check_distance(scene: Scene, geometry: Geometry, rays: Rays, sample: Sample) -> None:
    first, *others = sample.metadata["objects"]
    distances = [rays.gap(scene, first, i) for i in others]
    assert abs(distances[0] - distances[1]) > 0.299
    best = int(np.argmin(distances))
    assert sample.answer["value"] == sample.answer["candidates"][best]
    vertices = [geometry.positions[geometry.ids == i].astype(np.float64) for i in sample.metadata["objects"]]
    for k in (0, 1):  # meshes lie inside their boxes, so they cannot be nearer than the boxes
        sparse = (
            vertices[0][:: max(1, len(vertices[0]) // 200)],
            vertices[k + 1][:: max(1, len(vertices[k + 1]) // 200)],
        )
        assert np.linalg.norm(sparse[0][:, None] - sparse[1][None], axis=-1).min() > distances[k] - 0.005
    text = reply(sample)
    if sample.metadata["form"] == "working":
        titles = sample.metadata["titles"]
        lines = text.split("\n")
        for line, title, distance in zip(lines, titles[1:], distances, strict=False):
            assert line == f"Distance[{titles[0]}, {title}]={distance:.1f}m"
        assert lines[2] == f"So, the answer is {sample.answer['value']}."
    else:
        assert text == sample.answer["value"]
        assert all(c in question(sample) for c in sample.answer["candidates"])


def check_measurement(scene: Scene, geometry: Geometry, rays: Rays, sample: Sample) -> None:
    meta = sample.metadata
    for turn, (object_id, what) in enumerate(zip(meta["objects"], meta["what"], strict=True)):
        thing = scene.object(object_id)
        vertices = geometry.positions[geometry.ids == object_id].astype(np.float64)
        yaw = math.radians(thing.box[8])
        along = np.ptp(vertices[:, :2] @ [math.cos(yaw), math.sin(yaw)])
        across = np.ptp(vertices[:, :2] @ [-math.sin(yaw), math.cos(yaw)])
        tall = np.ptp(vertices[:, 2])
        expected = {
            "height": tall,
            "length": max(along, across),
            "width": min(along, across),
            "greatest": max(along, across, tall),
        }[what]
        text = sample.messages[2 * turn + 1]["content"][0]["text"]
        value = meta["turn_answers"][turn]["value"]
        assert text == f"{value} cm" and abs(value - 100 * expected) <= min(0.51, 5.1 * expected)
        assert thing.name in question(sample, turn)
        words = {
            "height": r"height|tall|vertical",
            "length": r"\blength|longer",
            "width": r"\bwidth|shorter",
            "greatest": "greatest|largest",
        }
        assert re.search(words[what], question(sample, turn).lower())
        if "point-" not in question(sample, turn):  # without a mark the name must identify the object
            view = scene.views[meta["view"]]
            assert view.ids is not None
            others = [o for o in scene.objects if o.name == thing.name and o.id != object_id]
            assert all((view.ids == o.id).sum() < CONFIG.ghost_pixels for o in others)
    assert sample.answer == meta["turn_answers"][-1]


def check_detection_3d(scene: Scene, geometry: Geometry, rays: Rays, sample: Sample) -> None:
    meta = sample.metadata
    view = scene.views[sample.metadata["view"]]
    boxes, labels = parse_boxes(reply(sample))
    assert labels == [scene.object(i).name for i in meta["objects"]]
    assert (np.diff(boxes[:, 2]) >= -0.011).all() and (boxes[:, 2] > 0).all()
    exact = np.array([v["bbox_3d"] for v in sample.answer["value"]])
    for parsed, truth, object_id in zip(boxes, exact, meta["objects"], strict=True):
        vertices = geometry.positions[geometry.ids == object_id].astype(np.float64)
        local = np.c_[vertices, np.ones(len(vertices))] @ homogeneous(view.camera).T[:, :3]
        turn = Rotation.from_euler("xyz", truth[6:9], degrees=True)
        inner = turn.inv().apply(local - truth[:3])
        np.testing.assert_allclose(np.ptp(inner, axis=0), truth[3:6], atol=4e-3)  # tight
        np.testing.assert_allclose(np.abs(inner).max(0), truth[3:6] / 2, atol=4e-3)  # and centred
        np.testing.assert_allclose(parsed[:6], truth[:6], atol=0.0051)
        between = (Rotation.from_euler("xyz", parsed[6:9], degrees=True).inv() * turn).magnitude()
        assert math.degrees(between) < 2.8  # 0.005 x 180 degrees about each of three axes
    assert view.ids is not None
    shown = {
        o.id for o in scene.objects if o.name in meta["classes"] and (view.ids == o.id).sum() >= CONFIG.ghost_pixels
    }
    assert shown <= set(meta["objects"])
    assert all(name in question(sample) for name in meta["classes"])
    assert iou_3d(boxes, exact).diagonal().min() > 0.3  # two decimals keep most of a thin box
    text, size = to_fov_prompt(question(sample), view.camera.width, view.camera.height, base_width=280)
    assert "hfov=" in text and size[0] / size[1] == pytest.approx(4 / 3, rel=0.02)


def check_correspondence(scene: Scene, geometry: Geometry, rays: Rays, sample: Sample) -> None:
    meta = sample.metadata
    first, second = (scene.views[k].camera for k in meta["views"])
    world, object_id = rays.cast(first, meta["point"])
    assert object_id > 0
    local = (homogeneous(second) @ [*world, 1])[:3]
    there = np.array([second.fx * local[0] / local[2] + second.cx, second.fy * local[1] / local[2] + second.cy])
    spots = np.array(meta["spots"])
    gaps = np.linalg.norm(spots - there, axis=1)
    right = int(gaps.argmin())
    assert gaps[right] < 0.6
    assert (np.delete(gaps, right) > 0.1 * second.width - 1).all()
    # Not hidden in the second view: the pixel that it falls into shows it. (A step can be half a pixel away: between
    # the leaves of a cabinet's front it is 5 cm.)
    seen, other_id = rays.cast(second, (math.floor(there[0]) + 0.5, math.floor(there[1]) + 0.5))
    assert other_id == rays.cast(second, (there[0], there[1]))[1] == object_id and np.linalg.norm(seen - world) < 0.05
    for k, spot in enumerate(spots):
        if k != right:
            assert np.linalg.norm(rays.cast(second, tuple(spot))[0] - world) > 0.05
    assert sample.answer["value"] == sample.answer["candidates"][right]
    value = sample.answer["value"]
    letter = "" if meta["form"] != "choice" else f"{value.removeprefix('point-')} "
    assert reply(sample) == letter + value
    for number, (u, v) in enumerate((meta["point"], spots[right])):
        drawn = image_of(sample, number)[int(v), int(u)].astype(int)  # the dot inside the circle
        colour = min(COLOURS, key=lambda c: int(np.abs(np.array(COLOURS[c]) - drawn).sum()))
        if number == 0:
            assert f"{colour} circle" in question(sample) or f"circled in {colour}" in question(sample)
        elif meta["form"] == "colour":
            assert value == f"{colour} circle"


def check_camera_motion(scene: Scene, geometry: Geometry, rays: Rays, sample: Sample) -> None:
    meta = sample.metadata
    first, second = (scene.views[k].camera for k in meta["views"])
    between = homogeneous(first) @ np.linalg.inv(homogeneous(second))  # second camera frame -> first
    text = sample.answer["value"]
    if meta["mode"] == "shift":
        x, y, z = between[:3, 3]
        signs = {"left": -x, "right": x, "up": -y, "down": y, "forward": z, "backward": -z}
        named = text.split(" and ")
        largest = max(signs.values())
        assert largest >= 0.2 and all(signs[word] >= 0.5 * largest for word in named)
        assert all(
            abs(value) <= 0.25 * largest
            for word, value in signs.items()
            if abs(signs[word]) not in [abs(signs[n]) for n in named]
        )
        assert math.degrees(Rotation.from_matrix(between[:3, :3]).magnitude()) < 8
        assert 1 <= len(named) <= 2
    else:
        ahead = between[:3, 2]
        component = {"left": -ahead[0], "right": ahead[0], "up": -ahead[1], "down": ahead[1]}
        assert component[text] == max(component.values()) > math.sin(math.radians(7.9))
        assert np.linalg.norm(between[:3, 3]) < 0.05
    if meta["form"] == "choice":
        letter, option = reply(sample).split(". ")
        assert option == text and f"{letter}. {text}" in question(sample)
        assert len(set(sample.answer["candidates"])) == 4
    else:
        assert reply(sample) == text and " and " not in text


CHECKS = {
    "depth_comparison": check_depth_comparison,
    "distance": check_distance,
    "measurement": check_measurement,
    "detection_3d": check_detection_3d,
    "correspondence": check_correspondence,
    "camera_motion": check_camera_motion,
}


def check(scene: Scene, geometry: Geometry, rays: Rays, row: Sample) -> None:
    try:
        CHECKS[row.metadata["task"]](scene, geometry, rays, row)
    except AssertionError as error:
        raise AssertionError(f"{row.id}: {question(row)[-300:]!r} -> {reply(row)!r}; {row.metadata}") from error
    json.dumps([row.answer, row.metadata])


def check_scene(scene: Scene, tries: int, config: TaskConfig = CONFIG) -> Counter:
    geometry = build_geometry(furnish(scene.metadata["room_seed"]))
    rays = Rays(geometry)
    counts: Counter = Counter()
    for row in make_all(scene, tries, config):
        check(scene, geometry, rays, row)
        counts[row.metadata["task"]] += 1
    return counts


def test_answers_hold_in_a_few_rooms(scenes: list[Scene]) -> None:
    counts = sum((check_scene(scene, 2) for scene in scenes), Counter())
    assert set(counts) == set(CHECKS) and min(counts.values()) >= 8


def make_different(scene: Scene, task: str, count: int, rng: np.random.Generator) -> Iterator[Sample]:
    """Up to `count` rows of one task about one scene, no two with the same question about the same points."""
    known: set[str] = set()
    targets = scene.stills() if task in SINGLE else scene.pairs
    for attempt in range(40 * count // max(len(targets), 1)):
        for k, target in enumerate(targets):
            row = (SINGLE | PAIRS)[task](scene, target, rng, HARD, f"{k}-{attempt}")
            key = "" if row is None else json.dumps([question(row), row.answer, row.metadata])
            if row is not None and key not in known:
                known.add(key)
                yield row
                if len(known) == count:
                    return


@pytest.mark.slow
def test_answers_hold_in_five_hundred_rows_a_task(renderer: Renderer) -> None:
    counts: Counter = Counter()
    for seed in range(5000, 5000 + ROOMS):
        scene = shoot(seed, renderer, ShotConfig(views=3, overlap=1.0))
        geometry = build_geometry(furnish(scene.metadata["room_seed"]))
        rng = np.random.default_rng([seed, 99])
        rays = Rays(geometry)
        for task in CHECKS:
            for row in make_different(scene, task, ROWS, rng):
                check(scene, geometry, rays, row)
                counts[task] += 1
    assert min(counts[task] for task in CHECKS) >= 500, counts


def test_forms_and_letters_are_balanced(scenes: list[Scene]) -> None:
    forms: dict[str, Counter] = defaultdict(Counter)
    places: Counter = Counter()
    for scene in scenes:
        for row in make_all(scene, 12):
            forms[row.metadata["task"]][row.metadata["form"]] += 1
            if row.metadata["task"] == "correspondence":
                places[row.answer["candidates"].index(row.answer["value"])] += 1
    assert chisquare([places[k] for k in range(4)]).pvalue > 1e-3
    assert {"near", "far", "order_near", "order_far"} <= set(forms["depth_comparison"])
    assert {"colour", "short", "working"} == set(forms["distance"])
    assert {"colour", "number", "choice"} == set(forms["correspondence"])
    easy = Counter(row.metadata["form"] for scene in scenes for row in make_all(scene, 1, TaskConfig(easy=1.0)))
    assert not {"choice", "working", "short", "point", "several"} & {form for form in easy if form != "choice"}


def test_mcq_letters_are_uniform() -> None:
    rng = np.random.default_rng(0)
    letters = Counter(mcq(rng, "x", ["a", "b", "c"])[1][0] for _ in range(4000))
    assert chisquare([letters[k] for k in "ABCD"]).pvalue > 1e-3
    line, answer, options = mcq(rng, "x", ["a"])
    assert f"{answer}" in line and len(options) == 2


@pytest.mark.parametrize(
    ("depths", "clear"),
    [
        ([1.0, 1.3], True),
        ([1.0, 1.19], False),
        ([4.0, 4.3], False),
        ([4.0, 4.6], True),
        ([1, 2, 3], True),
        ([1, 2, 2.1], False),
    ],
)
def test_depths_too_close_are_rejected(depths: list[float], clear: bool) -> None:
    assert depth_comparison.separated(depths, CONFIG) is clear
    assert depth_comparison.separated(depths[::-1], CONFIG) is clear


@pytest.mark.parametrize(
    ("shift", "words"),
    [
        ([0.5, 0, 0], ["right"]),
        ([-0.5, 0.02, 0], ["left"]),
        ([0, -0.4, 0.05], ["up"]),
        ([0, 0, -0.4], ["backward"]),
        ([-0.4, 0, 0.4], ["left", "forward"]),
        ([0.1, 0, 0], None),
        ([0.5, 0.2, 0], None),
        ([0.4, 0.4, 0.4], None),
    ],
)
def test_shift_words(shift: list[float], words: list[str] | None) -> None:
    assert camera_motion.shift_words(np.array(shift), CONFIG) == words


def test_turn_words() -> None:
    assert camera_motion.turn_word(15, 1, CONFIG) == "right" and camera_motion.turn_word(-15, 1, CONFIG) == "left"
    assert camera_motion.turn_word(1, 12, CONFIG) == "up" and camera_motion.turn_word(1, -12, CONFIG) == "down"
    assert camera_motion.turn_word(5, 0, CONFIG) is None and camera_motion.turn_word(15, 10, CONFIG) is None


def test_a_hidden_point_has_no_match(scenes: list[Scene]) -> None:
    """The second view's depth moves nearer: a point that is hidden by 7 cm is not the same point."""
    from dataclasses import replace

    found = 0
    for scene in scenes:
        for a, b, _ in scene.pairs:
            first = scene.views[a]
            second = scene.views[b]
            assert second.depth is not None
            nearer = replace(second, depth=second.depth - np.float32(0.07))
            for point in correspondence.visible_points(first, np.random.default_rng(0), 20):
                if correspondence.match(first, second, point, CONFIG) is not None:
                    found += 1
                    assert correspondence.match(first, nearer, point, CONFIG) is None
    assert found > 50


def test_measurement_is_of_the_named_side() -> None:
    from fastvst.scenes.scene import SceneObject

    thing = SceneObject(1, "table", (0, 0, 0, 0.6, 0.75, 1.4, -90, 0, 10))
    values = {what: measurement.measure(thing, what) for what in ("height", "length", "width", "greatest")}
    assert values == {"height": 0.75, "length": 1.4, "width": 0.6, "greatest": 1.4}


def test_rounding_leaves_a_right_reply_half_of_its_tolerance() -> None:
    """A cup of 3.35 cm is not 3 cm high: 3.35 is 12 % more than 3, and a reply may be 10 % off."""
    assert rounded(3.351, 0) == 3.4 and rounded(9.96, 0) == 10.0 and rounded(52.4, 0) == 52
    assert rounded(0.236, 1) == 0.24 and rounded(1.04, 1) == 1.0 and rounded(0.0123, 0) == 0.012
    assert isinstance(rounded(52.4, 0), int), "whole centimetres are stated without a point"
    for value in np.exp(np.random.default_rng(0).uniform(-4, 8, 2000)):
        for decimals in (0, 1, 2):
            assert abs(rounded(value, decimals) - value) <= 0.05 * value


def test_phrase_banks_are_large_enough() -> None:
    from fastvst.tasks import detection_3d, distance

    banks = {
        "depth": depth_comparison.TWO_POINTS
        + depth_comparison.TWO_OBJECTS
        + depth_comparison.ONE_OF_MANY
        + depth_comparison.ORDER
        + depth_comparison.BOXES,
        "distance": distance.COLOUR_FORM + distance.SHORT_FORM + distance.WORKING_FORM,
        "measurement": measurement.QUESTIONS + measurement.EASY,
        "detection": detection_3d.PHRASES,
        "correspondence": correspondence.COLOUR_FORM + correspondence.FREE + correspondence.CHOICE,
        "motion": camera_motion.SHIFT + camera_motion.TURN,
    }
    for name, bank in banks.items():
        assert len(set(bank)) >= 10, name


def test_adapters_without_depth_or_ids_still_get_box_tasks(scenes: list[Scene]) -> None:
    """The schema of a data set with boxes only: no depth map, no ids, no room outline."""
    from dataclasses import replace

    made: Counter = Counter()
    for scene in scenes:
        bare = replace(
            scene, views=tuple(replace(v, depth=None, ids=None) for v in scene.views), polygon=None, height=None
        )
        for row in make_all(bare, 1):
            made[row.metadata["task"]] += 1
    assert made["correspondence"] == 0
    assert all(made[task] > 0 for task in CHECKS if task != "correspondence")
