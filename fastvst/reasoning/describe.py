"""Sentences about one view of a scene, or about what two views share, each with its claim (see claims.py)."""

from __future__ import annotations

import numpy as np

from fastvst.reasoning import claims
from fastvst.scenes.scene import Scene
from fastvst.spatial.boxes import box_distance
from fastvst.tasks.angles import clockwise, heading
from fastvst.tasks.common import TaskConfig, article, choose, listed, nameable, pick, prose
from fastvst.tasks.facts import Statement

SEEN = (
    "{where} shows {things}.",
    "In {where_low} I can make out {things}.",
    "Looking at {where_low}, I find {things}.",
    "{where} contains {things}.",
)
SIDE = {
    "left": ("The {a} is on the left side of the image.", "On the left there is the {a}."),
    "middle": ("The {a} is in the middle of the image.", "Near the middle, as seen from left to right, is the {a}."),
    "right": ("The {a} is on the right side of the image.", "On the right there is the {a}."),
}
RANGE = {
    "near": ("The {a} is close to the camera.", "The {a} is right in front, within a step or two."),
    "middle": ("The {a} stands at a middle distance.", "The {a} is a few steps away."),
    "far": ("The {a} is in the background.", "The {a} is far from the camera, well into the room."),
}
LEFT_OF = (
    "The {a} appears to the left of the {b}.",
    "In this image the {b} is to the right of the {a}.",
    "Going from left to right, the {a} comes before the {b}.",
)
NEARER = (
    "The {a} is closer to the camera than the {b}.",
    "The {b} lies deeper in the scene than the {a}.",
    "Compared with the {b}, the {a} is nearer to me.",
)
ON = ("The {a} stands on the {b}.", "The {b} carries the {a}.")
WALL = ("The {a} is placed against a wall.", "There is a wall right beside the {a}.")
GAP = (
    "The {a} and the {b} are roughly {d} m apart.",
    "Between the {a} and the {b} I estimate a gap of about {d} m.",
)
TALL = ("The {a} looks about {d} cm tall.", "I would put the height of the {a} at roughly {d} cm.")
BOTH = (
    "{things} can be seen in both images, which ties the two views together.",
    "Both images show {things}, so I can relate one view to the other.",
    "Common to the two images: {things}.",
)

LOOK = (
    "From the first to the second image the viewing direction swings to the {way} by about {d} degrees.",
    "The second camera looks about {d} degrees further to the {way} than the first.",
)
MERGE = (
    "Now I join the two views into one layout of the room.",
    "Next I put both views together.",
    "With this in mind I merge the two pictures into a single room.",
)
RESTATE = (
    "Now back to the question.",
    "Let me restate the question with this layout.",
    "Now I can answer what was asked.",
)


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def say(rng: np.random.Generator, bank: tuple[str, ...]) -> Statement:
    """A sentence that claims nothing about the scene."""
    return Statement(pick(rng, bank), {"says": "plan"})


def swing(scene: Scene, views: list[int], rng: np.random.Generator) -> list[Statement]:
    """The difference of the viewing directions of two views, where it is clear."""
    turned = clockwise(*(heading(scene.views[v].camera) for v in views))
    degrees, way = claims.about(turned)
    if not 10 <= degrees <= 170:
        return []
    fact = {"says": "look", "views": views, "way": "right" if way == "clockwise" else "left", "value": degrees}
    return [Statement(pick(rng, LOOK).format(way=fact["way"], d=degrees), fact)]


def names_in(scene: Scene, view: int, config: TaskConfig) -> dict[int, str]:
    """Objects of a view that their class name alone identifies: id -> name."""
    return {s.object_id: prose(scene.object(s.object_id).name) for s in nameable(scene, scene.views[view], config)}


def view_sentences(
    scene: Scene, view: int, where: str, titles: dict[int, str], rng: np.random.Generator, config: TaskConfig
) -> list[Statement]:
    """All sentences about one view, in reading order: the objects, their places, their arrangement.

    Args:
        where: how the text calls the image ("The first image").
        titles: other names for some objects ("bed (red point)").
    """
    known = names_in(scene, view, config)
    known |= {i: title for i, title in titles.items() if claims.clear(scene, view, i)}
    asked = [i for i in titles if i in known]  # objects of the question come first
    ids = asked + choose(rng, sorted(set(known) - set(asked)), 7 - len(asked))
    if not ids:
        return []
    things = listed([article(known[i]) for i in ids])
    low = where[0].lower() + where[1:]
    first = Statement(
        pick(rng, SEEN).format(where=where, where_low=low, things=things),
        {"says": "seen", "view": view, "objects": ids},
    )
    return [first, *_single(scene, view, ids, known, rng), *_double(scene, view, ids, known, rng)]


def _single(
    scene: Scene, view: int, ids: list[int], known: dict[int, str], rng: np.random.Generator
) -> list[Statement]:
    found = []
    for i in ids:
        base = {"view": view, "objects": [i]}
        side = claims.side_of(scene, view, i)
        far = claims.range_of(scene, view, i)
        if side is not None:
            found.append(Statement(pick(rng, SIDE[side]).format(a=known[i]), {"says": "side", "word": side, **base}))
        if far is not None and rng.uniform() < 0.7:
            found.append(Statement(pick(rng, RANGE[far]).format(a=known[i]), {"says": "range", "word": far, **base}))
        elif claims.at_wall(scene, i):
            found.append(Statement(pick(rng, WALL).format(a=known[i]), {"says": "wall", **base}))
        tall = 10 * round(10 * scene.object(i).height)
        if tall >= 20 and rng.uniform() < 0.25:
            fact = {"says": "tall", "value": tall, **base}
            found.append(Statement(pick(rng, TALL).format(a=known[i], d=tall), fact))
    return found


def _double(
    scene: Scene, view: int, ids: list[int], known: dict[int, str], rng: np.random.Generator
) -> list[Statement]:
    found = []
    for k, a in enumerate(ids):
        for b in ids[:k]:
            for one, two in ((a, b), (b, a)):
                names = {"a": known[one], "b": known[two]}
                base = {"view": view, "objects": [one, two]}
                if claims.on_top(scene, one, two):
                    found.append(Statement(pick(rng, ON).format(**names), {"says": "on", **base}))
                elif claims.left_of(scene, view, one, two) and rng.uniform() < 0.4:
                    found.append(Statement(pick(rng, LEFT_OF).format(**names), {"says": "left_of", **base}))
                if claims.nearer(scene, view, one, two) and rng.uniform() < 0.4:
                    found.append(Statement(pick(rng, NEARER).format(**names), {"says": "nearer", **base}))
    for k in range(1, len(ids)):
        pair = [ids[k - 1], ids[k]]
        gap = claims.rounded_gap(box_distance(*(scene.object(i).box for i in pair)))
        if gap >= 0.2 and rng.uniform() < 0.5:
            fact = {"says": "gap", "objects": pair, "value": gap, "tolerance": claims.gap_tolerance(gap)}
            found.append(Statement(pick(rng, GAP).format(a=known[pair[0]], b=known[pair[1]], d=f"{gap:g}"), fact))
    return found


def shared(scene: Scene, views: list[int], rng: np.random.Generator, config: TaskConfig) -> list[Statement]:
    """Objects that both views show clearly, if there are any."""
    first, second = (names_in(scene, v, config) for v in views)
    ids = choose(rng, sorted(set(first) & set(second)), 4)
    if not ids:
        return []
    text = capital(pick(rng, BOTH).format(things=listed([f"the {first[i]}" for i in ids])))
    return [Statement(text, {"says": "both", "views": views, "objects": ids})]
