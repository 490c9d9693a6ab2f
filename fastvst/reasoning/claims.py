"""The claims that a sentence of a trace can make about a scene, and their checks.

A claim is a JSON-able dict: "says" names its kind, the other keys name views and objects by number. `holds` checks it
against the annotation and the poses, independently of the code that wrote the sentence, and rejects borderline cases.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fastvst.scenes.scene import Scene, Sighting
from fastvst.spatial.boxes import box_distance, corners
from fastvst.spatial.camera import project, unproject
from fastvst.spatial.floor import footprint, meets, outline, upright
from fastvst.tasks.angles import (
    COMPASS,
    HOURS,
    clockwise,
    heading,
    left_right,
    left_right_back,
    quadrant,
    spot,
)
from fastvst.tasks.camera_motion import relative, shift_words, turn_word
from fastvst.tasks.common import TaskConfig
from fastvst.tasks.measurement import measure

CONFIG = TaskConfig()
RANGES = ((0.0, 1.4, "near"), (1.6, 2.8, "middle"), (3.2, 99.0, "far"))  # metres of depth, with gaps between them
TENTH = 0.0501  # metres by which a distance that is stated to ten centimetres may be off
Claim = dict[str, Any]


def sighting(scene: Scene, view: int, object_id: int) -> Sighting | None:
    """How an object appears in a view, or None."""
    return next((s for s in scene.views[view].sightings if s.object_id == object_id), None)


def clear(scene: Scene, view: int, object_id: int) -> bool:
    """Whether a view shows an object well enough to mention it."""
    s = sighting(scene, view, object_id)
    return s is not None and s.visibility >= CONFIG.min_visibility and s.pixels >= CONFIG.min_pixels


def across(scene: Scene, view: int, object_id: int) -> tuple[float, float] | None:
    """Horizontal place of an object's dot and of its 2D box's centre, as shares of the image width."""
    s = sighting(scene, view, object_id)
    if s is None:
        return None
    width = scene.views[view].camera.width
    return s.point[0] / width, (s.box_2d[0] + s.box_2d[2]) / 2 / width


def side_of(scene: Scene, view: int, object_id: int) -> str | None:
    """left, middle or right third, where the dot and the 2D box agree and neither is within 4 % of a border."""
    found = set()
    for u in across(scene, view, object_id) or ():
        if min(abs(u - 1 / 3), abs(u - 2 / 3)) < 0.04:
            return None
        found.add("left" if u < 1 / 3 else "middle" if u < 2 / 3 else "right")
    return found.pop() if len(found) == 1 else None


def range_of(scene: Scene, view: int, object_id: int) -> str | None:
    """near, middle or far, where the depth of the dot and of the box's centre agree."""
    s = sighting(scene, view, object_id)
    if s is None:
        return None
    depths = (s.nearest, s.farthest, float(scene.boxes_in_view(scene.views[view], [object_id])[0, 2]))
    for low, high, word in RANGES:
        if all(low <= depth <= high for depth in depths):
            return word
    return None


def left_of(scene: Scene, view: int, a: int, b: int) -> bool:
    """Whether a is left of b in the image by 10 % of its width, by the dots and by the 2D boxes."""
    first = across(scene, view, a)
    second = across(scene, view, b)
    return first is not None and second is not None and all(q - p >= 0.1 for p, q in zip(first, second, strict=True))


def nearer(scene: Scene, view: int, a: int, b: int) -> bool:
    """Whether a is nearer than b to a view's camera, with the margins of the tasks: by dots and by box centres, in a
    scan also by the median depths of what the view shows of them."""
    first = sighting(scene, view, a)
    second = sighting(scene, view, b)
    if first is None or second is None:
        return False
    centres = scene.boxes_in_view(scene.views[view], [a, b])[:, 2]
    margin = max(CONFIG.depth_gap, CONFIG.depth_ratio * second.depth)
    if first.typical is not None and second.typical is not None and second.typical - first.typical < margin:
        return False
    return second.nearest - first.farthest >= margin and float(centres[1] - centres[0]) >= margin


