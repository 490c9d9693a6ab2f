"""Of each task: the label, whether exact geometry finds it, and the cues of the image plane.

The exact rules use the scene only: boxes, poses, depth, the object that each pixel shows. They share no code with the
tasks, except the camera model.

Each function takes the scene and a row, and returns the question as `questions.py` describes it, or None for a row of a
form that the bench leaves out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene, Sighting, View
from fastvst.spatial.boxes import corners, rotations
from fastvst.spatial.camera import Camera, project, unproject

Question = dict[str, Any]
COMPASS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")
GRID = np.array(list(itertools.product(np.linspace(-0.5, 0.5, 9), repeat=3)))
SURFACE = GRID[np.abs(GRID).max(1) == 0.5]


def question(kind: str, label: Any, exact: bool, cues: Any, **more: Any) -> Question:
    plain = np.asarray(cues, dtype=float).round(5).tolist()
    return {"kind": kind, "label": label, "exact": bool(exact), "cues": plain, "names": [], "look": [], **more}


def sighting(view: View, object_id: int) -> Sighting | None:
    return next((s for s in view.sightings if s.object_id == object_id), None)


def box_cues(view: View, seen: Sighting | None) -> list[float]:
    """u, v of the centre, width, height, lower edge of the 2D box in units of the image width; zeros if not seen."""
    if seen is None:
        return [0.0] * 6
    w = view.camera.width
    x1, y1, x2, y2 = (x / w for x in seen.box_2d)
    return [(x1 + x2) / 2, (y1 + y2) / 2, np.log(x2 - x1 + 0.01), np.log(y2 - y1 + 0.01), y2, 1.0]


def surface(box: Any) -> np.ndarray:
    """World points (386, 3) on the faces of a box."""
    numbers = np.asarray(box, dtype=float)
    return numbers[:3] + (SURFACE * numbers[3:6]) @ rotations(numbers[None, 6:9])[0].T


def token_of(u: float, v: float) -> int:
    """The token (of 4 rows of 6) that holds a pixel of an image of 320 x 240."""
    return min(int(v / 60), 3) * 6 + min(int(u / 320 * 6), 5)


def outline_tokens(box: Any) -> list[int]:
    """The tokens that hold the outline of a 2D box."""
    x1, y1, x2, y2 = box
    across = np.linspace(x1, x2 - 1, 50)
    down = np.linspace(y1, y2 - 1, 50)
    points = [(u, v) for u in across for v in (y1, y2 - 1)] + [(u, v) for u in (x1, x2 - 1) for v in down]
    return sorted({token_of(u, v) for u, v in points})


def gap(a: Any, b: Any) -> float:
    """Least distance between points on two boxes, metres; 0 is not reached for boxes that intersect."""
    p = surface(a)
    q = surface(b)
    square = (p**2).sum(1)[:, None] + (q**2).sum(1) - 2 * p @ q.T
    return float(np.sqrt(max(float(square.min()), 0.0)))


def within(value: float, truth: float, tolerance: float = 0.1) -> bool:
    return abs(value - truth) <= tolerance * abs(truth)


# ---------------------------------------------------------------------------------------------------------------------
# One image


def depth_comparison(scene: Scene, row: Sample) -> Question | None:
    if row.metadata["form"] != "near" or row.answer is None:
        return None
    view = scene.views[row.metadata["view"]]
    assert view.depth is not None
    points = row.metadata["points"]
    depths = [float(view.depth[int(p[1]), int(p[0])]) for p in points]
    label = row.answer["candidates"].index(row.answer["value"])
    seen = [next(s for s in view.sightings if list(s.point) == list(p[:2])) for p in points]
    found = [[p[0] / 320, p[1] / 240, *box_cues(view, s)] for p, s in zip(points, seen, strict=True)]
    look = [[0, "colour", p[3].split()[0]] for p in points]
    tokens = [[token_of(*p[:2])] for p in points]
    return question("pick", label, int(np.argmin(depths)) == label, found, look=look, shared=0, tokens=tokens)


def distance(scene: Scene, row: Sample) -> Question | None:
    if row.metadata["form"] != "colour" or row.answer is None:
        return None
    view = scene.views[row.metadata["view"]]
    anchor, *others = row.metadata["objects"]
    label = row.answer["candidates"].index(row.answer["value"])
    gaps = [gap(scene.object(anchor).box, scene.object(i).box) for i in others]
    r = sighting(view, anchor)
    found = [box_pair(view, r, sighting(view, i)) for i in others]
    look = [[0, "colour", "yellow"], *([0, "colour", name.split()[0]] for name in row.answer["candidates"])]
    tokens = [outline_tokens(s.box_2d) for i in (anchor, *others) if (s := sighting(view, i))]
    return question("pick", label, int(np.argmin(gaps)) == label, found, look=look, shared=1, tokens=tokens)


def box_pair(view: View, a: Sighting | None, b: Sighting | None) -> list[float]:
    """Gaps between two 2D boxes, in units of the image width; see `pair_cues`."""
    if a is None or b is None:
        return [0.0] * 9
    return pair_cues(np.array(a.box_2d) / view.camera.width, np.array(b.box_2d) / view.camera.width)


def pair_cues(a: np.ndarray, b: np.ndarray) -> list[float]:
    """Nine numbers of two boxes x1, y1, x2, y2: gaps and centre distances along u and v, their norms, sizes."""
    du = max(0.0, b[0] - a[2], a[0] - b[2])
    dv = max(0.0, b[1] - a[3], a[1] - b[3])
    cu = abs(a[0] + a[2] - b[0] - b[2]) / 2
    cv = abs(a[1] + a[3] - b[1] - b[3]) / 2
    low = abs(a[3] - b[3])
    ratio = abs(np.log((b[3] - b[1] + 0.02) / (a[3] - a[1] + 0.02)))
    return [du, dv, float(np.hypot(du, dv)), cu, cv, float(np.hypot(cu, cv)), low, ratio, b[3]]


def measurement(scene: Scene, row: Sample) -> Question | None:
    assert row.answer is not None
    view = scene.views[row.metadata["view"]]
    thing = scene.object(row.metadata["objects"][0])
    high = np.ptp(corners([thing.box])[0][:, 2]) * 100
    name = thing.name
    text = row.messages[0]["content"][-1]["text"]
    mark = re.search(r"(\w+) point-1", text)
    look = [[0, "colour", mark[1]] if mark else [0, "name", name]]
    value = float(row.answer["value"])
    return question(
        "number", value, within(high, value), box_cues(view, sighting(view, thing.id)), names=[name], look=look
    )


def box_question(
    scene: Scene, row: Sample, view: View, image: int, object_id: int, look: list | None = None
) -> Question:
    """A question about the box of one object. The exact rule is the box with two decimals, as replies state it."""
    box = scene.boxes_in_view(view, [object_id])[0]
    name = scene.object(object_id).name
    exact = np.abs(np.round(box, 2) - box).max() < 0.01
    label = [float(x) for x in box]
    found = box_cues(view, sighting(view, object_id))
    return question("box", label, exact, found, names=[name], look=look or [[image, "name", name]])


def detection_3d(scene: Scene, row: Sample) -> Question | None:
    if len(row.metadata["objects"]) != 1:
        return None
    return box_question(scene, row, scene.views[row.metadata["view"]], 0, row.metadata["objects"][0])


def grounding_3d(scene: Scene, row: Sample) -> Question | None:
    found = re.search(r"\((\w+) (?:point|box)\)", row.metadata["referring"])
    look = [[0, "colour", found[1]]] if found else None
    return box_question(scene, row, scene.views[row.metadata["view"]], 0, row.metadata["objects"][0], look)


def scene_caption(scene: Scene, row: Sample) -> Question | None:
    """The depth of the first marked point."""
    assert row.answer is not None
    view = scene.views[row.metadata["view"]]
    assert view.depth is not None
    fact = next(f for f in row.answer["value"] if f["says"] == "depth")
    u, v = fact["point"]
    name, colour = re.fullmatch(r"(.+) \((\w+) point-1\)", fact["titles"][0]).groups()  # type: ignore[union-attr]
    exact = within(float(view.depth[int(v), int(u)]), fact["value"])
    seen = next(s for s in view.sightings if list(s.point) == [u, v])
    found = [u / 320, v / 240, *box_cues(view, seen)]
    return question("number", fact["value"], exact, found, names=[name], look=[[0, "colour", colour]])


# ---------------------------------------------------------------------------------------------------------------------
# Two images


def correspondence(scene: Scene, row: Sample) -> Question | None:
    assert row.answer is not None
    meta = row.metadata
    if meta["form"] != "colour":
        return None
    first, second = (scene.views[k] for k in meta["views"])
    assert first.depth is not None
    point = np.array(meta["point"])
    spots = np.array(meta["spots"])
    world = unproject(first.camera, point, first.depth[int(point[1]), int(point[0])].astype(float))
    there, _ = project(second.camera, world)
    label = row.answer["candidates"].index(row.answer["value"])
    here = patch(first, point)
    found = [[*np.abs(here - patch(second, spot)), *np.abs(spot - point) / 320] for spot in spots]
    text = row.messages[0]["content"][-1]["text"]
    given = re.search(r"(\w+) circle (?:in|of) (?:image 1|the first view)|circled in (\w+) in the first", text)
    assert given is not None
    names = [name.split()[0] for name in row.answer["candidates"]]
    look = [[0, "colour", given[1] or given[2]], *([1, "colour", name] for name in names)]
    nearest = int(np.linalg.norm(spots - there, axis=1).argmin())
    tokens = [[token_of(*spot)] for spot in (point, *spots)]
    return question("pick", label, nearest == label, found, look=look, shared=1, tokens=tokens)


def patch(view: View, point: np.ndarray, radius: int = 5) -> np.ndarray:
    """Mean and spread of the colour around a point (6,), 0 to 1."""
    u, v = (int(x) for x in point)
    pixels = view.image[max(0, v - radius) : v + radius + 1, max(0, u - radius) : u + radius + 1].reshape(-1, 3) / 255
    return np.concatenate([pixels.mean(0), pixels.std(0)])


def flow_cues(scene: Scene, views: list[int]) -> list[float]:
    """How the 2D boxes of the common objects move: mean du, dv, log size; slopes of du and dv over u and v; count."""
    first, second = (scene.views[k] for k in views)
    rows = []
    for s in first.sightings:
        t = sighting(second, s.object_id)
        if t is not None and min(s.pixels, t.pixels) >= 60:
            a = np.array(box_cues(first, s))
            b = np.array(box_cues(second, t))
            rows.append([*(b - a)[:4], a[0] - 0.5, a[1] - 0.375])
    if not rows:
        return [0.0] * 7
    table = np.array(rows)
    middle = np.median(table, axis=0)
    slopes = [float((table[:, k] * table[:, 4 + k]).mean() / ((table[:, 4 + k] ** 2).mean() + 0.01)) for k in (0, 1)]
    return [*middle[:4], *slopes, float(len(rows))]


def moved(first: Camera, second: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Position (3,) and viewing direction (3,) of the second camera in the frame of the first."""
    return first.rotation @ (second.position - first.position), first.rotation @ second.rotation[2]


