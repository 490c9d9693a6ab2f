"""Video object-object: distances in metres, the nearest of several objects, and directions of a person who faces one.

Distances are between the nearest surfaces of the boxes, with one decimal, and at least 0.2 m (rules of VLM-3R).
"""

from __future__ import annotations

import numpy as np

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene
from fastvst.spatial.boxes import box_distance
from fastvst.tasks.angles import clear_direction, clockwise, left_right, left_right_back, quadrant, spot
from fastvst.tasks.common import TaskConfig, choose, pick, rounded
from fastvst.tasks.video import options, row, unique

TASK = "video_object_object"
LEAST = 0.2  # metres
APART = 0.15  # metres between any two candidates

DISTANCE = (
    "Measuring from the closest point of each object, what is the distance between the {a} and the {b} (in meters)?",
    "How far apart are the {a} and the {b} in meters, measured between their nearest points?",
    "What is the gap between the {a} and the {b} in meters, from surface to surface?",
    "Estimate the shortest distance from the {a} to the {b} in meters.",
    "How many meters lie between the nearest points of the {a} and the {b}?",
    "Give the least distance between the {a} and the {b} in meters.",
)
CLOSEST = (
    "Measuring from the closest point of each object, which of these objects ({list}) is the closest to the {r}?",
    "Which of {list} is nearest to the {r}, measured from surface to surface?",
    "Of {list}, which object has the smallest gap to the {r}?",
    "Which one is closest to the {r}: {list}?",
    "Among {list}, what stands nearest to the {r}?",
)
DIRECTION = (
    "If I am standing by the {a} and facing the {b}, is the {c} to my {list}?",
    "I stand at the {a} and look toward the {b}. Is the {c} to my {list}?",
    "Imagine standing by the {a}, facing the {b}. On which side is the {c}: {list}?",
    "From the {a}, looking at the {b}, where is the {c}: {list}?",
    "You are at the {a} and turn to the {b}. In which direction is the {c}: {list}?",
    "Standing where the {a} is, I face the {b}. Where do I find the {c}: {list}?",
)
# difficulty: (rule, its words)
SIDES = {
    "easy": (left_right, ("left", "right")),
    "medium": (left_right_back, ("left", "right", "back")),
    "hard": (quadrant, ("front-left", "front-right", "back-left", "back-right")),
}
NOTE = {
    "easy": "",
    "medium": " Back means that I would have to turn at least 135 degrees to face it.",
    "hard": " The directions are the quadrants of a plane with me at its origin, facing along the positive y-axis.",
}


def make(scene: Scene, rng: np.random.Generator, config: TaskConfig, index: str) -> Sample | None:
    """One row about the walk, or None."""
    return pick(rng, (_distance, _closest, _direction, _direction))(scene, rng, config, index)


def _distance(scene: Scene, rng: np.random.Generator, config: TaskConfig, index: str) -> Sample | None:
    known = unique(scene, config)
    if len(known) < 2:
        return None
    names = choose(rng, sorted(known), 2)
    gap = box_distance(*(scene.object(known[name]).box for name in names))
    if gap < LEAST:
        return None
    value = rounded(gap, 1)
    return row(
        scene,
        task=TASK,
        index=index,
        question=pick(rng, DISTANCE).format(a=names[0], b=names[1]),
        reply=f"{value}",
        answer={"type": "number", "value": value, "unit": "m", "tolerance": 0.1},
        metadata={"form": "distance", "objects": [known[name] for name in names]},
    )


def _closest(scene: Scene, rng: np.random.Generator, config: TaskConfig, index: str) -> Sample | None:
    known = unique(scene, config)
    count = int(rng.integers(2, 5))
    for _ in range(20 if len(known) > count else 0):
        anchor, *names = choose(rng, sorted(known), count + 1)
        box = scene.object(known[anchor]).box
        gaps = [box_distance(box, scene.object(known[name]).box) for name in names]
        ordered = np.sort(gaps)
        lead = ordered[1] - ordered[0]
        clear = lead >= config.distance_gap and lead >= config.distance_ratio * ordered[1]
        if clear and ordered[0] >= APART and (np.diff(ordered) >= APART).all():
            break
    else:
        return None
    right = names[int(np.argmin(gaps))]
    choices, _ = options(rng, right, [name for name in names if name != right])
    free = bool(rng.uniform() < config.easy / 2)
    return row(
        scene,
        task=TASK,
        index=index,
        question=pick(rng, CLOSEST).format(list=", ".join(names), r=anchor),
        reply=right,
        choices=None if free else choices,
        answer={"type": "choice", "value": right, "candidates": names},
        metadata={"form": "closest", "objects": [known[n] for n in (anchor, *names)], "names": names, "gaps": gaps},
    )


def _direction(scene: Scene, rng: np.random.Generator, config: TaskConfig, index: str) -> Sample | None:
    known = unique(scene, config)
    level = pick(rng, tuple(SIDES))
    rule, words = SIDES[level]
    right = pick(rng, words)  # chosen before the objects, so that no direction is more frequent
    for _ in range(60 if len(known) >= 3 else 0):
        names = choose(rng, sorted(known), 3)
        a, b, c = (spot(scene, known[name]) for name in names)
        if rule(clockwise(b - a, c - a)) == right and clear_direction(a, b) and clear_direction(a, c):
            break
    else:
        return None
    choices, _ = options(rng, right, [word for word in words if word != right])
    shown = f"{', '.join(words[:-1])} or {words[-1]}"
    question = pick(rng, DIRECTION).format(a=names[0], b=names[1], c=names[2], list=shown) + NOTE[level]
    free = bool(rng.uniform() < config.easy / 2)
    return row(
        scene,
        task=TASK,
        index=index,
        question=question,
        reply=right,
        choices=None if free else choices,
        answer={"type": "choice", "value": right, "candidates": list(words)},
        metadata={"form": f"direction_{level}", "objects": [known[name] for name in names], "right": right},
    )