def on_top(scene: Scene, a: int, b: int) -> bool:
    """Whether a rests on b: its underside within 4 cm of b's top, its centre over b's footprint.

    Always False where nothing tells which way is up.
    """
    if scene.up is None:
        return False
    upper, lower = corners([scene.object(a).box, scene.object(b).box]) @ upright(scene.up).T
    here = upper[:, :2].mean(0)
    return abs(float(upper[:, 2].min() - lower[:, 2].max())) <= 0.04 and meets(here, here + 1e-9, outline(lower))


def at_wall(scene: Scene, a: int) -> bool:
    """Whether a side of an object's footprint lies along a wall: two of its corners within 10 cm of it."""
    if scene.polygon is None:
        return False
    for p, q in zip(scene.polygon, np.roll(scene.polygon, -1, axis=0), strict=True):
        along = (q - p) / np.linalg.norm(q - p)
        inward = np.array([-along[1], along[0]])
        corners = footprint(scene.object(a).box) - p
        t = corners @ along
        if float(np.sort(corners @ inward)[1]) <= 0.1 and t.max() > 0 and t.min() < np.linalg.norm(q - p):
            return True
    return False


def turn_between(origin: np.ndarray, anchor: np.ndarray, target: np.ndarray) -> float:
    """Degrees clockwise, in [0, 360), from the direction of `anchor` to that of `target`, seen from `origin`."""
    return clockwise(anchor - origin, target - origin)


def place_of(scene: Scene, who: Claim | int) -> np.ndarray:
    """Floor point (2,) of an object (its number) or of a camera ({"camera": view})."""
    return scene.views[who["camera"]].camera.position[:2] if isinstance(who, dict) else spot(scene, who)


def _same_angle(a: float, b: float, tolerance: float) -> bool:
    return abs((a - b + 180) % 360 - 180) <= tolerance


def _seen(scene: Scene, c: Claim) -> bool:
    return all(clear(scene, c["view"], i) for i in c["objects"])


def _unseen(scene: Scene, c: Claim) -> bool:
    return all(sighting(scene, c["view"], i) is None for i in c["objects"])


def _angle(scene: Scene, c: Claim) -> bool:
    turned = turn_between(*(place_of(scene, c[key]) for key in ("origin", "anchor", "target")))
    return _same_angle(turned if c["way"] == "clockwise" else -turned, c["value"], 3.0)


def _look(scene: Scene, c: Claim) -> bool:
    turned = clockwise(*(heading(scene.views[v].camera) for v in c["views"]))
    return _same_angle(turned if c["way"] in ("clockwise", "right") else -turned, c["value"], c.get("tolerance", 3.0))


def _toward(scene: Scene, c: Claim) -> bool:
    camera = scene.views[c["view"]].camera
    turned = clockwise(heading(camera), place_of(scene, c["target"]) - camera.position[:2])
    return _same_angle(turned if c["way"] == "clockwise" else -turned, c["value"], 3.0)


def _steps(scene: Scene, c: Claim) -> bool:
    if c.get("asked", c["given"]) != c["given"]:  # the question gives another direction
        return False
    words = COMPASS if c["given"] in COMPASS else HOURS
    sign = 1 if c["way"] == "clockwise" else -1
    return words[(words.index(c["given"]) + sign * c["steps"]) % len(words)] == c["result"]


def _shift(scene: Scene, c: Claim) -> bool:
    shift, _, _ = relative(*(scene.views[v].camera for v in c["views"]))
    return shift_words(shift, CONFIG) == c["words"]


def _pan(scene: Scene, c: Claim) -> bool:
    _, pan, tilt = relative(*(scene.views[v].camera for v in c["views"]))
    return turn_word(pan, tilt, CONFIG) == c["words"][0]


