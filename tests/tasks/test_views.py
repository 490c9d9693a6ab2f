"""Grounding, captions and multi-view tasks: every answer is derived again from rays, vertices and poses."""

from __future__ import annotations

import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from scipy.stats import chisquare

from fastvst.data.sample import Sample
from fastvst.evaluate.answers import score
from fastvst.scenes.rooms.render_base import Renderer
from fastvst.scenes.rooms.shoot import ShotConfig, WalkConfig, shoot
from fastvst.scenes.scene import Scene
from fastvst.spatial.boxes import parse_boxes
from fastvst.spatial.draw import COLOURS
from fastvst.spatial.prompts import to_fov_prompts
from fastvst.tasks import PAIRS, SINGLE, TaskConfig
from fastvst.tasks.angles import HOURS, left_right, left_right_back, quadrant, sector
from fastvst.tasks.facts import score_facts
from scene_truth import COMPASS, GHOST, MIN_PIXELS, Truth, clockwise, homogeneous, off, question, reply

TASKS = ("grounding_3d", "scene_caption", "detection_multi", "object_object", "camera_camera", "change_caption")


def make_all(scene: Scene, tries: int) -> list[Sample]:
    config = TaskConfig(easy=0.5)
    rng = np.random.default_rng([scene.metadata["room_seed"], 98])
    rows = []
    for attempt in range(tries):
        for name in TASKS:
            targets = scene.stills() if name in SINGLE else scene.pairs
            make = SINGLE[name] if name in SINGLE else PAIRS[name]
            rows += [make(scene, target, rng, config, f"{k}-{attempt}") for k, target in enumerate(targets)]
    return [row for row in rows if row is not None]


def tight(truth: Truth, view: int, object_id: int, box: np.ndarray, parsed: np.ndarray) -> None:
    """The exact box contains the mesh tightly in this view's camera frame; the text equals it to two decimals."""
    points = np.c_[truth.vertices(object_id), np.ones(len(truth.vertices(object_id)))]
    local = points @ homogeneous(truth.scene.views[view].camera).T[:, :3]
    turn = Rotation.from_euler("xyz", box[6:9], degrees=True)
    inner = turn.inv().apply(local - box[:3])
    np.testing.assert_allclose(np.ptp(inner, axis=0), box[3:6], atol=4e-3)
    np.testing.assert_allclose(np.abs(inner).max(0), box[3:6] / 2, atol=4e-3)
    np.testing.assert_allclose(parsed[:6], box[:6], atol=0.0051)
    assert math.degrees((Rotation.from_euler("xyz", parsed[6:9], degrees=True).inv() * turn).magnitude()) < 2.8


def check_grounding_3d(truth: Truth, row: Sample) -> None:
    meta = row.metadata
    (object_id,) = meta["objects"]
    view = meta["view"]
    boxes, labels = parse_boxes(reply(row))
    assert labels == [truth.scene.object(object_id).name] and meta["referring"] in question(row)
    tight(truth, view, object_id, np.array(row.answer["value"][0]["bbox_3d"]), boxes[0])
    image = np.asarray(row.parts("image")[0]["image"])
    name = labels[0]
    if meta["form"] == "point":
        u, v = meta["point"]
        colour = meta["referring"].split("(")[1].split()[0]
        assert tuple(image[int(v), int(u)]) == COLOURS[colour]
        assert truth.cast(truth.scene.views[view].camera, np.array([[u, v]]))[1][0] == object_id
        return
    if meta["form"] == "box":
        colour = meta["referring"].split("(")[1].split()[0]
        assert (image == np.array(COLOURS[colour])).all(-1).sum() > 20
        return
    same = [i for i in truth.named(name) if truth.pixels(view, i) >= GHOST]
    assert object_id in same
    others = [i for i in same if i != object_id]
    rule = meta["why"]["rule"]
    if rule == "only":
        assert not others and meta["referring"] == name
    elif rule in ("leftmost", "rightmost"):
        sign = 1 if rule == "leftmost" else -1
        assert all(sign * (truth.middle(view, i)[0] - truth.middle(view, object_id)[0]) > 0.05 for i in others)
    elif rule in ("closest", "farthest"):
        ids, depth = truth.look(view)
        sign = 1 if rule == "closest" else -1
        mine = np.median(depth[ids == object_id])
        assert all(sign * (np.median(depth[ids == i]) - mine) > 0.05 for i in others)
    else:
        gap = truth.gap(object_id, meta["why"]["anchor"])
        assert all(truth.gap(i, meta["why"]["anchor"]) - gap > 0.299 for i in others) and others
        assert truth.id_of(truth.scene.object(meta["why"]["anchor"]).name, view) == meta["why"]["anchor"]