def camera_motion(scene: Scene, row: Sample) -> Question | None:
    assert row.answer is not None
    if row.metadata["form"] != "free":
        return None
    shift, ahead = moved(*(scene.views[k].camera for k in row.metadata["views"]))
    way = shift if np.linalg.norm(shift) > 0.1 else np.array([ahead[0], ahead[1], 0.0])
    axis = int(np.abs(way).argmax())
    words = (("left", "right"), ("up", "down"), ("backward", "forward"))
    word = words[axis][int(way[axis] > 0)]
    label = row.answer["value"]
    return question("word", label, word == label, flow_cues(scene, row.metadata["views"]))


def detection_multi(scene: Scene, row: Sample) -> Question | None:
    """The first object that the first image shows; boxes are in the frame of the first camera."""
    views = row.metadata["views"]
    first = scene.views[views[0]]
    shown = [i for i in row.metadata["objects"] if sighting(first, i) is not None]
    names = [scene.object(i).name for i in row.metadata["objects"]]
    alone = [i for i in shown if names.count(scene.object(i).name) == 1]
    return box_question(scene, row, first, 0, alone[0]) if alone else None


def clockwise(start: np.ndarray, end: np.ndarray) -> float:
    """Degrees from one direction on the floor to another as seen from above, 0 to 360."""
    return float(np.degrees(np.arctan2(start[0], start[1]) * -1 + np.arctan2(end[0], end[1])) % 360)


