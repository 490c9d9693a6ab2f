"""Depth comparison: which of the marked objects is nearer to the camera, or their order."""

from __future__ import annotations

import numpy as np
from PIL import Image

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene, Sighting, View
from fastvst.spatial import draw
from fastvst.tasks.common import LETTERS, TaskConfig, apart, canvas, choose, grid_size, nameable, pick, sample, usable

TASK = "depth_comparison"
KIND = "depth"

TWO_POINTS = (
    "Which point is {word} the camera, the {a} point or the {b} point?",
    "Which is {word} the camera: the {a} point or the {b} point?",
    "Of the {a} point and the {b} point, which one is {word} the camera?",
    "The {a} point or the {b} point: which is {word} the camera?",
    "Between the {a} point and the {b} point, which is {word} the camera?",
    "Tell me which point is {word} the camera, {a} point or {b} point.",
)
TWO_OBJECTS = (
    "Between the two objects, {a} ({ca} point) and {b} ({cb} point), which object is {word} the camera?",
    "Which object, {a} ({ca} point) or {b} ({cb} point), is {word} the camera?",
    "Look at the {a} ({ca} point) and the {b} ({cb} point). Which one is {word} the camera?",
    "In this picture, is the {a} ({ca} point) or the {b} ({cb} point) {word} the camera?",
    "Compare the depth of the {a} ({ca} point) and the {b} ({cb} point): which is {word} the camera?",
    "From where the photo was taken, which is {word} the camera, the {a} ({ca} point) or the {b} ({cb} point)?",
    "Decide which of the two marked objects is {word} the camera: {a} ({ca} point), {b} ({cb} point).",
)
ONE_OF_MANY = (
    "{n} {c} points are marked in the image. Which of them is {word} the camera?",
    "Which of the {n} {c} points is {word} the camera?",
    "Look at the {c} points, labelled {list}. Which point is {word} the camera?",
    "Among {list}, which point is {word} the camera?",
    "Find the {c} point that is {word} the camera.",
)
ORDER = (
    "Order the labelled points {list} from {first} to {last} with respect to the camera.",
    "Sort the points {list} by their distance from the camera, {first} first.",
    "Rank the marked points {list} from {first} to {last} as seen from the camera.",
    "List the points {list} in order of depth, from {first} to {last}.",
    "What is the order of the points {list} from {first} to {last}?",
)
BOXES = (
    "Which one in {list} is {word} the camera?",
    "Which of these objects is {word} the camera: {list}?",
    "Given the boxes in pixels, {list}, which object is {word} the camera?",
    "The following objects are given by 2D boxes: {list}. Which is {word} the camera?",
    "Compare {list}. Which one is {word} the camera?",
)
NEAR = ("closer to", "nearer to")
FAR = ("farther from", "further away from")
NEAREST = ("closest to", "nearest to")
FARTHEST = ("farthest from", "most distant from")


def separated(depths: list[float], config: TaskConfig) -> bool:
    """Whether all pairs of depths differ enough; the smallest gap between neighbours in sorted order decides."""
    ordered = np.sort(depths)
    gaps = np.diff(ordered)
    return bool((gaps >= config.depth_gap).all() and (gaps >= config.depth_ratio * ordered[1:]).all())


def ordered_clearly(sightings: list[Sighting], config: TaskConfig) -> bool:
    """Whether the order in depth is sure: between neighbours lies a clear gap, wherever in its span each one is."""
    ordered = sorted(sightings, key=lambda s: s.depth)
    return all(
        b.nearest - a.farthest >= max(config.depth_gap, config.depth_ratio * b.depth)
        for a, b in zip(ordered, ordered[1:], strict=False)
    )


def _marked(
    view: View, pool: list[Sighting], count: int, rng: np.random.Generator, config: TaskConfig, tries: int = 12
) -> list[Sighting] | None:
    """`count` sightings whose dots do not touch and whose depths differ clearly; None if none are found."""
    gap = 4 * draw.radius_of(view.size)
    for _ in range(tries if len(pool) >= count else 0):
        chosen = choose(rng, pool, count)
        far_apart = all(apart(a.point, b.point, gap) for k, a in enumerate(chosen) for b in chosen[:k])
        if far_apart and ordered_clearly(chosen, config):
            return chosen
    return None