def number(text: str, pattern: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1])


def check_scene_caption(truth: Truth, row: Sample) -> None:
    meta = row.metadata
    view = row.metadata["view"]
    camera = truth.scene.views[view].camera
    by_title = dict(zip(meta["titles"], meta["objects"], strict=True))
    image = np.asarray(row.parts("image")[0]["image"])
    depths: dict[str, float] = {}
    facts = {"depth": 0, "distance": 0, "nearer": 0, "height": 0, "seen": 0}
    text = reply(row)
    for fact in row.answer["value"]:
        facts[fact["says"]] += 1
        if fact["says"] == "depth":
            (title,) = fact["titles"]
            (u, v) = fact["point"]
            depth, seen = truth.cast(camera, np.array([[u, v]]))
            depths[title] = depth[0]
            assert seen[0] == by_title[title]
            assert tuple(image[int(v), int(u)]) == COLOURS[re.search(r"\((\w+) point", title)[1]]
            sentence = next(
                s for s in text.split(". ") if title in s and ("deep" in s or "depth" in s or "viewing" in s)
            )
            said = number(sentence, r"(\d+\.\d\d)m")
            assert said == fact["value"] and abs(said - depth[0]) < 0.0151
            side = "left" if u < camera.width / 3 else "middle" if u < camera.width * 2 / 3 else "right"
            assert fact["side"] in (None, side)
            assert all(
                (word in sentence) == (fact["side"] == key)
                for key, word in (("left", "on the left"), ("right", "on the right"))
            )
    for sentence in re.split(r"(?<=[a-z\)])\. ", text.rstrip(".")):
        named = [t for t in meta["titles"] if t in sentence]
        if "nearest surfaces" in sentence or "closest" in sentence or "gap" in sentence:
            assert abs(number(sentence, r"(\d+\.\d\d)m") - truth.gap(*(by_title[t] for t in named))) < 0.0051
        elif "closer to the camera" in sentence or "nearer to the camera" in sentence or "farther from" in sentence:
            first, second = sorted(named, key=sentence.index)
            if "farther" in sentence:
                first, second = second, first
            assert depths[second] - depths[first] > 0.19
        elif "tall" in sentence or "height" in sentence.lower():
            assert abs(number(sentence, r"(\d+\.\d\d)m") - truth.extents(by_title[named[0]])[2]) < 0.0061
    opening = row.answer["value"][0]
    for name in opening["titles"]:
        seen = [i for i in truth.named(name) if truth.pixels(view, i) >= MIN_PIXELS / 2]
        assert len(seen) >= 2 if name in opening["several"] else seen
    assert facts["depth"] == len(meta["titles"]) >= 2 and facts["seen"] == 1
    assert score(text, row.answer) == 1.0


def check_detection_multi(truth: Truth, row: Sample) -> None:
    meta = row.metadata
    boxes, labels = parse_boxes(reply(row))
    assert labels == [truth.scene.object(i).name for i in meta["objects"]] and len(set(meta["objects"])) == len(labels)
    exact = np.array([v["bbox_3d"] for v in row.answer["value"]])
    for box, parsed, object_id in zip(exact, boxes, meta["objects"], strict=True):
        tight(truth, meta["views"][0], object_id, box, parsed)
    assert (np.diff(np.linalg.norm(exact[:, :3], axis=1)) >= -1e-3).all()
    for name in meta["classes"]:  # no visible object of the class is missing
        shown = {i for i in truth.named(name) for v in meta["views"] if truth.pixels(v, i) >= 3 * GHOST}
        assert shown <= set(meta["objects"]) and name in question(row)
    sizes = [(truth.scene.views[v].camera.width, truth.scene.views[v].camera.height) for v in meta["views"]]
    text, new = to_fov_prompts(question(row), sizes)
    assert text.count("hfov=") == 2 and "f_x" not in text and "Image 2: Horizontal fov" in text
    fx = truth.scene.views[meta["views"][1]].camera.fx
    assert new[1] == (int(sizes[1][0] * 696.3195 / fx), int(sizes[1][1] * 696.3195 / fx))