def direction(angle: float) -> str:
    return COMPASS[round(angle / 45) % 8]


def object_object(scene: Scene, row: Sample) -> Question | None:
    """The turn from the given direction to the asked one, in eighths."""
    assert row.answer is not None
    meta = row.metadata
    places = [np.array(scene.object(i).box[:2]) for i in meta["objects"]]
    origin = scene.views[meta["views"][meta["eye"]]].camera.position[:2] if meta["eye"] >= 0 else places[2]
    turned = clockwise(places[0] - origin, places[1] - origin)
    names = [word.lower().replace("-", "") for word in (meta["given"], row.answer["value"])]
    label = COMPASS[(COMPASS.index(names[1]) - COMPASS.index(names[0])) % 8]
    found = [x for image, u, v in meta["marks"] for x in (image, u / 320, v / 240)]
    found = [*found, *([0.0] * (9 - len(found))), float(meta["eye"])]
    look = [[image, "colour", colour] for (image, _, _), colour in zip(meta["marks"], meta["colours"], strict=True)]
    cues = [*found, *flow_cues(scene, meta["views"])]
    return question("word", label, direction(turned) == label, cues, look=(look + look[:1])[:3])


def camera_camera(scene: Scene, row: Sample) -> Question | None:
    """The turn from one camera's direction to the other's, or the direction to its place, in eighths."""
    meta = row.metadata
    label = direction(float(meta["angle"]))
    cameras = [scene.views[k].camera for k in meta["views"]]
    target = cameras[meta["asked"]]
    base = cameras[1 - meta["asked"]]
    shift, ahead = moved(base, target)
    level = base.rotation @ np.array([0.0, 0.0, 1.0])  # up, in the frame of the base camera
    way = shift if meta["mode"] == "position" else ahead
    flat = way - level * float(way @ level)
    front = np.array([0.0, 0.0, 1.0]) - level * level[2]
    angle = np.degrees(np.arctan2(float(np.cross(front, flat) @ -level), float(front @ flat))) % 360
    cues = [*flow_cues(scene, meta["views"]), float(meta["asked"]), float(meta["mode"] == "position")]
    cues += [c * (2 * meta["asked"] - 1) for c in cues[:6]]
    return question("word", label, direction(float(angle)) == label, cues, side=2 * meta["asked"] - 1)


