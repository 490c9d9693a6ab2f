"""Shared by the video tasks: which objects a walk shows and when, the prompt of VSI-Bench, and building a row.

A question can name a class only if some frame shows each of its objects clearly. A class is left out if the camera
never saw one of its objects, or saw only a few pixels of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene
from fastvst.tasks.common import LETTERS, TaskConfig, fits_another, sample

BEFORE = "These are frames of a video."
AFTER_CHOICE = "Answer with the option's letter from the given choices directly."
AFTER_NUMBER = "Please answer the question using a single word or phrase."


@dataclass(frozen=True)
class Kind:
    """One class of objects, all of them clearly seen.

    `first` is the first frame that shows a pixel of one of them, `sure` the first frame that shows one of them clearly.
    """

    name: str
    ids: tuple[int, ...]
    first: int
    sure: int


def survey(scene: Scene, config: TaskConfig) -> dict[str, Kind]:
    """The classes that a question can name; empty without a walk."""
    clear: dict[int, int] = {}
    shown: dict[int, int] = {}
    for frame, view in enumerate(scene.views[k] for k in scene.walk):
        for s in view.sightings:
            shown.setdefault(s.object_id, frame)
            if s.visibility >= config.min_visibility and s.pixels >= config.min_pixels:
                clear.setdefault(s.object_id, frame)
    names: dict[str, list[int]] = {}
    for thing in scene.everything:
        names.setdefault(thing.name, []).append(thing.id)
    return {
        name: Kind(name, tuple(ids), min(shown[i] for i in ids), min(clear[i] for i in ids))
        for name, ids in sorted(names.items())
        if all(i in clear for i in ids) and not fits_another(name, names)
    }


def unique(scene: Scene, config: TaskConfig) -> dict[str, int]:
    """Class name -> object id, for classes with exactly one object in the scene, clearly seen."""
    return {name: kind.ids[0] for name, kind in survey(scene, config).items() if len(kind.ids) == 1}


@lru_cache(maxsize=2)
def frames(scene: Scene) -> tuple[Image.Image, ...]:
    """The images of the walk. All rows about the walk share them: nothing is drawn on them."""
    return tuple(scene.views[k].photograph for k in scene.walk)


def options(rng: np.random.Generator, right: str, wrong: list[str]) -> tuple[list[str], int]:
    """All option texts, with the right one at a random place, and that place."""
    place = int(rng.integers(len(wrong) + 1))
    return [*wrong[:place], right, *wrong[place:]], place


def row(
    scene: Scene,
    *,
    task: str,
    index: str,
    question: str,
    reply: str,
    choices: list[str] | None = None,
    answer: dict[str, Any] | None = None,
    metadata: dict[str, Any],
    suffix: str = AFTER_NUMBER,
) -> Sample:
    """A row about the whole walk. With `choices` (the right one is `reply`) the answer is the option's letter."""
    lines = [BEFORE, question]
    if choices is not None:
        named = [f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False)]
        lines += ["Options:", *named, AFTER_CHOICE]
        right = named[choices.index(reply)]
        answer = {"type": "choice", "value": right, "candidates": named}
        reply = right[0]
    elif suffix:
        lines.append(suffix)
    if answer is None:
        raise ValueError(f"{scene.name}: a row of {task} needs choices or a checkable answer")
    return sample(
        scene,
        task=task,
        kind="video",
        index=index,
        images=list(frames(scene)),
        turns=[("\n".join(lines), reply)],
        answer=answer,
        metadata={**metadata, "choice": choices is not None, "frames": list(scene.walk)},
        fps=scene.fps,
    )
