"""Video tasks: every answer is derived again from the furniture list, meshes, rays, and the camera's path."""

from __future__ import annotations

import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare
from shapely import LineString, Polygon

from fastvst.data.sample import Sample
from fastvst.evaluate import vsi_bench
from fastvst.evaluate.answers import score
from fastvst.scenes.rooms.render_base import Renderer
from fastvst.scenes.rooms.shoot import ShotConfig, WalkConfig, shoot
from fastvst.scenes.scene import Scene
from fastvst.tasks import WALKS, TaskConfig, video
from fastvst.tasks.video_route import turn_word
from scene_truth import GHOST, MIN_PIXELS, Truth, clockwise, homogeneous, off, question, reply


def make_all(scene: Scene, tries: int) -> list[Sample]:
    config = TaskConfig(easy=0.5)
    rng = np.random.default_rng([scene.metadata["room_seed"], 97])
    rows = [make(scene, rng, config, f"{k}") for k in range(tries) for make in WALKS.values()]
    return [row for row in rows if row is not None]


def answered(row: Sample) -> str:
    """The answer as text; for a choice, the text of its option in the question."""
    if not row.metadata["choice"]:
        return reply(row)
    assert re.fullmatch("[A-D]", reply(row)) and question(row).endswith(video.AFTER_CHOICE)
    found = re.search(rf"^{reply(row)}\. (.*)$", question(row), re.M)
    assert found is not None and row.answer["value"] == found[0]
    return found[1]


def frames_of(truth: Truth, name: str) -> list[int]:
    """Number of pixels per frame that show objects of a class."""
    return [sum(truth.pixels(v, i) for i in truth.named(name)) for v in truth.scene.walk]


def seen_well(truth: Truth, object_id: int) -> bool:
    return max(truth.pixels(v, object_id) for v in truth.scene.walk) >= 0.8 * MIN_PIXELS


def check_video_measurement(truth: Truth, row: Sample) -> None:
    (object_id,) = row.metadata["objects"]
    name = truth.scene.object(object_id).name
    assert truth.id_of(name) == object_id and seen_well(truth, object_id) and name in question(row)
    size = truth.extents(object_id)
    wanted = size[2] if row.metadata["form"] == "height" else size.max()
    assert (
        re.search("height|tall|high", question(row))
        and not re.search("longest|greatest|largest|maximum", question(row))
    ) == (row.metadata["form"] == "height") or row.metadata["form"] == "greatest"
    assert abs(float(answered(row)) - 100 * wanted) <= min(0.51, 5.1 * wanted)


def check_video_counting(truth: Truth, row: Sample) -> None:
    ids = truth.named(row.metadata["name"])
    assert int(answered(row)) == len(ids) > 1 and all(seen_well(truth, i) for i in ids)
    assert f"{row.metadata['name']}(s)" in question(row)


def first_frames(truth: Truth, names: list[str]) -> list[int]:
    return [next(k for k, n in enumerate(frames_of(truth, name)) if n >= GHOST) for name in names]


def check_video_order(truth: Truth, row: Sample) -> None:
    shown = row.metadata["order"]
    first = first_frames(truth, shown)
    assert all(b - a >= 2 for a, b in zip(first, first[1:], strict=False)), first  # a second apart at 2 frames a second
    text = answered(row)
    assert text == (shown[0] if row.metadata["form"] == "first" else ", ".join(shown))
    assert all(name in question(row) for name in shown)


def check_video_object_object(truth: Truth, row: Sample) -> None:
    meta = row.metadata
    ids = row.metadata["objects"]
    names = [truth.scene.object(i).name for i in ids]
    assert all(truth.id_of(name) == i and seen_well(truth, i) for name, i in zip(names, ids, strict=True))
    text = answered(row)
    if meta["form"] == "distance":
        assert abs(float(text) / truth.gap(*ids) - 1) <= 0.0501 and truth.gap(*ids) > 0.199
    elif meta["form"] == "closest":
        gaps = {name: truth.gap(ids[0], i) for name, i in zip(names[1:], ids[1:], strict=True)}
        ordered = sorted(gaps.values())
        assert text == min(gaps, key=gaps.get) and ordered[1] - ordered[0] > 0.299 and ordered[0] > 0.149
        assert f"to the {names[0]}" in question(row)
    else:
        a, b, c = (truth.place(i) for i in ids)
        z = complex(*(c - a)) / complex(*(b - a))  # where c is when b is straight ahead: 1 = ahead, 1j = left
        angle = abs(math.degrees(np.angle(z)))
        side = "left" if z.imag > 0 else "right"
        level = meta["form"].removeprefix("direction_")
        if level == "easy":
            assert text == side and 19 < angle < 161
        elif level == "medium":
            assert text == ("back" if angle > 135 else side) and abs(angle - 135) > 9 and angle > 9
        else:
            assert text == f"{'front' if angle < 90 else 'back'}-{side}" and 9 < angle < 171 and abs(angle - 90) > 9