def make(scene: Scene, view_index: int, rng: np.random.Generator, config: TaskConfig, index: str) -> Sample | None:
    """One row about one view, or None if no objects are clear enough."""
    if (
        rng.uniform() < config.easy
    ):  # one word only: with a quarter of "farther" the tiny model answered "nearer" to both
        made = _two_points if _spots(scene.views[view_index], config) else _two_objects
        return made(scene, view_index, rng, config, index, near=True)
    form = pick(rng, ("two_points", "two_objects", "one_of_many", "order", "boxes"))
    return _FORMS[form](scene, view_index, rng, config, index)


def _spots(view: View, config: TaskConfig) -> list[Sighting]:
    """Usable sightings whose dot has one known depth.

    Without a depth map a dot on the centre of a box may show what is behind the object (through the legs of a table).
    Then only questions about the objects are asked.
    """
    return [s for s in usable(view, config) if s.nearest == s.farthest]


def _finish(
    scene: Scene,
    view_index: int,
    index: str,
    image: Image.Image,
    question: str,
    reply: str,
    candidates: list[str],
    form: str,
    points: list,
    kind: str = "choice",
    size: tuple[int, int] | None = None,
) -> Sample:
    """`points`: u, v, depth and title of the compared points, for the metadata; `size`: see `common.sample`."""
    answer = {"type": kind, "value": reply, "candidates": candidates}
    metadata = {"form": form, "view": view_index, "points": points}
    return sample(
        scene,
        task=TASK,
        kind=KIND,
        index=index,
        images=[image],
        turns=[(question, reply)],
        answer=answer,
        metadata=metadata,
        size=size,
    )


def _two_points(
    scene: Scene, view_index: int, rng: np.random.Generator, config: TaskConfig, index: str, near: bool | None = None
) -> Sample | None:
    """`near`: the question asks for the nearer point (True) or the farther one (False); None draws it."""
    view = scene.views[view_index]
    chosen = _marked(view, _spots(view, config), 2, rng, config)
    if chosen is None:
        return None
    image = canvas(view)
    # All colours are used: with three, a model loses little when it does not read the question.
    colours = choose(rng, tuple(draw.COLOURS), 2)
    for s, colour in zip(chosen, colours, strict=True):
        draw.dot(image, s.point, colour)
    near = rng.uniform() < 0.5 if near is None else near
    best = (min if near else max)((0, 1), key=lambda k: chosen[k].depth)
    named = [f"{c} point" for c in colours]
    order = rng.permutation(2)
    question = pick(rng, TWO_POINTS).format(
        word=pick(rng, NEAR if near else FAR), a=colours[int(order[0])], b=colours[int(order[1])]
    )
    points = [[*s.point, s.depth, title] for s, title in zip(chosen, named, strict=True)]
    return _finish(scene, view_index, index, image, question, named[best], named, "near" if near else "far", points)


def _two_objects(
    scene: Scene, view_index: int, rng: np.random.Generator, config: TaskConfig, index: str, near: bool | None = None
) -> Sample | None:
    """`near`: as in `_two_points`."""
    view = scene.views[view_index]
    chosen = _marked(view, nameable(scene, view, config), 2, rng, config)
    if chosen is None:
        return None
    image = canvas(view)
    colours = choose(rng, tuple(draw.COLOURS), 2)
    for s, colour in zip(chosen, colours, strict=True):
        draw.dot(image, s.point, colour)
    near = rng.uniform() < 0.5 if near is None else near
    best = (min if near else max)((0, 1), key=lambda k: chosen[k].depth)
    names = [scene.object(s.object_id).name for s in chosen]
    question = pick(rng, TWO_OBJECTS).format(
        word=pick(rng, NEAR if near else FAR), a=names[0], b=names[1], ca=colours[0], cb=colours[1]
    )
    points = [[*s.point, s.depth, name] for s, name in zip(chosen, names, strict=True)]
    return _finish(scene, view_index, index, image, question, names[best], names, "near" if near else "far", points)