def check_object_object(truth: Truth, row: Sample) -> None:
    meta = row.metadata
    text = question(row)
    anchor = truth.place(meta["objects"][0])
    target = truth.place(meta["objects"][1])
    if meta["anchor"] == "camera":
        origin = truth.scene.views[meta["views"][meta["eye"]]].camera.position[:2]
        assert re.search(rf"(image|camera) {meta['eye'] + 1}\b", text)
    else:
        origin = truth.place(meta["objects"][2])
    north = clockwise(origin + np.array([0, 1]) - origin, anchor - origin) - 45 * COMPASS.index(meta["given"])
    bearing = (
        clockwise(np.array([0.0, 1.0]), target - origin) - north
    )  # rotated so that the anchor has the direction of the text
    answer = row.answer["value"]
    assert off(bearing, 45 * COMPASS.index(answer)) < 12.6 + 1.0
    assert min(np.linalg.norm(anchor - origin), np.linalg.norm(target - origin)) > 0.45
    for i, title, colour, (image, u, v) in zip(
        meta["objects"], meta["titles"], meta["colours"], meta["marks"], strict=True
    ):
        assert title in text and title.startswith(truth.scene.object(i).name)
        drawn = np.asarray(row.parts("image")[image]["image"])
        assert tuple(drawn[int(v), int(u)]) == COLOURS[colour]
        assert truth.cast(truth.scene.views[meta["views"][image]].camera, np.array([[u, v]]))[1][0] == i
    for v in meta["views"]:  # one image alone must not be enough
        assert any(truth.pixels(v, i) < GHOST for i in meta["objects"])
    assert meta["given"] in text
    check_choice(row)


def check_choice(row: Sample) -> None:
    if row.metadata["form"] == "choice":
        letter, option = reply(row).split(". ")
        assert option == row.answer["value"] and f"{letter}. {option}" in question(row)
        assert len(set(row.answer["candidates"])) == 4
    else:
        assert reply(row) == row.answer["value"]


def check_camera_camera(truth: Truth, row: Sample) -> None:
    meta = row.metadata
    text = question(row)
    asked, base = (
        np.linalg.inv(homogeneous(truth.scene.views[meta["views"][k]].camera))
        for k in (meta["asked"], 1 - meta["asked"])
    )
    facing = base[:2, 2]
    if meta["mode"] == "position":
        turned = clockwise(facing, asked[:2, 3] - base[:2, 3])
        assert np.linalg.norm(asked[:2, 3] - base[:2, 3]) > 0.49 and "12 o'clock" in text
    else:
        turned = clockwise(facing, asked[:2, 2])
        kinds = {kind for a, b, kind in truth.scene.pairs if {a, b} == set(meta["views"])}
        assert meta["given"] in text and (kinds == {"turn"} or off(turned, 0) > 19.9)  # "turn": every turn, also none
    words, width, slack = (COMPASS, 45, 12.6) if meta["mode"] == "compass" else (HOURS, 30, 10.1)
    assert off(turned + width * words.index(meta["given"]), width * words.index(row.answer["value"])) < slack
    assert re.search(rf"(image|camera) {meta['asked'] + 1}\b", text, re.I)
    check_choice(row)


def check_change_caption(truth: Truth, row: Sample) -> None:
    meta = row.metadata
    text = reply(row)
    maps = meta["views"]
    clear = 0
    for fact in row.answer["value"]:
        if fact["says"] == "placed":
            view = maps[fact["image"]]
            for name, object_id, side in fact["things"]:
                assert truth.id_of(name, view) == object_id
                u = truth.middle(view, object_id)[0]
                assert side == ("left" if u < 1 / 3 else "middle" if u < 2 / 3 else "right")
                assert re.search(rf"{name} (on the|in the) {side}", text)
        elif fact["says"] == "both":
            assert all(truth.pixels(v, i) >= MIN_PIXELS / 2 for v in maps for i in fact["objects"])
        elif fact["says"] in ("gone", "new"):
            here, there = (0, 1) if fact["says"] == "gone" else (1, 0)
            for i, name in zip(fact["objects"], fact["titles"], strict=True):
                assert truth.pixels(maps[here], i) >= MIN_PIXELS / 2 and name not in truth.shown(maps[there])
        else:
            between = homogeneous(truth.scene.views[maps[0]].camera) @ np.linalg.inv(
                homogeneous(truth.scene.views[maps[1]].camera)
            )
            x, _, z = between[:3, 3]
            signs = {"left": -x, "right": x, "forward": z, "backward": -z}
            if fact["says"] == "turn":
                ahead = between[:3, 2]
                assert (ahead[0] > 0) == (fact["words"] == ["right"]) and abs(ahead[0]) > 0.05
            else:
                assert all(signs[word] > 0.29 for word in fact["words"]) and max(abs(x), abs(z)) < 2.01 * max(
                    signs[w] for w in fact["words"]
                )
            assert fact["words"][0] in text
            clear += 1
    assert clear >= 1 and sum(f["says"] == "placed" for f in row.answer["value"]) == 2
    assert score(text, row.answer) == 1.0


