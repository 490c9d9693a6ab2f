"""Scene caption of one image: names, depths and distances of marked objects, in prose."""

from __future__ import annotations

import numpy as np

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene, Sighting, View
from fastvst.spatial import draw
from fastvst.spatial.boxes import box_distance
from fastvst.tasks.common import (
    TaskConfig,
    apart,
    article,
    canvas,
    choose,
    fits_another,
    listed,
    pick,
    prose,
    sample,
    usable,
)
from fastvst.tasks.facts import Statement, answer_of

TASK = "scene_caption"
KIND = "caption"

PHRASES = (
    "Describe the scene with a focus on {points}.",
    "Describe this picture, paying attention to {points}. Give depths and distances in meters.",
    "Write a caption of the scene that covers {points}, with their depths and the distances between them.",
    "What does the picture show around {points}? Include metric depths and distances.",
    "Give a detailed spatial description of {points}.",
    "Please describe the spatial layout of {points} in this scene.",
    "Explain where {points} are, how deep they lie and how far apart they are.",
    "Caption this image with the 3D layout of {points}.",
    "Focus on {points} and describe the scene in words and meters.",
    "Tell me about {points}: depth, position in the picture and distances from each other.",
)
OPENING = (
    "The picture shows {things}.",
    "In this scene there are {things}.",
    "Among the things in this room are {things}.",
    "We see {things}.",
)
DEPTH = (
    "The {a} is at a depth of {d:.2f}m{side}.",
    "At a depth of {d:.2f}m{side} there is the {a}.",
    "The {a} lies {d:.2f}m deep in the scene{side}.",
    "Measured along the viewing direction, the {a} is {d:.2f}m away{side}.",
)
DISTANCE = (
    "The {a} is {d:.2f}m away from the {b}, measured between their nearest surfaces.",
    "Between the nearest surfaces of the {a} and the {b} there are {d:.2f}m.",
    "From the {a} it is {d:.2f}m to the {b} at the closest.",
    "The gap between the {a} and the {b} measures {d:.2f}m.",
)
TALL = ("The {a} is {d:.2f}m tall.", "The height of the {a} is {d:.2f}m.", "The {a} has a height of {d:.2f}m.")
NEARER = (
    "The {a} is closer to the camera than the {b}.",
    "Of the two, the {a} is nearer to the camera than the {b}.",
    "The {b} is farther from the camera than the {a}.",
)
SIDE = {"left": " on the left", "middle": " in the middle of the picture", "right": " on the right"}


def third(view: View, point: tuple[float, float]) -> str | None:
    """left, middle or right third of the image; None within 4 % of the image width of a border."""
    u = point[0] / view.camera.width
    if min(abs(u - 1 / 3), abs(u - 2 / 3)) < 0.04:
        return None
    return "left" if u < 1 / 3 else "middle" if u < 2 / 3 else "right"


def opening(scene: Scene, view: View, config: TaskConfig, rng: np.random.Generator, most: int = 5) -> Statement | None:
    """Clearly visible classes, at most `most`; plural where two or more objects are clearly visible."""
    count: dict[str, int] = {}
    for s in usable(view, config):
        name = scene.object(s.object_id).name
        count[name] = count.get(name, 0) + 1
    names = choose(rng, sorted(name for name in count if not fits_another(name, count)), most)
    if not names:
        return None
    words = [article(name) if count[name] == 1 else f"more than one {prose(name)}" for name in names]
    fact = {"says": "seen", "titles": names, "several": [name for name in names if count[name] > 1]}
    return Statement(pick(rng, OPENING).format(things=listed(words)), fact)


def make(scene: Scene, view_index: int, rng: np.random.Generator, config: TaskConfig, index: str) -> Sample | None:
    """One row about two to four marked objects of one view, or None."""
    view = scene.views[view_index]
    image = canvas(view)
    gap = 4 * draw.radius_of(image.size)
    chosen: list[Sighting] = []
    wanted = int(rng.integers(2, 5))
    for s in choose(rng, usable(view, config), 100):
        if len(chosen) < wanted and all(apart(s.point, other.point, gap) for other in chosen):
            chosen.append(s)
    first = opening(scene, view, config, rng)
    if len(chosen) < 2 or first is None:
        return None
    colours = choose(rng, tuple(draw.COLOURS), len(chosen))
    titles = []
    for k, (s, colour) in enumerate(zip(chosen, colours, strict=True)):
        draw.dot(image, s.point, colour, str(k + 1))
        titles.append(f"{scene.object(s.object_id).name} ({colour} point-{k + 1})")
    body: list[Statement] = []
    for s, title in zip(chosen, titles, strict=True):
        if s.span is not None:  # its depth was not measured
            continue
        side = third(view, s.point)
        fact = {"says": "depth", "titles": [title], "value": round(s.depth, 2), "point": list(s.point), "side": side}
        text = pick(rng, DEPTH).format(a=title, d=s.depth, side=SIDE[side] if side else "")
        body.append(Statement(text, fact))
    for k in range(1, len(chosen)):
        body += _pair(scene, view, rng, config, (chosen[k - 1], chosen[k]), (titles[k - 1], titles[k]))
    k = int(rng.integers(len(chosen)))
    height = scene.object(chosen[k].object_id).height
    fact = {"says": "height", "titles": [titles[k]], "value": round(height, 2), "objects": [chosen[k].object_id]}
    body.append(Statement(pick(rng, TALL).format(a=titles[k], d=height), fact))
    statements = [first, *body]
    points = [f"the {colour} point-{k + 1}" for k, colour in enumerate(colours)]
    return sample(
        scene,
        task=TASK,
        kind=KIND,
        index=index,
        images=[image],
        turns=[(pick(rng, PHRASES).format(points=listed(points)), " ".join(s.text for s in statements))],
        answer=answer_of(statements),
        metadata={"form": "metric", "view": view_index, "objects": [s.object_id for s in chosen], "titles": titles},
    )


def _pair(
    scene: Scene,
    view: View,
    rng: np.random.Generator,
    config: TaskConfig,
    two: tuple[Sighting, Sighting],
    titles: tuple[str, str],
) -> list[Statement]:
    """The distance of two objects, and which one is nearer to the camera where that is clear."""
    ids = [s.object_id for s in two]
    boxes = [scene.object(i).box for i in ids]
    gap = box_distance(*boxes)
    found = []
    if gap >= config.min_distance:
        fact = {"says": "distance", "titles": list(titles), "value": round(gap, 2), "objects": ids}
        found.append(Statement(pick(rng, DISTANCE).format(a=titles[0], b=titles[1], d=gap), fact))
    order = sorted((0, 1), key=lambda k: two[k].depth)
    near = two[order[0]]
    far = two[order[1]]
    centre = scene.boxes_in_view(view, ids)[:, 2]
    margin = max(config.depth_gap, config.depth_ratio * far.depth)
    if far.nearest - near.farthest >= margin and centre[order[1]] - centre[order[0]] >= margin:
        pair = [titles[order[0]], titles[order[1]]]
        fact = {"says": "nearer", "titles": pair, "objects": [ids[order[0]], ids[order[1]]]}
        found.append(Statement(pick(rng, NEARER).format(a=pair[0], b=pair[1]), fact))
    return found