def change_caption(scene: Scene, row: Sample) -> Question | None:
    """In which third of the first image the first placed thing is."""
    assert row.answer is not None
    fact = next(f for f in row.answer["value"] if f["says"] == "placed")
    name, object_id, side = fact["things"][0]
    view = scene.views[row.metadata["views"][0]]
    assert view.ids is not None
    # What the image shows counts: the middle of a thing that the border cuts off may lie in another third.
    shown = np.nonzero((view.ids == object_id).any(0))[0]
    exact = ("left", "middle", "right")[int((shown[0] + shown[-1] + 1) / 2 / view.camera.width * 3)] == side
    cues = box_cues(view, sighting(view, object_id))
    return question("word", side, exact, [*cues, cues[0] ** 2], names=[name], look=[[0, "name", name]])


# ---------------------------------------------------------------------------------------------------------------------
# A video


def track(scene: Scene, object_id: int) -> list[list[float]]:
    """`box_cues` of an object in every second frame of the walk."""
    return [box_cues(scene.views[k], sighting(scene.views[k], object_id)) for k in scene.walk[::2]]


def middle_of(scene: Scene, object_id: int) -> list[float]:
    """Mean `box_cues` over the frames that show the object, and the share of such frames."""
    seen = np.array([c for c in track(scene, object_id) if c[5]])
    return [0.0] * 6 if not len(seen) else [*seen.mean(0)[:5], len(seen) / 10]


def headings(scene: Scene) -> np.ndarray:
    """Directions (frames, 2) of the camera on the floor."""
    return np.array([scene.views[k].camera.rotation[2][:2] for k in scene.walk])


def turned(scene: Scene) -> float:
    ways = headings(scene)
    steps = [(clockwise(a, b) + 180) % 360 - 180 for a, b in itertools.pairwise(ways)]
    return float(sum(steps))


def sweep(scene: Scene) -> float:
    """Mean horizontal step of the 2D boxes from frame to frame, in image widths."""
    steps = []
    for a, b in itertools.pairwise(scene.walk):
        steps += [flow_cues(scene, [a, b])[0]]
    return float(np.mean(steps))


def video_measurement(scene: Scene, row: Sample) -> Question | None:
    assert row.answer is not None
    thing = scene.object(row.metadata["objects"][0])
    size = np.ptp(corners([thing.box])[0], axis=0)
    value = size[2] if row.metadata["form"] == "height" else max(thing.box[3:6])
    label = float(row.answer["value"])
    cues = [*middle_of(scene, thing.id), float(row.metadata["form"] == "height")]
    look = [[-1, "name", thing.name]]
    return question("number", label, within(100 * value, label), cues, names=[thing.name], look=look)


def video_object_object(scene: Scene, row: Sample) -> Question | None:
    """Which of several objects is closest to another one."""
    meta = row.metadata
    if meta["form"] != "closest":
        return None
    anchor, *others = meta["objects"]
    gaps = [gap(scene.object(anchor).box, scene.object(i).box) for i in others]
    label = int(np.argmin(meta["gaps"]))
    cues = []
    for i in others:
        views = [scene.views[k] for k in scene.walk]
        pairs = [
            box_pair(v, sighting(v, anchor), sighting(v, i)) for v in views if sighting(v, anchor) and sighting(v, i)
        ]
        cues.append([*np.mean(pairs, 0), len(pairs) / 20] if pairs else [0.0] * 10)
    names = [scene.object(i).name for i in (anchor, *others)]
    look = [[-1, "name", name] for name in names]
    return question("pick", label, int(np.argmin(gaps)) == label, cues, look=look, shared=1)


