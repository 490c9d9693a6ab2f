"""Route plan: fill in the turns of a walk from one object to another, past a third one."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene
from fastvst.spatial.floor import crosses_outline, footprint, height_range, meets
from fastvst.tasks.angles import clockwise, spot
from fastvst.tasks.common import TaskConfig, choose, pick
from fastvst.tasks.video import options, row, unique

TASK = "video_route"
TURNS = ("turn left", "turn right", "turn back")
LEG = 0.6  # metres; the shortest leg of a route
STEP_OVER = 0.1
DUCK = 1.9  # metres; objects that hang higher are no obstacle

START = (
    "You are a robot beginning at the {a}, facing the {b}. You want to go to the {z}.",
    "A robot stands at the {a} and faces the {b}. It has to reach the {z}.",
    "Start at the {a}, looking toward the {b}. Your goal is the {z}.",
    "You stand next to the {a} and look at the {b}. You want to walk to the {z}.",
    "Imagine that you are by the {a}, facing the {b}, and want to get to the {z}.",
)
FILL = (
    "You will perform the following actions (for each [fill in], choose 'turn left', 'turn right' or 'turn back'): "
    "{steps} You have reached your destination.",
    "Complete the plan; every [fill in] is one of 'turn left', 'turn right', 'turn back': {steps} Then you are there.",
    "The plan is: {steps} Which turns ('turn left', 'turn right' or 'turn back') belong in the [fill in]s?",
)


def turn_word(angle: float) -> str | None:
    """The word for a clockwise turn of `angle` degrees; None for straight ahead and near a border between two words."""
    if 40 <= angle <= 130:
        return "turn right"
    if 230 <= angle <= 320:
        return "turn left"
    return "turn back" if 150 <= angle <= 210 else None


@lru_cache(maxsize=2)
def obstacles(scene: Scene) -> tuple[tuple[int, np.ndarray], ...]:
    """Id and floor outline of every object that one cannot walk over or under."""
    found = []
    for thing in scene.objects:
        low, high = height_range(thing.box)
        if high > STEP_OVER and low < DUCK:
            found.append((thing.id, footprint(thing.box)))
    return tuple(found)


def walkable(scene: Scene, start: int, end: int) -> bool:
    """Whether the straight line between two objects crosses no other object on the floor and no wall."""
    a = spot(scene, start)
    b = spot(scene, end)
    if np.linalg.norm(b - a) < LEG or (scene.polygon is not None and crosses_outline(a, b, scene.polygon)):
        return False
    return not any(meets(a, b, outline) for i, outline in obstacles(scene) if i not in (start, end))


def make(scene: Scene, rng: np.random.Generator, config: TaskConfig, index: str) -> Sample | None:
    """One row about the walk: one or two turns between objects on the floor; or None."""
    if scene.ignored:  # such an object may stand in the way
        return None
    known = {n: i for n, i in unique(scene, config).items() if height_range(scene.object(i).box)[0] < 0.2}
    legs = int(rng.integers(1, 3))
    wanted = [pick(rng, TURNS) for _ in range(legs)]  # chosen before the objects, so that no turn is more frequent
    for _ in range(400 if len(known) >= legs + 2 else 0):
        names = choose(rng, sorted(known), legs + 2)  # the start, the object that it faces, then the stops
        ids = [known[name] for name in names]
        stops = [ids[0], *ids[2:]]
        points = [spot(scene, i) for i in stops]
        facing = spot(scene, ids[1]) - points[0]
        if np.linalg.norm(facing) < LEG:
            continue
        turns = []
        for p, q in zip(points, points[1:], strict=False):
            turns.append(turn_word(clockwise(facing, q - p)))
            facing = q - p
        if turns == wanted and all(walkable(scene, p, q) for p, q in zip(stops, stops[1:], strict=False)):
            break
    else:
        return None
    steps = []
    number = 1
    for name in [names[k] for k in range(2, legs + 2)]:
        steps += [f"{number}. [fill in]", f"{number + 1}. Go forward until the {name}."]
        number += 2
    question = pick(rng, START).format(a=names[0], b=names[1], z=names[-1])
    question += " " + pick(rng, FILL).format(steps=" ".join(steps))
    right = ", ".join(wanted)
    every = list(TURNS) if legs == 1 else [f"{p}, {q}" for p in TURNS for q in TURNS]
    choices, _ = options(rng, right, choose(rng, [text for text in every if text != right], min(3, len(every) - 1)))
    free = bool(rng.uniform() < config.easy / 2)
    return row(
        scene,
        task=TASK,
        index=index,
        question=question,
        reply=right,
        choices=None if free else choices,
        answer={"type": "text", "value": right, "candidates": every},
        metadata={"form": f"{legs}_turns", "objects": ids, "names": names},
    )
