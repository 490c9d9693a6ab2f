"""Every sentence of a trace is checked by rays, vertices and poses; wording."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from direct_rows import direct_rows
from fastvst.data.sample import Sample
from fastvst.evaluate.answers import score
from fastvst.reasoning import claims, geometric
from fastvst.reasoning.teacher import FORBIDDEN
from fastvst.scenes.rooms.render_base import Renderer
from fastvst.scenes.rooms.shoot import ShotConfig, WalkConfig, shoot
from fastvst.scenes.scene import Scene
from fastvst.spatial.camera import Camera
from fastvst.tasks import SINGLE, TaskConfig
from fastvst.tasks.angles import HOURS
from fastvst.tasks.measurement import first_turn
from scene_truth import COMPASS, GHOST, Truth, clockwise, homogeneous, off, reply


def sides(truth: Truth, view: int, i: int) -> float:
    return float(truth.middle(view, i)[0])


def median_depth(truth: Truth, view: int, i: int) -> float:
    ids, depth = truth.look(view)
    return float(np.median(depth[ids == i]))


def bearing(truth: Truth, who) -> np.ndarray:
    return truth.scene.views[who["camera"]].camera.position[:2] if isinstance(who, dict) else truth.place(who)


def pinhole(camera: Camera) -> np.ndarray:
    return np.array([[camera.fx, 0, camera.cx], [0, camera.fy, camera.cy], [0, 0, 1]])


def check_view(truth: Truth, text: str, c: dict) -> bool:
    """Claims about what one view shows; False for other claims."""
    says = c["says"]
    scene = truth.scene
    names = [truth.scene.object(i).name for i in c.get("objects", [])]
    if says in ("seen", "marked"):
        assert all(truth.pixels(c["view"], i) >= 30 for i in c["objects"])
    elif says == "both":
        assert all(truth.pixels(v, i) >= 30 for v in c["views"] for i in c["objects"])
    elif says == "side":
        u = sides(truth, c["view"], c["objects"][0])
        assert c["word"] == ("left" if u < 1 / 3 else "middle" if u < 2 / 3 else "right")
        assert {"left": "left", "right": "right", "middle": "middle"}[c["word"]] in text
    elif says == "range":
        depth = median_depth(truth, c["view"], c["objects"][0])
        low, high = {"near": (0, 1.7), "middle": (1.3, 3.2), "far": (2.8, 99)}[c["word"]]
        assert low <= depth <= high
    elif says == "left_of":
        first, second = (sides(truth, c["view"], i) for i in c["objects"])
        assert first < second - 0.05
        flipped = "to the right of" in text  # "the b is to the right of the a"
        assert (text.index(names[0]) < text.index(names[1])) != flipped or names[0] in names[1] or names[1] in names[0]
    elif says == "nearer":
        centres = [
            (homogeneous(scene.views[c["view"]].camera) @ [*truth.place(i), truth.vertices(i)[:, 2].mean(), 1])[2]
            for i in c["objects"]
        ]
        assert centres[0] < centres[1] and median_depth(truth, c["view"], c["objects"][0]) < median_depth(
            truth, c["view"], c["objects"][1]
        )
    else:
        return False
    return True


def check_solid(truth: Truth, text: str, c: dict) -> bool:
    """Claims about sizes and contacts of objects; False for other claims."""
    says = c["says"]
    names = [truth.scene.object(i).name for i in c.get("objects", [])]
    if says == "on":
        above, below = (truth.vertices(i)[:, 2] for i in c["objects"])
        assert abs(above.min() - below.max()) < 0.05 or truth.room.items[c["objects"][0] - 1].on == c["objects"][1] - 1
        assert truth.outline(c["objects"][1]).buffer(0.01).contains(truth.outline(c["objects"][0]).centroid)
    elif says == "wall":
        from shapely import Polygon

        assert Polygon(truth.room.polygon).exterior.distance(truth.outline(c["objects"][0])) < 0.13
    elif says == "gap":
        gap = truth.gap(*c["objects"])
        assert abs(gap - c["value"]) <= c["tolerance"] + 1e-3
        assert float(re.search(r"(\d+(?:\.\d+)?) m", text)[1]) == c["value"]
    elif says == "tall":
        assert abs(100 * truth.extents(c["objects"][0])[2] - c["value"]) < 5.6 and f"{c['value']} cm" in text
    elif says == "size":
        down, across, along = (truth.extents(c["objects"][0])[k] for k in (2, 0, 1))
        size = {"height": down, "length": max(across, along), "width": min(across, along)}[c["what"]]
        assert abs(100 * size - c["value"]) < 1.0 and f"{c['value']} cm" in text
        assert re.search({"height": "height|bottom", "length": "longer|long", "width": "shorter|wide"}[c["what"]], text)
    elif says == "taller":
        high, low = (truth.extents(i)[2] for i in c["objects"])
        assert high > low + 0.04
        assert (text.index(names[0]) > text.index(names[1])) == ("lower" in text) or names[0] in names[1]
    else:
        return False
    return True


def check_points(truth: Truth, text: str, c: dict) -> bool:
    """Claims about marked points and distances in the image; False for other claims."""
    says = c["says"]
    scene = truth.scene
    if says == "scale":
        camera = scene.views[c["view"]].camera
        thing = scene.object(c["objects"][0])
        point = next(s.point for s in scene.views[c["view"]].sightings if s.object_id == thing.id)
        depth, seen = truth.cast(camera, np.array([point]))
        rays = [np.linalg.inv(pinhole(camera)) @ [camera.cx, v, 1] for v in (0.0, camera.height / 10)]
        span = 100 * float(depth[0]) * np.linalg.norm(rays[1] - rays[0])
        assert seen[0] == thing.id and abs(span - c["value"]) < 0.8 and f"{c['value']} cm" in text
    elif says == "spot":
        assert truth.cast(scene.views[c["view"]].camera, np.array([c["point"]]))[1][0] == c["objects"][0]
    elif says in ("same", "apart"):
        spots = []
        for view, (u, v) in zip(c["views"], c["points"], strict=True):
            camera = scene.views[view].camera  # the centre of the pixel
            depth, seen = truth.cast(camera, np.array([[math.floor(u) + 0.5, math.floor(v) + 0.5]]))
            pose = np.linalg.inv(homogeneous(camera))
            ray = np.linalg.inv(pinhole(camera)) @ [math.floor(u) + 0.5, math.floor(v) + 0.5, 1]
            spots.append((pose @ [*(ray * depth[0]), 1])[:3])
            assert seen[0] == c["objects"][0]
        gap = float(np.linalg.norm(spots[0] - spots[1]))
        assert gap < 0.05 if says == "same" else abs(gap - c["value"]) < 0.06 and f"{c['value']} m" in text
    elif says == "depth":
        depth = truth.cast(scene.views[c["view"]].camera, np.array([c["point"]]))[0][0]
        assert abs(depth - c["value"]) < 0.06 and f"{c['value']} m" in text
    elif says == "ranked":
        assert c["values"] == sorted(c["values"])
    else:
        return False
    return True


def check_walk(truth: Truth, text: str, c: dict) -> bool:
    """Claims about the frames of a walk; False for other claims."""
    says = c["says"]
    scene = truth.scene
    if says in ("appears", "before"):
        walk = scene.walk
        shown = {
            name: [sum(truth.pixels(v, i) for i in truth.named(name)) for v in walk]
            for name in c.get("names", [c.get("name")])
        }
        assert all(name in text for name in shown)  # an armchair or office chair must not count as a chair
        assert not [o.name for o in scene.objects for name in shown if o.name != name and o.name.endswith(name)]
        first = [next(k for k, n in enumerate(counts) if n >= GHOST) for counts in shown.values()]
        if says == "before":
            assert first == sorted(first) and len(set(first)) == len(first)
            places = [text.index(f" {name}") for name in shown]
            assert places == sorted(places)
        else:
            (counts,) = shown.values()
            assert counts[c["sure"]] >= 30 and max([0, *counts[: c["first"]]]) < GHOST
            numbers = [int(n) for n in re.findall(r"frame (\d+)", text)]
            assert c["sure"] == 0 or c["sure"] + 1 in numbers
            assert c["first"] == 0 or c["first"] + 1 in numbers or c["first"] in numbers
    elif says == "another":
        assert truth.pixels(c["view"], c["objects"][0]) >= 30 and c["objects"][0] not in c["others"]
        assert ("another" in text or "one more" in text) == bool(c["others"])
        assert int(re.search(r"rame (\d+)", text)[1]) == scene.walk.index(c["view"]) + 1
    elif says == "count":
        assert not [o.name for o in scene.objects if o.name != c["name"] and o.name.endswith(c["name"])]
        assert sorted(c["objects"]) == truth.named(c["name"]) and re.search(rf"\b{len(c['objects'])}\b", text)
    else:
        return False
    return True


def check_directions(truth: Truth, text: str, c: dict) -> bool:
    """Claims about directions on the floor; False for other claims."""
    says = c["says"]
    scene = truth.scene
    if says == "nearest":
        gaps = {i: truth.gap(c["origin"], i) for i in c["others"]}
        assert min(gaps, key=gaps.get) == c["objects"][0]
    elif says == "faces":
        a, b, t = (truth.place(c[k]) for k in ("origin", "anchor", "target"))
        z = complex(*(t - a)) / complex(*(b - a))  # 1 = ahead, 1j = left
        words = {"left": z.imag > 0, "right": z.imag < 0, "front": z.real > 0, "back": z.real < 0}
        assert all(words[word] for word in c["result"].split("-")) and f"the {c['result']}" in text.replace("my", "the")
        turned = abs(math.degrees(np.angle(z)))
        assert c["level"] != "medium" or (turned > 135) == (c["result"] == "back")
    elif says == "angle":
        origin, anchor, target = (bearing(truth, c[k]) for k in ("origin", "anchor", "target"))
        turned = clockwise(anchor - origin, target - origin)
        assert off(turned if c["way"] == "clockwise" else -turned, c["value"]) < 4.0
        assert f"{c['value']} degrees {c['way']}" in text or c["value"] == 0
    elif says in ("look", "toward"):
        poses = [np.linalg.inv(homogeneous(scene.views[v].camera)) for v in c.get("views", [c.get("view")])]
        if says == "look":
            turned = clockwise(poses[0][:2, 2], poses[1][:2, 2])
        else:
            turned = clockwise(poses[0][:2, 2], bearing(truth, c["target"]) - poses[0][:2, 3])
        assert off(turned if c["way"] in ("clockwise", "right") else -turned, c["value"]) < 4.0
        assert f"{c['value']} degrees" in text or c["value"] == 0
        if c["value"]:
            right = c["way"] in ("clockwise", "right")
            assert re.search(r"\b(right|clockwise)\b" if right else r"\b(left|counterclockwise)\b", text)
    elif says == "steps":
        words, width = (COMPASS, 45) if c["given"] in COMPASS else (HOURS, 30)
        sign = 1 if c["way"] == "clockwise" else -1
        start = words.index(c["given"]) * width
        assert words.index(c["result"]) * width == (start + sign * c["steps"] * width) % 360 and c["result"] in text
    else:
        return False
    return True


def check_motion(truth: Truth, text: str, c: dict) -> bool:
    """Claims about the motion between two views; False for other claims."""
    says = c["says"]
    scene = truth.scene
    if says in ("shift", "pan"):
        between = homogeneous(scene.views[c["views"][0]].camera) @ np.linalg.inv(
            homogeneous(scene.views[c["views"][1]].camera)
        )
        move = between[:3, 3] if says == "shift" else between[:3, 2]
        signs = {
            "left": -move[0],
            "right": move[0],
            "up": -move[1],
            "down": move[1],
            "forward": move[2],
            "backward": -move[2],
        }
        assert all(signs[w] > 0.1 and w in text for w in c["words"])
    elif says == "drift":
        before, after = (truth.middle(v, c["objects"][0]) for v in c["views"])
        axis, sign = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}[c["word"]]
        assert sign * (after[axis] - before[axis]) > 0.015 and f"shifts {c['word']}" in text
    elif says == "grew":
        before, after = (truth.pixels(v, c["objects"][0]) for v in c["views"])
        assert (after > before) == (c["word"] == "larger") and c["word"] in text
    else:
        return False
    return True


CHECKS = (check_view, check_solid, check_points, check_walk, check_directions, check_motion)


def check_claim(truth: Truth, text: str, c: dict) -> bool:
    """Asserts that a sentence is true, where possible without the annotation's sightings and boxes.

    Returns False for a sentence that claims nothing about the scene.
    """
    assert all(truth.scene.object(i).name in text for i in c.get("objects", [])), (text, c)
    if any(check(truth, text, c) for check in CHECKS):
        return True
    assert c["says"] in ("plan", "answer") and set(c) == {"says"}
    return False


def check_trace(truth: Truth, direct: Sample, row: Sample) -> Counter:
    text = reply(row)
    match = re.fullmatch(r"<think>(.*)</think> (.+)", text, re.DOTALL)
    assert match is not None and row.kind == row.metadata["task"] == f"thought_{direct.metadata['task']}"
    body = match[1]
    answer = match[2]
    assert 150 <= len(body.split()) <= 500 and not FORBIDDEN.search(body)
    direct = first_turn(direct)
    expected = reply(direct).rsplit("So, the answer is ", 1)[-1].rstrip(".")
    assert answer == expected and answer in body.split(". ")[-1] + body.split("\n")[-1]
    assert (
        score(answer, direct.answer) == 1.0
        or direct.metadata.get("choice")
        and direct.answer["value"].startswith(f"{answer}. ")
        or answer.split(". ")[-1] == direct.answer["value"]
        or " point-" in answer
    )
    assert " ".join(s for s, _ in row.metadata["claims"]) == body.replace("\n", " ")  # every sentence has a claim
    found: Counter = Counter()
    for sentence, claim in row.metadata["claims"]:
        try:
            found[claim["says"]] += check_claim(truth, sentence, claim)
        except AssertionError as error:
            raise AssertionError(f"{row.id}: {sentence!r} {claim}") from error
    json.dumps(row.metadata)
    return found


def check_scene(scene: Scene, tries: int) -> Counter:
    truth = Truth(scene)
    counts = Counter()
    rng = np.random.default_rng([scene.metadata["room_seed"], 95])
    for direct in direct_rows(scene, tries):
        row = geometric.compose(scene, direct, rng)
        if row is not None:
            counts += check_trace(truth, direct, row)
            counts[row.metadata["task"]] += 1
    return counts


TASKS = {f"thought_{task}" for task in geometric.TRACES}


def test_every_sentence_holds_in_a_few_rooms(walked: list[Scene]) -> None:
    counts = sum((check_scene(scene, 2) for scene in walked[:3]), Counter())
    assert set(counts) >= TASKS and min(counts[task] for task in TASKS) >= 4, counts
    kinds = {"seen", "side", "range", "gap", "look", "angle", "steps", "nearer", "left_of", "both", "depth"}
    assert min(counts[kind] for kind in kinds) >= 4, counts


@pytest.mark.slow
def test_every_sentence_holds_in_two_hundred_traces(renderer: Renderer) -> None:
    counts: Counter = Counter()
    for seed in range(6200, 6204):
        counts += check_scene(
            shoot(seed, renderer, ShotConfig(views=2, overlap=1.0, around=4.0), WalkConfig(pairs=4)), 6
        )
    assert sum(counts[task] for task in TASKS) >= 200 and min(counts[task] for task in TASKS) >= 20, counts
    assert set(claims.CHECKS) - set(counts) <= {"plan", "answer", "unseen", "on"}, counts


def test_a_false_sentence_does_not_go_out(walked: list[Scene], monkeypatch: pytest.MonkeyPatch) -> None:
    scene = walked[0]
    direct = next(row for row in direct_rows(scene, 3) if row.metadata["task"] == "camera_camera")
    moved = replace(
        scene.views[direct.metadata["views"][0]].camera, rotation=np.array([[0.0, 1, 0], [0, 0, -1], [-1, 0, 0]])
    )
    views = list(scene.views)
    views[direct.metadata["views"][0]] = replace(views[direct.metadata["views"][0]], camera=moved)
    with pytest.raises(RuntimeError, match="does not hold"):
        for seed in range(20):
            geometric.compose(replace(scene, views=tuple(views)), direct, np.random.default_rng(seed))
    with pytest.raises(ValueError, match="no check for the claim"):
        claims.holds(scene, {"says": "dreamt"})
    other = SINGLE["scene_caption"](scene, scene.stills()[0], np.random.default_rng(0), TaskConfig(), "0")
    with pytest.raises(ValueError, match="no reasoning for the task 'scene_caption'"):
        geometric.compose(scene, other, np.random.default_rng(0))


def test_traces_are_worded_in_many_ways(walked: list[Scene]) -> None:
    direct = next(
        r
        for r in direct_rows(walked[0], 2)
        if r.metadata["task"] == "object_object" or r.metadata["task"] == "distance"
    )
    made = [geometric.compose(walked[0], direct, np.random.default_rng(k)) for k in range(8)]
    assert len({reply(row) for row in made if row is not None}) >= 6