def video_counting(scene: Scene, row: Sample) -> Question | None:
    name = row.metadata["name"]
    count = sum(thing.name == name for thing in scene.objects)
    label = len(row.metadata["objects"])
    shown = [sum(s.object_id in row.metadata["objects"] for s in scene.views[k].sightings) for k in scene.walk]
    cues = [max(shown), float(np.mean(shown)), float(np.mean(np.array(shown) > 0)), float(sum(np.diff(shown) > 0))]
    return question("word", str(label), count == label, cues, look=[[-1, "name", name]])


def video_route(scene: Scene, row: Sample) -> Question | None:
    """The first turn of the route."""
    assert row.answer is not None
    ids = row.metadata["objects"]
    start, faced, stop = (np.array(scene.object(i).box[:2]) for i in ids[:3])
    angle = clockwise(faced - start, stop - start)
    word = "turn right" if angle < 140 else "turn left" if angle > 220 else "turn back"
    label = str(row.metadata["turns"] if "turns" in row.metadata else row.answer["value"]).split(", ")[0]
    label = re.sub(r"^[A-F]\. ", "", label)
    cues = [x for i in ids[:3] for x in first_seen(scene, i)]
    return question("word", label, word == label, cues, look=[[-1, "name", scene.object(i).name] for i in ids[:3]])


def first_seen(scene: Scene, object_id: int) -> list[float]:
    """When the walk shows an object in the middle, and how large its 2D box is then."""
    seen = [(abs(c[0] - 0.5), k, c) for k, c in enumerate(track(scene, object_id)) if c[5]]
    if not seen:
        return [0.0, 0.0, 0.0]
    _, k, c = min(seen, key=lambda s: s[:2])
    return [k / 10, c[3], c[4]]


def video_order(scene: Scene, row: Sample) -> Question | None:
    """Which of the objects comes into view first."""
    names = sorted(row.metadata["order"])
    label = names.index(row.metadata["order"][0])
    by_name = {name: [t.id for t in scene.objects if t.name == name] for name in names}
    first = [
        min(k for k, view in enumerate(scene.walk) for s in scene.views[view].sightings if s.object_id in by_name[name])
        for name in names
    ]
    cues = [[np.mean([first_seen(scene, i)[0] for i in by_name[name]])] for name in names]
    look = [[-2, "name", name] for name in names]
    return question("pick", label, int(np.argmin(first)) == label, cues, look=look, shared=0)


def video_caption(scene: Scene, row: Sample) -> Question | None:
    """Whether the camera turned left or right."""
    assert row.answer is not None
    fact = next((f for f in row.answer["value"] if f["says"] == "way"), None)
    if fact is None:
        return None
    word = "right" if turned(scene) > 0 else "left"
    return question("word", fact["words"][0], word == fact["words"][0], [sweep(scene)])


def video_other(scene: Scene, row: Sample) -> Question | None:
    """The floor area of the room, by the shoelace formula."""
    assert row.answer is not None
    if row.metadata["form"] != "room" or scene.polygon is None:
        return None
    x, y = scene.polygon.T
    area = 0.5 * abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1)))
    label = float(row.answer["value"])
    sizes = [c for i in (t.id for t in scene.objects) for c in track(scene, i) if c[5]]
    cues = [len(scene.objects), *(np.mean(sizes, 0)[:5] if sizes else [0.0] * 5), float(len(sizes))]
    return question("number", label, within(area, label), cues)


READERS: dict[str, Callable[[Scene, Sample], Question | None]] = {
    "depth_comparison": depth_comparison,
    "distance": distance,
    "measurement": measurement,
    "detection_3d": detection_3d,
    "grounding_3d": grounding_3d,
    "scene_caption": scene_caption,
    "correspondence": correspondence,
    "camera_motion": camera_motion,
    "detection_multi": detection_multi,
    "object_object": object_object,
    "camera_camera": camera_camera,
    "change_caption": change_caption,
    "video_measurement": video_measurement,
    "video_object_object": video_object_object,
    "video_counting": video_counting,
    "video_route": video_route,
    "video_order": video_order,
    "video_caption": video_caption,
    "video_other": video_other,
}