def _drift(scene: Scene, c: Claim) -> bool:
    first, second = (sighting(scene, v, c["objects"][0]) for v in c["views"])
    if first is None or second is None:
        return False
    axis, sign = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}[c["word"]]
    size = (scene.views[c["views"][0]].camera.width, scene.views[c["views"][0]].camera.height)[axis]
    centre = [(s.box_2d[axis] + s.box_2d[axis + 2]) / 2 for s in (first, second)]
    return sign * (centre[1] - centre[0]) >= 0.03 * size


def _grew(scene: Scene, c: Claim) -> bool:
    pixels = [s.pixels if s is not None else 0 for s in (sighting(scene, v, c["objects"][0]) for v in c["views"])]
    if min(pixels) < 100:
        return False
    return pixels[1] >= 1.2 * pixels[0] if c["word"] == "larger" else pixels[0] >= 1.2 * pixels[1]


def _depth(scene: Scene, c: Claim) -> bool:
    u, v = c["point"]
    depth = scene.views[c["view"]].depth
    known = float(depth[int(v), int(u)]) if depth is not None else c["depth"]
    return abs(known - c["value"]) <= 0.0501 + 1e-6


def _ranked(scene: Scene, c: Claim) -> bool:
    values = c["values"]
    return all(a < b for a, b in zip(values, values[1:], strict=False)) and c["result"] in (0, len(values) - 1)


def _scale(scene: Scene, c: Claim) -> bool:
    camera = scene.views[c["view"]].camera
    s = sighting(scene, c["view"], c["objects"][0])
    return s is not None and s.span is None and abs(10 * s.depth * camera.height / camera.fy - c["value"]) <= 0.51


def _spot(scene: Scene, c: Claim) -> bool:
    ids = scene.views[c["view"]].ids
    (u, v) = c["point"]
    return ids is not None and int(ids[int(v), int(u)]) == c["objects"][0]


def _world(scene: Scene, view: int, point: list[float]) -> np.ndarray:
    """World point (3,) under a pixel."""
    depth = scene.views[view].depth
    assert depth is not None
    return unproject(scene.views[view].camera, np.array(point), depth[int(point[1]), int(point[0])].astype(np.float64))


def _same(scene: Scene, c: Claim) -> bool:
    there, ahead = project(scene.views[c["views"][1]].camera, _world(scene, c["views"][0], c["points"][0]))
    return float(ahead) > 0 and float(np.hypot(*(there - c["points"][1]))) < 0.01


def _apart(scene: Scene, c: Claim) -> bool:
    places = [_world(scene, v, p) for v, p in zip(c["views"], c["points"], strict=True)]
    return abs(float(np.linalg.norm(places[0] - places[1])) - c["value"]) <= c["tolerance"]


def class_frames(scene: Scene, name: str) -> tuple[int, int] | None:
    """First frame of the walk (from 0) that shows any object of a class, and the first that shows one clearly."""
    ids = [thing.id for thing in scene.everything if thing.name == name]
    shown = [k for k, v in enumerate(scene.walk) if any(sighting(scene, v, i) is not None for i in ids)]
    sure = [k for k, v in enumerate(scene.walk) if any(clear(scene, v, i) for i in ids)]
    return (shown[0], sure[0]) if sure else None


def _appears(scene: Scene, c: Claim) -> bool:
    return class_frames(scene, c["name"]) == (c["first"], c["sure"])


def _before(scene: Scene, c: Claim) -> bool:
    found = [class_frames(scene, name) for name in c["names"]]
    return all(a is not None and b is not None and a[1] < b[0] for a, b in zip(found, found[1:], strict=False))


def _nearest(scene: Scene, c: Claim) -> bool:
    box = scene.object(c["origin"]).box
    (i,) = c["objects"]
    own = box_distance(box, scene.object(i).box)
    return i in c["others"] and all(box_distance(box, scene.object(j).box) > own for j in c["others"] if j != i)


def _another(scene: Scene, c: Claim) -> bool:
    (i,) = c["objects"]
    alike = all(scene.object(j).name == scene.object(i).name for j in c["others"])
    return clear(scene, c["view"], i) and i not in c["others"] and alike


