"""Correspondence: find the circled point of image 1 among labelled circles in image 2.

The true point comes from reprojection with a depth check. The circles of image 2 have four different colours: a small
vision tower reads a colour where it cannot read a digit.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene, View
from fastvst.spatial import draw
from fastvst.spatial.camera import project, unproject
from fastvst.tasks.common import LETTERS, TaskConfig, canvas, choice, choose, listed, pick, sample

TASK = "correspondence"
KIND = "correspondence"
RIM = 0.07  # share of the image side kept free of points
RING = 0.2  # width of the ring of wrong spots over the distance of the right one
STEEP = 0.1  # metres of depth across three pixels

COLOUR_FORM = (
    "A point is circled in {c} in the first image. Which circle of the second image shows the same point: {list}?",
    "Which circle in image 2 corresponds to the {c} circle in image 1: {list}?",
    "The {c} circle of image 1 marks a point. Which circle of image 2 marks the same one, {list}?",
    "Two views of one room: which circle of the second view, {list}, shows the spot circled in {c} in the first?",
    "Match the {c} circle of the first view with one circle of the second view: {list}.",
)
FREE = (
    "A point is circled in {c} in the first image. Which of the points labelled 1-4 in the second image is the same?",
    "The first image has a point circled in {c}. Find the same point among points 1-4 of the second image.",
    "Which labelled point in image 2 corresponds to the {c} circle in image 1?",
    "Image 1 marks one point with a {c} circle. Which of point-1 to point-4 in image 2 matches it?",
    "Match the {c} circled point of the first view with one of the four labelled points of the second view.",
    "Two views of one room: which point of the second view is the one circled in {c} in the first?",
    "Look for the {c} circled point of image 1 in image 2. Which label does it have there?",
    "Which of the four labelled circles in image 2 shows the spot circled in {c} in image 1?",
    "Where did the {c} circled point of the first image go in the second image: point-1, point-2, point-3 or point-4?",
    "Identify the point of the second image that corresponds to the {c} circle in the first.",
)
CHOICE = (
    "A point is circled in {c} in the first image. Which point of the second image corresponds to it? {options}",
    "Select the point in image 2 that matches the {c} circled point in image 1. {options}",
    "Which option is the same 3D point as the {c} circle in the first view? {options}",
    "Match the {c} circle of the first image to a labelled point of the second image. {options}",
    "The point circled in {c} in image 1 appears again in image 2. Choose its label. {options}",
)


def visible_points(view: View, rng: np.random.Generator, count: int) -> np.ndarray:
    """Random pixels (N <= count, 2) that show an object, as pixel centres, away from the image's border."""
    flat = _inner_pixels(view)
    if len(flat) == 0:
        return np.zeros((0, 2))
    k = rng.choice(len(flat), size=min(count, len(flat)), replace=False)
    rows, columns = np.divmod(flat[k], view.camera.width)
    return np.stack([columns + 0.5, rows + 0.5], 1)


@lru_cache(maxsize=2)
def _inner_pixels(view: View) -> np.ndarray:
    """Flat indices of the pixels that show an object, away from the image's border; kept for the next question."""
    if view.ids is None:
        return np.zeros(0, int)
    h, w = view.ids.shape
    rows = slice(math.floor(RIM * h) + 1, math.ceil((1 - RIM) * h))
    columns = slice(math.floor(RIM * w) + 1, math.ceil((1 - RIM) * w))
    inner = np.zeros((h, w), bool)
    inner[rows, columns] = view.ids[rows, columns] > 0
    return np.flatnonzero(inner)


