"""Object-object relation across views: eight compass directions, one of them given, or directions from one camera."""

from __future__ import annotations

import numpy as np

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene, Sighting
from fastvst.spatial import draw
from fastvst.tasks.angles import COMPASS, clear_direction, clockwise, sector, spot
from fastvst.tasks.common import TaskConfig, apart, canvas, choice, choose, distractors, mcq, pick, sample, usable

TASK = "object_object"
KIND = "multi_image"
TRIES = 200

OBJECTS = (
    "The {a} is {given} of the {b}. In which direction is the {c} from the {b}?",
    "Suppose the {a} is {given} of the {b}. Where is the {c} relative to the {b}?",
    "Seen from the {b}, the {a} lies to the {given}. In which direction does the {c} lie from the {b}?",
    "If you stand at the {b}, the {a} is in the {given}. Which direction is the {c} from there?",
    "Take the direction from the {b} to the {a} as {given}. What is the direction from the {b} to the {c}?",
    "The two pictures show one room. Going from the {b} to the {a} means going {given}. Which way is it from the "
    "{b} to the {c}?",
    "Assume that the {a} is {given} of the {b}. Name the compass direction of the {c} as seen from the {b}.",
    "From the {b}, the {a} is {given}. From the {b}, where is the {c}?",
    "With the {a} being {given} of the {b}, in what direction from the {b} do you find the {c}?",
    "In this room the {a} is to the {given} of the {b}. To which side of the {b} is the {c}?",
)
CAMERA = (
    "When I took image {k}, the {a} was to the {given} of me. In which direction was the {c} from where I stood?",
    "At the position of camera {k}, the direction toward the {a} is {given}. Where is the {c} relative to me?",
    "I am standing at camera {k} and the {a} is {given} of me. In which direction is the {c} relative to me?",
    "From where image {k} was taken, the {a} lies to the {given}. In which direction does the {c} lie from there?",
    "Suppose that, seen from the camera of image {k}, the {a} is in the {given}. Where is the {c} from that camera?",
    "Let the direction from the camera of image {k} to the {a} be {given}. What is the direction from that camera to "
    "the {c}?",
    "Standing where image {k} was taken, I have the {a} in the {given}. Which direction is the {c} from me?",
    "For the photographer of image {k}, the {a} is {given}. Where is the {c} for the photographer?",
)
OPTIONS = ("{question} Options: {options}", "{question} {options}", "{question} Choose from: {options}")
FREE = (
    "{question} Answer with one of the eight compass directions.",
    "{question} Use one of: north, northeast, east, southeast, south, southwest, west, northwest.",
    "{question}",
)

Marked = tuple[Sighting, int]  # a sighting, and the image of the pair (0 or 1) that holds its dot


def candidates(scene: Scene, pair: tuple[int, int, str], rng: np.random.Generator, config: TaskConfig) -> list[Marked]:
    """Every object that is usable in at least one image of the pair, once, with the image that can mark it."""
    places: dict[int, list[Marked]] = {}
    for image, view in enumerate(pair[:2]):
        for s in usable(scene.views[view], config):
            places.setdefault(s.object_id, []).append((s, image))
    return [pick(rng, places[object_id]) for object_id in sorted(places)]


def in_one_view(scene: Scene, pair: tuple[int, int, str], ids: list[int]) -> bool:
    """Whether one image shows all of these objects: the other image is then not needed."""
    return any(set(ids) <= {s.object_id for s in scene.views[k].sightings} for k in pair[:2])


def relation(origin: np.ndarray, anchor: np.ndarray, target: np.ndarray, given: int) -> int | None:
    """Compass sector of `target` seen from `origin` (all (2,) floor points) when that of `anchor` is `given`."""
    if not (clear_direction(origin, anchor) and clear_direction(origin, target)):
        return None
    turned = sector(clockwise(anchor - origin, target - origin), 8)
    return None if turned is None else (given + turned) % 8


def _clear_choice(
    scene: Scene,
    pair: tuple[int, int, str],
    pool: list[Marked],
    rng: np.random.Generator,
    *,
    count: int,
    eye: int,
    given: int,
) -> tuple[list[Marked], int] | None:
    """`count` marked objects and the compass sector that answers the question; None if no try fits.

    The observer is the camera of image `eye`, or the third object for eye = -1. The turn from the given direction to
    the answer is chosen before the objects: otherwise one step on is right in 40 % of the rows.
    """
    gap = 4 * draw.radius_of(scene.views[pair[0]].size)
    wanted = (given + int(rng.integers(8))) % 8
    for _ in range(TRIES if len(pool) >= count else 0):
        chosen = choose(rng, pool, count)
        ids = [s.object_id for s, _ in chosen]
        names = [scene.object(i).name for i in ids]
        touching = any(
            p == q and not apart(s.point, t.point, gap) for k, (s, p) in enumerate(chosen) for t, q in chosen[:k]
        )
        if touching or len(set(names)) < count or in_one_view(scene, pair, ids):
            continue
        origin = spot(scene, ids[2]) if eye < 0 else scene.views[pair[:2][eye]].camera.position[:2]
        place = relation(origin, spot(scene, ids[0]), spot(scene, ids[1]), given)
        if place == wanted:
            return chosen, place
    return None


def make(
    scene: Scene, pair: tuple[int, int, str], rng: np.random.Generator, config: TaskConfig, index: str
) -> Sample | None:
    """One row about a pair of views, neither of which shows all objects of the question; or None."""
    if pair[2] == "motion":
        return None
    pool = candidates(scene, pair, rng, config)
    by_camera = bool(rng.uniform() < 0.4)
    count, eye = (2, int(rng.integers(2))) if by_camera else (3, -1)
    given = int(rng.integers(8))
    found = _clear_choice(scene, pair, pool, rng, count=count, eye=eye, given=given)
    if found is None:
        return None
    chosen, place = found
    ids = [s.object_id for s, _ in chosen]
    names = [scene.object(i).name for i in ids]
    images = [canvas(scene.views[k]) for k in pair[:2]]
    colours = choose(rng, tuple(draw.COLOURS), count)
    for (s, image), colour in zip(chosen, colours, strict=True):
        draw.dot(images[image], s.point, colour)
    titles = [f"{name} ({colour} point)" for name, colour in zip(names, colours, strict=True)]
    fields = {"given": COMPASS[given], "a": titles[0], "c": titles[1]}
    if by_camera:
        question = pick(rng, CAMERA).format(k=eye + 1, **fields)
    else:
        question = pick(rng, OBJECTS).format(b=titles[2], **fields)
    right = COMPASS[place]
    free = bool(rng.uniform() < config.easy)
    if free:
        question = pick(rng, FREE).format(question=question)
        reply = right
        options = list(COMPASS)
    else:
        line, reply, options = mcq(rng, right, distractors(rng, right, COMPASS, 3))
        question = pick(rng, OPTIONS).format(question=question, options=line)
    return sample(
        scene,
        task=TASK,
        kind=KIND,
        index=index,
        images=images,
        turns=[(question, reply)],
        answer=choice(right, options, lettered=not free),
        metadata={
            "form": "free" if free else "choice",
            "anchor": "camera" if by_camera else "object",
            "views": list(pair[:2]),
            "eye": eye,
            "objects": ids,
            "given": COMPASS[given],
            "titles": titles,
            "colours": colours,
            "marks": [[image, *s.point] for s, image in chosen],
        },
    )
