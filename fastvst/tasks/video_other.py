"""Other video questions: area of the room, path and turn of the camera, the object nearest to it at the end."""

from __future__ import annotations

import numpy as np

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene
from fastvst.spatial.floor import area
from fastvst.tasks.angles import clockwise, heading
from fastvst.tasks.common import TaskConfig, choose, nameable, pick
from fastvst.tasks.depth_comparison import separated
from fastvst.tasks.video import options, row

TASK = "video_other"

ROOM = (
    "What is the size of this room (in square meters)?",
    "How large is the floor of this room in square meters?",
    "Estimate the floor area of the room in square meters.",
    "How many square meters does this room have?",
    "Give the room's floor area in square meters.",
)
WAY = (
    "How far did the camera travel in this video, in meters?",
    "What is the length of the camera's path in meters?",
    "Estimate how many meters the camera moved from the first to the last frame, along its path.",
)
TURN = (
    "Over the whole video, did the camera mostly turn left or right?",
    "Which way did the camera turn during the video, left or right?",
    "While walking, to which side did the camera keep turning: left or right?",
)
LAST = (
    "At the end of the video, which of these is closest to the camera: {list}?",
    "In the last frame, which of {list} is nearest to the camera?",
    "When the video stops, which object is the closest to the camera: {list}?",
)


def total_turn(scene: Scene) -> float:
    """Total turn of the camera over the walk, in degrees; positive to the right, negative to the left."""
    ways = [heading(scene.views[k].camera) for k in scene.walk]
    steps = [(clockwise(a, b) + 180) % 360 - 180 for a, b in zip(ways, ways[1:], strict=False)]
    return float(sum(steps))


def travelled(scene: Scene) -> float:
    """Length of the camera's path over the walk, metres."""
    places = np.array([scene.views[k].camera.position for k in scene.walk])
    return float(np.linalg.norm(np.diff(places, axis=0), axis=1).sum())


def make(scene: Scene, rng: np.random.Generator, config: TaskConfig, index: str) -> Sample | None:
    """One row about the walk, or None."""
    form = pick(rng, ("room", "room", "way", "turn", "last"))
    if form == "room":
        if scene.polygon is None:
            return None
        size = area(scene.polygon)
        return _number(scene, index, form, pick(rng, ROOM), size, "m2")
    if form == "way":
        length = travelled(scene)
        return None if length < 1.0 else _number(scene, index, form, pick(rng, WAY), length, "m")
    if form == "turn":
        turn = total_turn(scene)
        if abs(turn) < 60:
            return None
        right = "right" if turn > 0 else "left"
        question = pick(rng, TURN)
        names = ["left", "right"]
    else:
        view = scene.views[scene.walk[-1]]
        pool = nameable(scene, view, config)
        chosen = choose(rng, pool, int(rng.integers(2, 5)))
        depths = [s.depth for s in chosen]
        centres = list(scene.boxes_in_view(view, [s.object_id for s in chosen])[:, 2])
        # the question is about the whole object: its dot and its box centre must both be nearest
        clear = len(chosen) > 1 and separated(depths, config) and separated(centres, config)
        if not clear or int(np.argmin(depths)) != int(np.argmin(centres)):
            return None
        names = [scene.object(s.object_id).name for s in chosen]
        right = names[int(np.argmin(depths))]
        question = pick(rng, LAST).format(list=", ".join(names))
    choices, _ = options(rng, right, [name for name in names if name != right])
    free = bool(rng.uniform() < config.easy / 2)
    return row(
        scene,
        task=TASK,
        index=index,
        question=question,
        reply=right,
        choices=None if free else choices,
        answer={"type": "choice", "value": right, "candidates": names},
        metadata={"form": form, "names": names},
    )


def _number(scene: Scene, index: str, form: str, question: str, value: float, unit: str) -> Sample:
    return row(
        scene,
        task=TASK,
        index=index,
        question=question,
        reply=f"{value:.1f}",
        answer={"type": "number", "value": round(value, 1), "unit": unit, "tolerance": 0.1},
        metadata={"form": form},
    )
