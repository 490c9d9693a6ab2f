"""Traces about objects and points that are marked in one or two images: measurement, correspondence."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from fastvst.data.sample import Sample
from fastvst.reasoning import claims
from fastvst.reasoning.describe import MERGE, RESTATE, capital, say, shared, swing
from fastvst.scenes.scene import Scene
from fastvst.spatial.camera import unproject
from fastvst.tasks.common import TaskConfig, article, choose, nameable, pick, prose, rounded
from fastvst.tasks.facts import Statement
from fastvst.tasks.measurement import measure

CONFIG = TaskConfig()
PLAN_SIZE = (
    "The task is to estimate a size, so I look for how far away the object is and what stands beside it.",
    "I have to give a dimension in centimeters; distance and the things around the object give me the scale.",
    "First I clarify the task: a real size is asked for, not the size in the picture.",
)
PLAN_MATCH = (
    "The task is to find one and the same spot of the room in both pictures.",
    "I have to follow a point from the first view into the second, so I look at what it lies on.",
    "The question is about correspondence: which circle shows the spot that is circled in the first image?",
)
DEPTH = ("The {a} is about {d} m away from the camera.", "I estimate a depth of about {d} m at the {a}.")
SCALE = (
    "At the distance of the {a} a tenth of the image height spans about {d} cm.",
    "Where the {a} is, one tenth of the picture's height corresponds to roughly {d} cm.",
)
TALLER = ("The {a} is taller than the {b}.", "Of the two, the {b} is lower than the {a}.")
SIZE = {
    "height": ("From bottom to top the {a} measures about {d} cm.", "The height of the {a} comes to about {d} cm."),
    "length": ("The longer horizontal side of the {a} measures about {d} cm.", "The {a} is about {d} cm long."),
    "width": ("The shorter horizontal side of the {a} measures about {d} cm.", "The {a} is about {d} cm wide."),
}
GREATEST = ("The greatest of the three is what is asked for.", "I take the largest of these three dimensions.")
ON = (
    "The circled point of the first image lies on {a}.",
    "In the first image the circle marks a spot on {a}.",
)
ELSEWHERE = ("In the second image {p} lies on {a}.", "{p} of the second image is on {a}.")
OTHER = ("That is something else, so it is ruled out.", "It cannot be the same spot.", "So this one drops out.")
APART = (
    "{p} is on the same {n}, but about {d} m away from the circled spot.",
    "Although {p} lies on this {n} too, it is about {d} m away from the spot that I look for.",
)
SAME = (
    "{p} lies on that {n} at exactly the circled spot.",
    "The circled spot of the {n} reappears in the second image at {p}.",
)


def sizes(scene: Scene, thing: int, what: str, title: str, rng: np.random.Generator) -> list[Statement]:
    """One dimension, stated directly or as the greatest of three."""
    found = []
    for each in ("height", "length", "width") if what == "greatest" else (what,):
        value = rounded(100 * measure(scene.object(thing), each), 0)
        fact = {"says": "size", "objects": [thing], "what": each, "value": value}
        found.append(Statement(pick(rng, SIZE[each]).format(a=title, d=value), fact))
    if what == "greatest":
        found.append(say(rng, GREATEST))
    return found


def scale(scene: Scene, view: int, thing: int, title: str, rng: np.random.Generator) -> list[Statement]:
    """The distance of an object, the size of the image region around it, and which neighbours are lower or higher."""
    s = claims.sighting(scene, view, thing)
    if s is None:
        return []
    found = []
    if s.span is None:  # the depth was measured
        depth = round(s.depth, 1)
        camera = scene.views[view].camera
        fact = {"says": "depth", "view": view, "point": list(s.point), "depth": s.depth, "value": depth}
        found.append(Statement(pick(rng, DEPTH).format(a=title, d=depth), fact))
        span = round(10 * s.depth * camera.height / camera.fy)
        fact = {"says": "scale", "view": view, "objects": [thing], "value": span}
        found.append(Statement(pick(rng, SCALE).format(a=title, d=span), fact))
    others = [o.object_id for o in nameable(scene, scene.views[view], CONFIG) if o.object_id != thing]
    for other in choose(rng, others, 3):
        name = prose(scene.object(other).name)
        for pair, names in (((thing, other), (title, name)), ((other, thing), (name, title))):
            fact = {"says": "taller", "objects": list(pair)}
            if claims.holds(scene, fact):
                found.append(Statement(pick(rng, TALLER).format(a=names[0], b=names[1]), fact))
    return found


def measurement(scene: Scene, sample: Sample, rng: np.random.Generator) -> tuple[list[Statement], list[Statement]]:
    """Trace of the first question of a measurement row."""
    meta = sample.metadata
    (thing,) = meta["objects"]
    (what,) = meta["what"]
    mark = re.search(r"(\w+) point-1", sample.messages[0]["content"][-1]["text"])
    title = prose(scene.object(thing).name) + (f" ({mark[1]} point-1)" if mark else "")
    meta["titles"] = [title]
    closing = [*scale(scene, meta["view"], thing, title, rng), say(rng, RESTATE)]
    return [say(rng, PLAN_SIZE)], [*closing, *sizes(scene, thing, what, title, rng)]


def correspondence(
    scene: Scene, sample: Sample, rng: np.random.Generator
) -> tuple[list[Statement], list[Statement]] | None:
    """Trace that rules out the wrong points one by one; None without depth and ids."""
    meta = sample.metadata
    first, second = (scene.views[v] for v in meta["views"])
    if sample.answer is None or first.depth is None or first.ids is None or second.depth is None or second.ids is None:
        return None
    thing = int(first.ids[int(meta["point"][1]), int(meta["point"][0])])
    here = meta["point"]
    noun = prose(scene.object(thing).name)
    fact: dict[str, Any] = {"says": "spot", "view": meta["views"][0], "point": here, "objects": [thing]}
    closing = [say(rng, MERGE), *shared(scene, meta["views"], rng, CONFIG), *swing(scene, meta["views"], rng)]
    closing.append(Statement(pick(rng, ON).format(a=article(noun)), fact))
    labels = [name if name.startswith("point-") else f"the {name}" for name in sample.answer["candidates"]]
    right = sample.answer["candidates"].index(sample.answer["value"])
    world = unproject(first.camera, np.array(here), first.depth[int(here[1]), int(here[0])].astype(np.float64))
    for k, (label, spot) in enumerate(zip(labels, meta["spots"], strict=True)):
        if not 0.05 < float(second.depth[int(spot[1]), int(spot[0])]) < np.inf:
            return None  # no depth was measured there, so no distance is known
        around = second.ids[int(spot[1]) - 1 : int(spot[1]) + 2, int(spot[0]) - 1 : int(spot[0]) + 2]
        if (around != around[1, 1]).any():
            return None  # on a sliver or a rim nobody can say which object the spot is on
        other = int(second.ids[int(spot[1]), int(spot[0])])
        if k == right:
            fact = {"says": "same", "views": meta["views"], "points": [here, spot], "objects": [thing]}
            last = Statement(capital(pick(rng, SAME).format(p=label, n=noun)), fact)
        elif other == thing:
            there = unproject(
                second.camera, np.array(spot), second.depth[int(spot[1]), int(spot[0])].astype(np.float64)
            )
            gap = round(float(np.linalg.norm(there - world)), 1)
            if gap < 0.1:
                return None  # a distance does not distinguish these two
            fact = {
                "says": "apart",
                "views": meta["views"],
                "points": [here, spot],
                "objects": [thing],
                "value": gap,
                "tolerance": 0.0501,
            }
            closing.append(Statement(capital(pick(rng, APART).format(p=label, n=noun, d=gap)), fact))
        else:
            name = prose(scene.object(other).name)
            same = name == noun
            fact = {"says": "spot", "view": meta["views"][1], "point": spot, "objects": [other]}
            text = pick(rng, ELSEWHERE).format(p=label, a=f"another {name}" if same else article(name))
            closing += [Statement(capital(text), fact), say(rng, OTHER)]
    return [say(rng, PLAN_MATCH)], [*closing, say(rng, RESTATE), last]