def _one_of_many(
    scene: Scene, view_index: int, rng: np.random.Generator, config: TaskConfig, index: str
) -> Sample | None:
    view = scene.views[view_index]
    count = int(rng.integers(3, 5))
    chosen = _marked(view, _spots(view, config), count, rng, config)
    if chosen is None:
        return None
    image = canvas(view)
    colour = pick(rng, tuple(draw.COLOURS))
    labels = [f"point-{k + 1}" for k in range(count)]
    for k, s in enumerate(chosen):
        draw.dot(image, s.point, colour, str(k + 1))
    near = rng.uniform() < 0.5
    best = (min if near else max)(range(count), key=lambda k: chosen[k].depth)
    question = pick(rng, ONE_OF_MANY).format(
        n=("Three", "Four")[count - 3], c=colour, word=pick(rng, NEAREST if near else FARTHEST), list=", ".join(labels)
    )
    question = question.replace("the Three", "the three").replace("the Four", "the four")
    points = [[*s.point, s.depth, label] for s, label in zip(chosen, labels, strict=True)]
    return _finish(scene, view_index, index, image, question, labels[best], labels, "near" if near else "far", points)


def _order(scene: Scene, view_index: int, rng: np.random.Generator, config: TaskConfig, index: str) -> Sample | None:
    view = scene.views[view_index]
    for count in (int(rng.integers(3, 6)), 3):
        chosen = _marked(view, _spots(view, config), count, rng, config)
        if chosen is not None:
            break
    else:
        return None
    image = canvas(view)
    colour = pick(rng, tuple(draw.COLOURS))
    letters = list(LETTERS[:count])
    for letter, s in zip(letters, chosen, strict=True):
        draw.dot(image, s.point, colour, letter)
    near = rng.uniform() < 0.5
    ranked = sorted(range(count), key=lambda k: chosen[k].depth, reverse=not near)
    ends = ("nearest", "farthest") if near else ("farthest", "nearest")
    question = pick(rng, ORDER).format(list=", ".join(letters), first=ends[0], last=ends[1])
    reply = ", ".join(letters[k] for k in ranked)
    points = [[*s.point, s.depth, letter] for s, letter in zip(chosen, letters, strict=True)]
    return _finish(
        scene, view_index, index, image, question, reply, letters, "order_near" if near else "order_far", points, "text"
    )


def _boxes(scene: Scene, view_index: int, rng: np.random.Generator, config: TaskConfig, index: str) -> Sample | None:
    view = scene.views[view_index]
    chosen = _marked(view, usable(view, config), int(rng.integers(2, 4)), rng, config)
    if chosen is None:
        return None
    # this form compares whole objects: box centres and marked pixels must agree
    centre = scene.boxes_in_view(view, [s.object_id for s in chosen])[:, 2]
    dots = [s.depth for s in chosen]
    if not separated(list(centre), config) or list(np.argsort(centre)) != list(np.argsort(dots)):
        return None
    base = [scene.object(s.object_id).name for s in chosen]
    titles = [name if base.count(name) == 1 else f"{name}-{LETTERS[k]}" for k, name in enumerate(base)]
    near = rng.uniform() < 0.5
    best = int(np.argmin(dots) if near else np.argmax(dots))
    image = canvas(view)
    size = grid_size(*image.size)
    scale = np.array([size[0] / image.width, size[1] / image.height] * 2)
    boxes = [[round(float(x)) for x in np.array(s.box_2d) * scale] for s in chosen]
    parts = [f"{title} (bbox_2d: [{','.join(map(str, box))}])" for title, box in zip(titles, boxes, strict=True)]
    question = pick(rng, BOXES).format(
        list=", ".join(parts[:-1]) + " and " + parts[-1],
        word=pick(rng, (NEAR if near else FAR) if len(parts) == 2 else (NEAREST if near else FARTHEST)),
    )
    points = [[*s.point, s.depth, title] for s, title in zip(chosen, titles, strict=True)]
    form = "near" if near else "far"
    return _finish(scene, view_index, index, image, question, titles[best], titles, form, points, size=size)


_FORMS = {
    "two_points": _two_points,
    "two_objects": _two_objects,
    "one_of_many": _one_of_many,
    "order": _order,
    "boxes": _boxes,
}