def _count(scene: Scene, c: Claim) -> bool:
    ids = {thing.id for thing in scene.everything if thing.name == c["name"]}
    return set(c["objects"]) == ids and len(ids) == c["value"]


SIDES: dict[str, Callable[[float], str | None]] = {"easy": left_right, "medium": left_right_back, "hard": quadrant}


def _taller(one: float, other: float) -> bool:
    """Whether a height is greater than another by 5 cm and by 10 %."""
    return one - other >= max(0.05, 0.1 * one)


def _faces(scene: Scene, c: Claim) -> bool:
    turned = turn_between(*(place_of(scene, c[key]) for key in ("origin", "anchor", "target")))
    return SIDES[c["level"]](turned) == c["result"]


CHECKS: dict[str, Callable[[Scene, Claim], bool]] = {
    "seen": _seen,
    "unseen": _unseen,
    "both": lambda scene, c: all(clear(scene, v, i) for v in c["views"] for i in c["objects"]),
    "marked": lambda scene, c: clear(scene, c["view"], c["objects"][0]) and c.get("mark", c["view"]) == c["view"],
    "side": lambda scene, c: side_of(scene, c["view"], c["objects"][0]) == c["word"],
    "range": lambda scene, c: range_of(scene, c["view"], c["objects"][0]) == c["word"],
    "left_of": lambda scene, c: left_of(scene, c["view"], *c["objects"]),
    "nearer": lambda scene, c: nearer(scene, c["view"], *c["objects"]),
    "on": lambda scene, c: on_top(scene, *c["objects"]),
    "wall": lambda scene, c: at_wall(scene, c["objects"][0]),
    "gap": lambda scene, c: (
        abs(box_distance(*(scene.object(i).box for i in c["objects"])) - c["value"]) <= c["tolerance"]
    ),
    "tall": lambda scene, c: abs(100 * scene.object(c["objects"][0]).height - c["value"]) <= 5.01,
    "size": lambda scene, c: abs(100 * measure(scene.object(c["objects"][0]), c["what"]) - c["value"]) <= 0.51,
    "taller": lambda scene, c: _taller(*(scene.object(i).height for i in c["objects"])),
    "scale": _scale,
    "spot": _spot,
    "same": _same,
    "apart": _apart,
    "appears": _appears,
    "before": _before,
    "nearest": _nearest,
    "another": _another,
    "count": _count,
    "faces": _faces,
    "angle": _angle,
    "look": _look,
    "toward": _toward,
    "steps": _steps,
    "shift": _shift,
    "pan": _pan,
    "drift": _drift,
    "grew": _grew,
    "depth": _depth,
    "ranked": _ranked,
    # Sentences that claim nothing about the scene: the method, and the general truths in `geometric`.
    "plan": lambda scene, c: True,
    "answer": lambda scene, c: True,
}


def holds(scene: Scene, claim: Claim) -> bool:
    """Whether a claim is true of the scene.

    Raises:
        ValueError: a kind of claim that has no check.
    """
    if claim.get("says") not in CHECKS:
        raise ValueError(f"scene {scene.name!r}: no check for the claim {claim}; known: {sorted(CHECKS)}")
    return bool(CHECKS[claim["says"]](scene, claim))


def about(degrees: float) -> tuple[int, str]:
    """A clockwise turn of `degrees` in [0, 360) as (degrees up to 180, rounded to 5; the direction of the turn)."""
    way = "clockwise" if degrees <= 180 else "counterclockwise"
    return 5 * round(min(degrees, 360 - degrees) / 5), way


def rounded_gap(metres: float) -> float:
    """A distance to half a metre above one metre, else to ten centimetres."""
    return round(metres, 1) if metres < 1 else math.floor(metres * 2 + 0.5) / 2


def gap_tolerance(stated: float) -> float:
    """Metres by which a distance of `rounded_gap` may be off: half of its last place."""
    return 0.2501 if stated >= 1 else TENTH
