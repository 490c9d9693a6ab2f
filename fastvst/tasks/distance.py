"""Distance prediction: which of two objects is nearer to a third, by the least distance between their 3D boxes."""

from __future__ import annotations

import numpy as np

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene
from fastvst.spatial import draw
from fastvst.spatial.boxes import box_distance
from fastvst.tasks.common import TaskConfig, canvas, choose, pick, sample, titled, usable

TASK = "distance"
KIND = "distance"

COLOUR_FORM = (
    "Which box is closer to the {r} box, the {a} box or the {b} box?",
    "Which is closer to the {r} box: the {a} box or the {b} box?",
    "Of the {a} box and the {b} box, which one is closer to the {r} box?",
    "The {a} box or the {b} box: which is closer to the {r} box?",
    "Which object is nearer to the one in the {r} box, the {a} box or the {b} box?",
)
SHORT_FORM = (
    "Which is closer to the {r} ({cr} box), the {a} ({ca} box) or the {b} ({cb} box)?",
    "Is the {a} ({ca} box) or the {b} ({cb} box) nearer to the {r} ({cr} box)?",
    "Which object is nearest to the {r} ({cr} box): {a} ({ca} box) or {b} ({cb} box)?",
    "Between {a} ({ca} box) and {b} ({cb} box), which has the smaller gap to the {r} ({cr} box)?",
    "Of {a} ({ca} box) and {b} ({cb} box), which lies closer to the {r} ({cr} box)?",
)
WORKING_FORM = (
    "Estimate the distances in meters, measured between the nearest surfaces, and tell which is closer to the {r} "
    "({cr} box): the {a} ({ca} box) or the {b} ({cb} box).",
    "Which is closer to the {r} ({cr} box), the {a} ({ca} box) or the {b} ({cb} box)? Give the distance of each first, "
    "from surface to surface.",
    "Work out how far the {a} ({ca} box) and the {b} ({cb} box) are from the {r} ({cr} box), surface to surface, then "
    "name the closer one.",
    "Compute the gap from the {r} ({cr} box) to the {a} ({ca} box) and to the {b} ({cb} box) in meters. Which is less?",
    "State both distances to the {r} ({cr} box) before you answer: is the {a} ({ca} box) or the {b} ({cb} box) "
    "closer? Measure between the closest points.",
)


def make(scene: Scene, view_index: int, rng: np.random.Generator, config: TaskConfig, index: str) -> Sample | None:
    """One row about one view, or None. The first object of a triple is the anchor."""
    view = scene.views[view_index]
    pool = [s for s in usable(view, config) if s.box_2d[2] - s.box_2d[0] < 0.8 * view.camera.width]
    for _ in range(10 if len(pool) >= 3 else 0):
        chosen = choose(rng, pool, 3)
        boxes = [scene.object(s.object_id).box for s in chosen]
        near = box_distance(boxes[0], boxes[1])
        far = box_distance(boxes[0], boxes[2])
        small = min(near, far)
        large = max(near, far)
        clear = large - small >= config.distance_gap and large - small >= config.distance_ratio * large
        if clear and small >= config.min_distance:
            break
    else:
        return None
    titles = titled(scene, chosen)
    names = [titles[s.object_id] for s in chosen]
    easy = rng.uniform() < config.easy
    form = "colour" if easy else pick(rng, ("short", "working"))
    # the plain form always uses one colour for the anchor: only the two candidates change
    others = tuple(c for c in draw.COLOURS if c != "yellow")
    colours = ["yellow", *choose(rng, others, 2)] if easy else choose(rng, tuple(draw.COLOURS), 3)
    image = canvas(view)
    for s, colour in zip(chosen, colours, strict=True):
        draw.box_2d(image, s.box_2d, colour)
    fields = {"r": names[0], "a": names[1], "b": names[2], "cr": colours[0], "ca": colours[1], "cb": colours[2]}
    candidates = names[1:]
    best = 0 if near < far else 1
    if form == "colour":
        candidates = [f"{c} box" for c in colours[1:]]
        question = pick(rng, COLOUR_FORM).format(r=colours[0], a=colours[1], b=colours[2])
        reply = candidates[best]
    elif form == "short":
        question = pick(rng, SHORT_FORM).format(**fields)
        reply = candidates[best]
    else:
        question = pick(rng, WORKING_FORM).format(**fields)
        lines = [f"Distance[{names[0]}, {name}]={d:.1f}m" for name, d in zip(names[1:], (near, far), strict=True)]
        reply = "\n".join([*lines, f"So, the answer is {candidates[best]}."])
    return sample(
        scene,
        task=TASK,
        kind=KIND,
        index=index,
        images=[image],
        turns=[(question, reply)],
        answer={"type": "choice", "value": candidates[best], "candidates": candidates},
        metadata={
            "form": form,
            "view": view_index,
            "objects": [s.object_id for s in chosen],
            "titles": names,
            "distances": [near, far],
        },
    )
