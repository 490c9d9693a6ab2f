"""Measurement: height, width, length or greatest dimension of marked objects in centimetres, one or more turns."""

from __future__ import annotations

import dataclasses

import numpy as np

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene, SceneObject
from fastvst.spatial import draw
from fastvst.tasks.common import TaskConfig, apart, canvas, choose, fits_another, pick, rounded, sample, usable, whole

TASK = "measurement"
KIND = "qa"
TOLERANCE = 0.1  # relative; an answer within it is correct

QUESTIONS = (
    "What is the {what} of the {name} ({colour} point-{k}) in centimeters?",
    "Estimate the {what} of the {name} ({colour} point-{k}) in centimeters.",
    "How many centimeters is the {what} of the {name} ({colour} point-{k})?",
    "Give the {what} of the {name} marked by the {colour} point-{k}, in centimeters.",
    "The {name} is marked with the {colour} point-{k}. What is its {what} in centimeters?",
    "In centimeters, what {what} does the {name} ({colour} point-{k}) have?",
    "Please measure the {what} of the {name} ({colour} point-{k}) in centimeters.",
)
EASY = (
    "What is the height of the {name} in centimeters?",
    "How tall is the {name} in centimeters?",
    "Height of the {name} in centimeters?",
    "Give the height of the {name} in centimeters.",
    "Estimate the height of the {name} in centimeters.",
)
WORDS = {
    "height": ("height", "vertical size"),
    "length": ("length (its longer horizontal side)", "longer horizontal dimension"),
    "width": ("width (its shorter horizontal side)", "shorter horizontal dimension"),
    "greatest": ("greatest dimension (length, width or height)", "largest of length, width and height"),
}
THIN = 0.12  # metres; a flatter object hangs on a wall, and people would not speak of its width


def measure(thing: SceneObject, what: str) -> float:
    """Metres. `what`: "height", "length" (longer horizontal side), "width" (shorter) or "greatest"."""
    if what == "greatest":
        return max(thing.height, thing.length)
    return {"height": thing.height, "length": thing.length, "width": thing.width}[what]


def make(scene: Scene, view_index: int, rng: np.random.Generator, config: TaskConfig, index: str) -> Sample | None:
    """One row of one to `config.turns` questions about one view; `answer` is that of the last turn."""
    view = scene.views[view_index]
    image = canvas(view)
    gap = 4 * draw.radius_of(image.size)
    chosen: list = []
    for s in choose(rng, [s for s in usable(view, config) if whole(view, s)], 100):
        if len(chosen) < config.turns and all(apart(s.point, other.point, gap) for other in chosen):
            chosen.append(s)
    if not chosen:
        return None
    easy = bool(rng.uniform() < config.easy)
    colours = choose(rng, tuple(draw.COLOURS), len(chosen))
    names = [scene.object(s.object_id).name for s in chosen]
    shown = [scene.object(s.object_id).name for s in view.sightings if s.pixels >= config.ghost_pixels]
    turns = []
    answers = []
    what_asked = []
    for k, (s, colour, name) in enumerate(zip(chosen, colours, names, strict=True)):
        thing = scene.object(s.object_id)
        plain = easy and shown.count(name) == 1 and not fits_another(name, shown)
        what = (
            "height" if easy else pick(rng, tuple(WORDS) if thing.width >= THIN else ("height", "length", "greatest"))
        )
        if plain:
            question = pick(rng, EASY).format(name=name)
        else:
            question = pick(rng, QUESTIONS).format(what=pick(rng, WORDS[what]), name=name, colour=colour, k=k + 1)
        value = rounded(100 * measure(thing, what), 0)
        turns.append((question, f"{value} cm"))
        answers.append({"type": "number", "value": value, "unit": "cm", "tolerance": TOLERANCE})
        what_asked.append(what)
        if not plain:
            draw.dot(image, s.point, colour, str(k + 1))
    return sample(
        scene,
        task=TASK,
        kind=KIND,
        index=index,
        images=[image],
        turns=turns,
        answer=answers[-1],
        metadata={
            "form": "easy" if easy else "point",
            "view": view_index,
            "objects": [s.object_id for s in chosen],
            "what": what_asked,
            "turn_answers": answers,
        },
    )


def first_turn(row: Sample) -> Sample:
    """The row cut after its first answer; a row with one turn is returned unchanged.

    The image keeps the marks of the later questions.

    Raises:
        ValueError: several turns, and the metadata lacks an answer for each.
    """
    if len(row.messages) == 2:
        return row
    meta = row.metadata
    if "turn_answers" not in meta:
        raise ValueError(f"{row.source}/{row.id}: {len(row.messages)} messages and no answer to each of them")
    cut = {key: meta[key][:1] for key in ("objects", "what", "turn_answers")}
    return dataclasses.replace(row, messages=row.messages[:2], answer=meta["turn_answers"][0], metadata={**meta, **cut})
