"""Traces about a video: sizes, distances and directions, counting, order of appearance.

They describe a few key frames, those that best show the objects of the question. A frame is named by its number.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastvst.data.sample import Sample
from fastvst.reasoning import claims, marks
from fastvst.reasoning.describe import RESTATE, say
from fastvst.scenes.scene import Scene
from fastvst.spatial.boxes import box_distance
from fastvst.tasks.common import article, choose, listed, pick, prose
from fastvst.tasks.facts import Statement

KEYS = 3  # most key frames in one trace
Made = tuple[list[Statement], list[Statement]]
PLAN = {
    "size": (
        "A size is asked for, so I look for the frame that shows the object best.",
        "To estimate a dimension I need the object's distance and the things beside it.",
    ),
    "relation": (
        "I have to know where things stand in the room, so I collect what the frames show of them.",
        "The question is about the layout of the room, which I put together from several frames.",
    ),
    "count": (
        "I go through the frames and count each thing once, even if it shows again later.",
        "The task is to count, so I follow the video and note every new one.",
    ),
    "order": (
        "The task is about time: I note for each thing when it comes into view for the first time.",
        "I go through the frames in order and watch for the first appearance of each of the things named.",
    ),
}
GAP = (
    "Between the nearest surfaces of the {a} and the {b} there is a gap of roughly {d:.1f} m.",
    "From the {a} to the {b} I estimate {d:.1f} m at the closest.",
)
SMALLEST = ("The smallest of these gaps is the one to the {a}.", "So of all the candidates the {a} is nearest.")
TURN = (
    "Standing at the {a} and looking at the {b}, I have to turn by about {d} degrees {way} to face the {c}.",
    "From the {a}, the direction of the {c} is about {d} degrees {way} of that of the {b}.",
)
SIDE = ("Facing the {b}, I have the {c} to my {side}.", "So for somebody at the {a} the {c} is to the {side}.")
RULE = {
    "easy": "Clockwise, as seen from above, means to the right, and counterclockwise to the left.",
    "medium": "What needs a turn of more than 135 degrees counts as back, the rest as left or right.",
    "hard": "Up to 90 degrees is in front, more is behind; clockwise is right and counterclockwise left.",
}
ONE = ("Frame {k} shows {a}.", "In frame {k} I find {a}.")
MORE = ("Frame {k} shows another {a}, not among those counted so far.", "In frame {k} there is one more {a}.")
TOTAL = ("No frame adds a further {a}, so the room has {n} in all.", "These are all; the count of {a} items is {n}.")
STARTS = ("The video starts with {a} in view.", "Right at the start, in frame 1, there is {a}.")
APPEARS = (
    "No {a} is seen before frame {m}, and by frame {k} one is clearly in view.",
    "Up to frame {n} nothing of any {a} shows; by frame {k} one can be seen clearly.",
)
BEFORE = ("So {a} comes into view before {b}.", "Therefore {a} appears earlier than {b}.")


def named(scene: Scene, name: str) -> list[int]:
    """Ids of all objects of a class."""
    return [thing.id for thing in scene.everything if thing.name == name]


def plain(scene: Scene, names: list[str]) -> bool:
    """Whether no other class of the scene can be called by one of these names.

    An office chair is also a chair: "no chair before frame 5" would be false for a reader who sees one.
    """
    return not any(t.name != name and t.name.endswith(name) for t in scene.everything for name in names)


def best_frame(scene: Scene, thing: int) -> int:
    """Number of the frame that shows the most of an object."""
    sightings = [claims.sighting(scene, v, thing) for v in scene.walk]
    return int(np.argmax([s.visibility * s.pixels if s is not None else 0.0 for s in sightings]))


def clear_frame(scene: Scene, thing: int) -> int:
    """Number of the first frame that shows an object clearly; -1 if there is none."""
    return next((k for k, v in enumerate(scene.walk) if claims.clear(scene, v, thing)), -1)


def key_frames(scene: Scene, sample: Sample) -> list[int]:
    """Numbers of up to three frames, in order, that show the objects of the question best or first."""
    meta = sample.metadata
    if "order" in meta:
        found = [frames[1] for name in meta["order"] if (frames := claims.class_frames(scene, name)) is not None]
    elif meta["task"].endswith("video_counting"):
        found = [clear_frame(scene, i) for i in meta["objects"]]
    else:
        found = [best_frame(scene, i) for i in meta["objects"]]
    if len(set(found)) == 1:  # one frame says little about a video: add its middle
        found.append(len(scene.walk) // 2)
    return sorted(set(found[:KEYS]))


def _titles(scene: Scene, sample: Sample) -> list[str]:
    """Class names of the objects in the question (each the only one of its class); descriptions use them too."""
    meta = sample.metadata
    meta["titles"] = [prose(scene.object(i).name) for i in meta["objects"]]
    return list(meta["titles"])


def measurement(scene: Scene, sample: Sample, rng: np.random.Generator) -> Made:
    (thing,) = sample.metadata["objects"]
    (title,) = _titles(scene, sample)
    view = scene.walk[best_frame(scene, thing)]
    closing = [*marks.scale(scene, view, thing, title, rng), say(rng, RESTATE)]
    return [say(rng, PLAN["size"])], [*closing, *marks.sizes(scene, thing, sample.metadata["form"], title, rng)]


def object_object(scene: Scene, sample: Sample, rng: np.random.Generator) -> Made:
    """Distance of two objects, the nearest of several, or the side of one for a person who faces another."""
    meta = sample.metadata
    names = _titles(scene, sample)
    closing = [say(rng, RESTATE)]
    if not meta["form"].startswith("direction"):
        for other, name in zip(meta["objects"][1:], names[1:], strict=True):
            pair = [meta["objects"][0], other]
            gap = box_distance(*(scene.object(i).box for i in pair))
            fact: dict[str, Any] = {"says": "gap", "objects": pair, "value": round(gap, 1), "tolerance": 0.0501}
            closing.append(Statement(pick(rng, GAP).format(a=names[0], b=name, d=gap), fact))
        if meta["form"] == "closest":
            nearest = int(np.argmin(meta["gaps"]))
            fact = {
                "says": "nearest",
                "origin": meta["objects"][0],
                "others": meta["objects"][1:],
                "objects": [meta["objects"][1 + nearest]],
            }
            closing.append(Statement(pick(rng, SMALLEST).format(a=names[1 + nearest]), fact))
        return [say(rng, PLAN["relation"])], closing
    level = meta["form"].removeprefix("direction_")
    base = dict(zip(("origin", "anchor", "target"), meta["objects"], strict=True))
    a, b, c = names
    degrees, way = claims.about(claims.turn_between(*(claims.place_of(scene, i) for i in meta["objects"])))
    fact = {"says": "angle", **base, "way": way, "value": degrees}
    closing.append(Statement(pick(rng, TURN).format(a=a, b=b, c=c, d=degrees, way=way), fact))
    closing.append(Statement(RULE[level], {"says": "plan"}))
    fact = {"says": "faces", **base, "level": level, "result": meta["right"]}
    closing.append(Statement(pick(rng, SIDE).format(a=a, b=b, c=c, side=meta["right"]), fact))
    return [say(rng, PLAN["relation"])], closing


def counting(scene: Scene, sample: Sample, rng: np.random.Generator) -> Made | None:
    meta = sample.metadata
    if not plain(scene, [meta["name"]]):
        return None
    name = prose(meta["name"])
    closing: list[Statement] = []
    counted: list[int] = []
    for i in sorted(meta["objects"], key=lambda i: clear_frame(scene, i)):
        frame = clear_frame(scene, i)
        text = (
            pick(rng, MORE).format(k=frame + 1, a=name)
            if counted
            else pick(rng, ONE).format(k=frame + 1, a=article(meta["name"]))
        )
        fact: dict[str, Any] = {"says": "another", "view": scene.walk[frame], "objects": [i], "others": list(counted)}
        closing.append(Statement(text, fact))
        counted.append(i)
    fact = {"says": "count", "name": meta["name"], "objects": counted, "value": len(counted)}
    closing.append(Statement(pick(rng, TOTAL).format(a=name, n=len(counted)), fact))
    return [say(rng, PLAN["count"])], closing


def order(scene: Scene, sample: Sample, rng: np.random.Generator) -> Made | None:
    ranked = sample.metadata["order"]
    if not plain(scene, ranked):
        return None
    closing = [say(rng, RESTATE)]
    whole = {name: f"the {'first ' if len(named(scene, name)) > 1 else ''}{prose(name)}" for name in ranked}
    for name in choose(rng, ranked, len(ranked)):
        frames = claims.class_frames(scene, name)
        if frames is None:
            raise RuntimeError(f"{sample.id}: no frame shows {name!r} clearly")
        fact: dict[str, Any] = {"says": "appears", "name": name, "first": frames[0], "sure": frames[1]}
        if frames[1] == 0:
            text = pick(rng, STARTS).format(a=article(name))
        elif frames[0] == 0:
            text = f"A part of {article(name)} shows from the start, and frame {frames[1] + 1} shows it clearly."
        else:
            text = pick(rng, APPEARS).format(n=frames[0], m=frames[0] + 1, a=prose(name), k=frames[1] + 1)
        closing.append(Statement(text, fact))
    for one, two in zip(ranked, ranked[1:], strict=False):
        fact = {"says": "before", "names": [one, two]}
        closing.append(Statement(pick(rng, BEFORE).format(a=whole[one], b=whole[two]), fact))
    names = listed([whole[name] for name in ranked])
    closing.append(Statement(f"From first to last the order is {names}.", {"says": "before", "names": ranked}))
    return [say(rng, PLAN["order"])], closing