def match(first: View, second: View, point: np.ndarray, config: TaskConfig) -> np.ndarray | None:
    """Place of a pixel (2,) of the first view in the second; None if it is hidden, out of view or ambiguous there."""
    assert first.depth is not None and second.depth is not None and first.ids is not None and second.ids is not None
    row = int(point[1])
    column = int(point[0])
    world = unproject(first.camera, point, first.depth[row, column].astype(np.float64))
    there, depth = project(second.camera, world)
    h, w = second.depth.shape
    if depth <= 0.1 or not (RIM * w < there[0] < (1 - RIM) * w and RIM * h < there[1] < (1 - RIM) * h):
        return None
    r = int(there[1])
    c = int(there[0])
    # the 3 x 3 neighbourhood must show one object in both images, so that rounding does not matter
    same_1 = first.ids[row - 1 : row + 2, column - 1 : column + 2] == first.ids[row, column]
    same_2 = second.ids[r - 1 : r + 2, c - 1 : c + 2] == first.ids[row, column]
    if not (same_1.all() and same_2.all()):
        return None
    # The surface must not be seen edge-on: the point is then no clear spot, and about one rasterised pixel in ten
    # million has a depth that is centimetres off (the plane of a sliver, extrapolated to the pixel's centre).
    near_1 = first.depth[row - 1 : row + 2, column - 1 : column + 2]
    near_2 = second.depth[r - 1 : r + 2, c - 1 : c + 2]
    if max(float(np.ptp(near_1)), float(np.ptp(near_2))) > STEEP:
        return None
    return there if abs(float(second.depth[r, c]) - float(depth)) < config.consistency else None


def wrong_spots(
    view: View, point: np.ndarray, there: np.ndarray, apart: float, rng: np.random.Generator
) -> list[np.ndarray] | None:
    """Three wrong spots (2,) of the second view, `apart` pixels from each other and the right one; None if none fit.

    They are about as far as the right spot `there` from the place that the point has in the first image, in other
    directions. Otherwise the distance would tell: the nearest of four random circles is right in 60 % of the rows, and
    with a random rank a circle close to that place is right in 35 %. The ring that holds all four is as often mostly
    inside the right spot as outside it.
    """
    others = visible_points(view, rng, 4000)
    moved = float(np.linalg.norm(there - point))
    gaps = np.linalg.norm(others - point, axis=1)
    wide = max(RING * moved, 4.0)
    inner = moved - wide * float(rng.uniform())
    found: list[np.ndarray] = []
    left = others[(gaps >= inner) & (gaps <= inner + wide)]
    left = left[np.hypot(*(left - there).T) >= apart]
    while len(found) < 3 and len(left):
        found.append(left[0])
        left = left[np.hypot(*(left - left[0]).T) >= apart]
    return found if len(found) == 3 else None


def make(
    scene: Scene, pair: tuple[int, int, str], rng: np.random.Generator, config: TaskConfig, index: str
) -> Sample | None:
    """One row about a pair of views with depth, or None."""
    first = scene.views[pair[0]]
    second = scene.views[pair[1]]
    if first.depth is None or second.depth is None:
        return None
    apart = max(config.distractor * second.camera.width, 4 * draw.radius_of(second.size))
    for point in visible_points(first, rng, 40):
        there = match(first, second, point, config)
        wrong = None if there is None else wrong_spots(second, point, there, apart, rng)
        if wrong is not None:
            break
    else:
        return None
    assert there is not None
    place = int(rng.integers(4))
    order = [*wrong[:place], there, *wrong[place:]]
    form = "colour" if rng.uniform() < config.easy else pick(rng, ("number", "choice"))
    colour, *colours = choose(rng, tuple(draw.COLOURS), 5)
    labels = {"colour": [""] * 4, "number": ["1", "2", "3", "4"], "choice": list(LETTERS[:4])}[form]
    one = canvas(first)
    two = canvas(second)
    draw.circle(one, (float(point[0]), float(point[1])), colour)
    for label, spot, other_colour in zip(labels, order, colours, strict=True):
        draw.circle(two, (float(spot[0]), float(spot[1])), other_colour, label)
    if form == "colour":
        names = [f"{name} circle" for name in colours]
        question = pick(rng, COLOUR_FORM).format(c=colour, list=listed([f"the {name}" for name in names], "or"))
        reply = names[place]
    elif form == "number":
        names = [f"point-{label}" for label in labels]
        question = pick(rng, FREE).format(c=colour)
        reply = names[place]
    else:
        names = [f"point-{label}" for label in labels]
        options = " ".join(f"{label}. {name}" for label, name in zip(labels, names, strict=True))
        question = pick(rng, CHOICE).format(c=colour, options=options)
        reply = f"{labels[place]} {names[place]}"
    return sample(
        scene,
        task=TASK,
        kind=KIND,
        index=index,
        images=[one, two],
        turns=[(question, reply)],
        answer=choice(names[place], names, lettered=form == "choice"),
        metadata={
            "form": form,
            "views": list(pair[:2]),
            "pair": pair[2],
            "point": [float(x) for x in point],
            "spots": [[float(x) for x in spot] for spot in order],
        },
    )