def check_video_route(truth: Truth, row: Sample) -> None:
    meta = row.metadata
    ids = row.metadata["objects"]
    stops = [ids[0], *ids[2:]]
    ahead = complex(*(truth.place(ids[1]) - truth.place(ids[0])))
    turns = []
    for p, q in zip(stops, stops[1:], strict=False):
        way = LineString([truth.place(p), truth.place(q)])
        assert way.length > 0.55 and Polygon(truth.room.polygon).contains(way)
        for k in range(1, len(truth.room.items) + 1):  # no object blocks the way
            low = truth.vertices(k)[:, 2].min()
            high = truth.vertices(k)[:, 2].max()
            assert k in (p, q) or high < 0.11 or low > 1.89 or not truth.outline(k).intersects(way)
        step = complex(*(truth.place(q) - truth.place(p)))
        turn = math.degrees(np.angle(step / ahead))  # counterclockwise
        turns.append("turn back" if abs(turn) > 145 else "turn left" if turn > 0 else "turn right")
        assert abs(turn) > 38 and not 132 < abs(turn) < 148
        ahead = step
    assert answered(row) == ", ".join(turns)
    places = [question(row).index(f"until the {truth.scene.object(i).name}") for i in ids[2:]]
    assert places == sorted(places) and f"facing the {meta['names'][1]}" in question(row).replace(
        "looking toward", "facing"
    ).replace("faces", "facing").replace("look at", "facing")


def path(truth: Truth) -> tuple[float, float]:
    """Length of the camera's path in metres, and its total turn to the left in degrees."""
    poses = [np.linalg.inv(homogeneous(truth.scene.views[v].camera)) for v in truth.scene.walk]
    length = sum(math.dist(a[:3, 3], b[:3, 3]) for a, b in zip(poses, poses[1:], strict=False))
    bearings = np.unwrap([math.atan2(p[1, 2], p[0, 2]) for p in poses])
    return length, math.degrees(bearings[-1] - bearings[0])


def check_video_other(truth: Truth, row: Sample) -> None:
    text = answered(row)
    form = row.metadata["form"]
    length, turn = path(truth)
    if form == "room":
        assert abs(float(text) - Polygon(truth.room.polygon).area) <= 0.0501
    elif form == "way":
        assert abs(float(text) - length) <= 0.0501
    elif form == "turn":
        assert text == ("left" if turn > 0 else "right") and abs(turn) > 59
    else:
        view = truth.scene.walk[-1]
        ids, depth = truth.look(view)
        near = {name: float(np.median(depth[ids == truth.id_of(name, view)])) for name in row.metadata["names"]}
        assert text == min(near, key=near.get) and len(near) >= 2


def check_video_caption(truth: Truth, row: Sample) -> None:
    text = reply(row)
    length, turn = path(truth)
    for fact in row.answer["value"]:
        if fact["says"] == "area":
            assert abs(fact["value"] - Polygon(truth.room.polygon).area) <= 0.0501
            assert f"{fact['value']:.1f} square meters" in text
        elif fact["says"] == "way":
            assert abs(fact["value"] - length) <= 0.0501 and fact["words"] == ["left" if turn > 0 else "right"]
        elif fact["says"] == "order":
            first = first_frames(truth, fact["titles"])
            assert all(b - a >= 2 for a, b in zip(first, first[1:], strict=False))
            places = [text.index(name, text.index("First")) for name in fact["titles"]]
            assert places[0] == min(places) and len(places) >= 3
        else:
            (name,) = fact["titles"]
            assert len(truth.named(name)) == len(fact["objects"])
            counts = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
            word = re.search(rf"\b({'|'.join(counts)}) {name}\(s\)", text)[1]
            assert counts.index(word) == len(fact["objects"])
    assert score(text, row.answer) == 1.0


CHECKS = {name: globals()[f"check_{name}"] for name in WALKS}