CHECKS = {name: globals()[f"check_{name}"] for name in TASKS}


def check_scene(scene: Scene, tries: int) -> Counter:
    truth = Truth(scene)
    counts = Counter()
    for row in make_all(scene, tries):
        try:
            CHECKS[row.metadata["task"]](truth, row)
        except AssertionError as error:
            raise AssertionError(f"{row.id}: {question(row)[-300:]!r} -> {reply(row)!r}; {row.metadata}") from error
        json.dumps([row.answer, row.metadata])
        counts[row.metadata["task"]] += 1
    return counts


def test_answers_hold_in_a_few_rooms(walked: list[Scene]) -> None:
    counts = sum((check_scene(scene, 2) for scene in walked), Counter())
    assert set(counts) == set(TASKS) and min(counts.values()) >= 5, counts


@pytest.mark.slow
def test_answers_hold_in_five_hundred_rows_a_task(renderer: Renderer) -> None:
    counts: Counter = Counter()
    for seed in range(6000, 6012):
        counts += check_scene(
            shoot(seed, renderer, ShotConfig(views=2, overlap=1.0, around=4.0), WalkConfig(pairs=5)), 24
        )
    assert min(counts[task] for task in TASKS) >= 500, counts


@pytest.mark.slow
def test_letters_are_balanced_over_four_thousand_rows(walked: list[Scene]) -> None:
    letters: Counter = Counter()
    config = TaskConfig(easy=0.0)
    rng = np.random.default_rng(5)
    while sum(letters.values()) < 4000:
        for scene in walked:
            targets = [(PAIRS[task], pair) for task in ("object_object", "camera_camera") for pair in scene.pairs]
            for make, pair in targets:
                row = make(scene, pair, rng, config, "0")
                if row is not None:
                    letters[row.answer["candidates"].index(row.answer["value"])] += 1
    assert chisquare([letters[k] for k in range(4)]).pvalue > 1e-3, letters


@pytest.mark.parametrize(
    ("angle", "eight", "twelve", "quad", "three", "two"),
    [
        (0, 0, 0, None, None, None),
        (12, 0, None, "front-right", "right", None),
        (13, None, None, "front-right", "right", None),
        (45, 1, None, "front-right", "right", "right"),
        (90, 2, 3, None, "right", "right"),
        (131, 3, None, "back-right", None, "right"),
        (180, 4, 6, None, "back", None),
        (271, 6, 9, None, "left", "left"),
        (352, 0, 0, None, None, None),
        (300, None, 10, "front-left", "left", "left"),
    ],
)
def test_directions_near_a_border_have_no_name(angle, eight, twelve, quad, three, two) -> None:
    assert sector(angle, 8) == eight and sector(angle, 12) == twelve
    assert (quadrant(angle), left_right_back(angle), left_right(angle)) == (quad, three, two)


def test_facts_are_scored_by_name_and_number() -> None:
    answer = {
        "type": "facts",
        "tolerance": 0.1,
        "unit": "m",
        "value": [
            {"says": "depth", "titles": ["bed (red point-1)"], "value": 2.0},
            {"says": "nearer", "titles": ["bed", "lamp"]},
        ],
    }
    assert score_facts("The bed (red point-1) is 2.1m deep. The lamp is behind the bed.", answer) == 1.0
    assert score_facts("The bed (red point-1) is 1.5m deep. The lamp is behind the bed.", answer) == 0.5
    assert score_facts("The bed (red point-1) is here. Nothing else.", answer) == 0.0


def test_an_image_without_a_world_gets_no_directions(walked: list[Scene]) -> None:
    from dataclasses import replace

    scene = replace(walked[0], pairs=(), walk=(), views=walked[0].views[:1])
    assert {row.metadata["task"] for row in make_all(scene, 2)} <= {"grounding_3d", "scene_caption"}
