"""What general questions ask about: marks drawn on an image, the names and colours of what they mark, places in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from fastvst.scenes.scene import Scene, View
from fastvst.spatial import draw
from fastvst.tasks.common import TaskConfig, apart, choose, usable

SIZE = (168, 112)  # width, height: 24 tokens; what the settings of examples/sft.py make of 320 x 240
GRID = 7  # pixels of SIZE, a quarter of a token: coordinates are multiples of it, so that no digit is noise
NEAR_ENOUGH = 14.0  # pixels of SIZE, half a token: how far a stated place may be off
SHAPES = ("point", "circle", "box")
# Asked about where they are not shown; all are frequent.
CLASSES = (
    *("chair", "window", "cabinet", "plant", "sofa", "floor lamp", "dresser", "door", "shelves", "crate"),
    *("table", "desk", "lamp", "television", "vase", "stool", "curtain", "speaker", "monitor", "trash can"),
    *("fan", "armchair", "bench", "barrel", "refrigerator", "bookshelf", "teddy bear", "guitar", "bed"),
    *("bathtub", "toilet", "piano", "picture"),
)
# Names of surface colours, sRGB; a surface that is not clearly nearest to one of them gets no question.
SURFACES = {
    "white": (235, 235, 230),
    "grey": (140, 140, 140),
    "black": (25, 25, 25),
    "brown": (110, 70, 40),
    "beige": (205, 185, 150),
    "red": (170, 40, 40),
    "orange": (215, 125, 50),
    "yellow": (215, 195, 80),
    "green": (80, 125, 70),
    "blue": (70, 100, 160),
    "purple": (115, 80, 130),
    "pink": (210, 150, 160),
}
MOST_BOXES = 3
FEW = {1: 0.15, 2: 0.35, 3: 0.25, 4: 0.25}  # how many marks an image has, with which probability
MANY = {3: 0.1, 4: 0.2, 5: 0.3, 6: 0.2, 7: 0.2}
CLEAR = 0.75  # of the distance to the second nearest colour


@dataclass(frozen=True)
class Turn:
    """A question and its reply.

    `facts`: what the reply tells. A conversation never asks for a fact that an earlier turn told: the answer would be
    in its text. `answer`: the checkable form, or None.
    """

    skill: str
    question: str
    reply: str
    facts: frozenset[str]
    answer: dict[str, Any] | None


@dataclass(frozen=True)
class Mark:
    """A drawn mark: its shape, its colour, its centre in pixels of the view, its box there, the class of the object
    there (None: none, or not clear), and the name of the colour of the surface."""

    shape: str
    colour: str
    at: tuple[float, float]
    box: tuple[float, float, float, float] | None
    name: str | None
    surface: str | None

    @property
    def title(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Look:
    """One image with its marks. `where` ends a phrase: "", or " in image 1" where there are two."""

    scene: Scene
    view: View
    marks: tuple[Mark, ...]
    where: str = ""

    def place(self, at: Sequence[float]) -> tuple[int, int]:
        """Pixels of `SIZE`, the nearest multiples of `GRID`."""
        x = at[0] * SIZE[0] / self.view.camera.width
        y = at[1] * SIZE[1] / self.view.camera.height
        return GRID * round(x / GRID), GRID * round(y / GRID)

    def fact(self, *parts: str) -> str:
        return " ".join((*parts, self.where))


# ---------------------------------------------------------------------------------------------------------------------
# Marks


def surface_at(view: View, at: tuple[float, float]) -> str | None:
    """The name of the colour around a place, None where it is not clear."""
    u = int(at[0])
    v = int(at[1])
    patch = view.image[max(0, v - 3) : v + 4, max(0, u - 3) : u + 4].reshape(-1, 3).astype(np.float64)
    if patch.std(0).max() > 22:
        return None
    gaps = np.linalg.norm(np.array(list(SURFACES.values()), dtype=np.float64) - patch.mean(0), axis=1)
    order = np.argsort(gaps)
    return tuple(SURFACES)[int(order[0])] if gaps[order[0]] < CLEAR * gaps[order[1]] else None


def name_at(scene: Scene, view: View, at: tuple[float, float], clear: set[int]) -> str | None:
    """The class at a place that shows one clearly visible object in a neighbourhood of 5 x 5 pixels."""
    if view.ids is None:
        return None
    u = int(at[0])
    v = int(at[1])
    ids = np.unique(view.ids[max(0, v - 2) : v + 3, max(0, u - 2) : u + 3])
    return scene.object(int(ids[0])).name if len(ids) == 1 and int(ids[0]) in clear else None


def draw_marks(
    scene: Scene,
    view: View,
    image: Image.Image,
    rng: np.random.Generator,
    config: TaskConfig,
    counts: Mapping[int, float] = FEW,
) -> tuple[Mark, ...]:
    """Draw marks of one shape in different colours, most of them on objects; at most as many as `counts` draws."""
    pool = usable(view, config)
    clear = {s.object_id for s in pool}
    shape = SHAPES[int(rng.choice(3, p=(0.4, 0.33, 0.27)))]
    count = int(rng.choice(tuple(counts), p=tuple(counts.values())))
    colours = choose(rng, tuple(draw.COLOURS), count)
    found: list[Mark] = []
    radius = draw.radius_of(image.size)
    if shape == "box":
        wide = 0.8 * image.width
        whole = [s for s in pool if s.box_2d[2] - s.box_2d[0] < wide and min(sides(s.box_2d)) > 12]
        for s, colour in zip(choose(rng, whole, min(count, MOST_BOXES)), colours, strict=False):
            at = ((s.box_2d[0] + s.box_2d[2]) / 2, (s.box_2d[1] + s.box_2d[3]) / 2)
            found.append(Mark(shape, colour, at, s.box_2d, scene.object(s.object_id).name, None))
            draw.box_2d(image, s.box_2d, colour)
        return tuple(found)
    on_objects = iter(choose(rng, pool, len(pool)))
    for colour in colours:
        sighting = next(on_objects, None) if rng.uniform() < 0.75 else None
        margin = 2 * radius
        at = (float(rng.uniform(margin, image.width - margin)), float(rng.uniform(margin, image.height - margin)))
        at = at if sighting is None else sighting.point
        if all(apart(at, other.at, 4 * radius) for other in found):
            surface = surface_at(view, at) if shape == "circle" else None
            found.append(Mark(shape, colour, at, None, name_at(scene, view, at, clear), surface))
    for mark in found:
        (draw.dot if shape == "point" else draw.circle)(image, mark.at, mark.colour)
    return tuple(found)


def sides(box: Sequence[float]) -> tuple[float, float]:
    return box[2] - box[0], box[3] - box[1]