def check_scene(scene: Scene, tries: int) -> Counter:
    truth = Truth(scene)
    counts = Counter()
    for row in make_all(scene, tries):
        try:
            assert row.kind == "video" and question(row).startswith(video.BEFORE)
            CHECKS[row.metadata["task"]](truth, row)
        except AssertionError as error:
            raise AssertionError(f"{row.id}: {question(row)[-400:]!r} -> {reply(row)!r}; {row.metadata}") from error
        json.dumps([row.answer, row.metadata])
        counts[row.metadata["task"]] += 1
    return counts


def test_answers_hold_in_a_few_rooms(walked: list[Scene]) -> None:
    counts = sum((check_scene(scene, 4) for scene in walked), Counter())
    assert set(counts) == set(WALKS) and min(counts.values()) >= 4, counts


@pytest.mark.slow
def test_answers_hold_in_five_hundred_rows_a_task(renderer: Renderer) -> None:
    counts: Counter = Counter()
    # Without room 6112: it shows 7 pixels of a second stack of books, and rays through every second pixel count 16.
    for seed in (*range(6100, 6112), *range(6113, 6119)):
        counts += check_scene(shoot(seed, renderer, ShotConfig(views=0), WalkConfig()), 56)
    assert min(counts.values()) >= 500 and set(counts) == set(WALKS), counts


@pytest.mark.slow
def test_letters_are_balanced_over_four_thousand_rows(walked: list[Scene]) -> None:
    letters: dict[int, Counter] = {2: Counter(), 3: Counter(), 4: Counter()}
    rng = np.random.default_rng(3)
    config = TaskConfig(easy=0.0)
    for number, scene in enumerate(walked):  # one scene after another: its frames are rendered once
        while sum(sum(c.values()) for c in letters.values()) < 1000 * (number + 1):
            for name in ("video_order", "video_route", "video_object_object", "video_counting"):
                row = WALKS[name](scene, rng, config, "0")
                if row is not None and row.metadata["choice"]:
                    options = row.answer["candidates"]
                    letters[len(options)][options.index(row.answer["value"])] += 1
    assert len(walked) == 4
    for count, found in letters.items():
        assert chisquare([found[k] for k in range(count)]).pvalue > 1e-3, letters


def test_the_walk_is_a_walk(walked: list[Scene]) -> None:
    for scene in walked:
        cameras = [scene.views[k].camera for k in scene.walk]
        assert len(cameras) == 20 and scene.fps == 2.0 and not set(scene.walk) & set(scene.stills())
        steps = [math.dist(a.position, b.position) for a, b in zip(cameras, cameras[1:], strict=False)]
        turns = [
            off(clockwise(a.rotation[2, :2], b.rotation[2, :2]), 0) for a, b in zip(cameras, cameras[1:], strict=False)
        ]
        assert max(steps) < 0.26 and max(turns) < 26
        assert all(Polygon(scene.polygon).buffer(-0.25).contains_properly(_point(c.position)) for c in cameras)
        assert all(
            scene.views[k].depth.min() > 0.2 for k in scene.walk
        )  # never inside an object or directly in front of one


def _point(position: np.ndarray):
    from shapely import Point

    return Point(position[0], position[1])


def test_a_class_with_an_unseen_thing_is_not_asked_about(walked: list[Scene]) -> None:
    from dataclasses import replace

    scene = walked[0]
    kinds = video.survey(scene, TaskConfig())
    name = next(iter(kinds))
    hidden = kinds[name].ids[0]
    views = [replace(v, sightings=tuple(s for s in v.sightings if s.object_id != hidden)) for v in scene.views]
    assert name not in video.survey(replace(scene, views=tuple(views)), TaskConfig())
    assert video.survey(replace(scene, walk=()), TaskConfig()) == {}


@pytest.mark.parametrize(
    ("angle", "word"),
    [
        (0, None),
        (35, None),
        (45, "turn right"),
        (90, "turn right"),
        (140, None),
        (180, "turn back"),
        (225, None),
        (270, "turn left"),
        (330, None),
    ],
)
def test_turn_words(angle: float, word: str | None) -> None:
    assert turn_word(angle) == word


def test_the_prompt_is_that_of_the_benchmark() -> None:
    assert (video.BEFORE, video.AFTER_CHOICE, video.AFTER_NUMBER) == (
        vsi_bench.BEFORE,
        vsi_bench.AFTER_CHOICE,
        vsi_bench.AFTER_NUMBER,
    )
