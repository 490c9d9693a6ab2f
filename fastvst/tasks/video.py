"""What the video tasks share: which things a walk shows when, the prompt of VSI-Bench, and building a row.

A class can be asked about only if all its objects in the scene are seen clearly in some frame; one that has objects the
camera never saw, or saw as a few pixels, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene
from fastvst.tasks.common import LETTERS, TaskConfig, canvas, sample

BEFORE = "These are frames of a video."
AFTER_CHOICE = "Answer with the option's letter from the given choices directly."
AFTER_NUMBER = "Please answer the question using a single word or phrase."


@dataclass(frozen=True)
class Kind:
    """One class of things of the scene, all of them seen clearly. `first`: frame in which the first of them shows as
    much as one pixel; `sure`: frame in which the first of them is seen clearly."""

    name: str
    ids: tuple[int, ...]
    first: int
    sure: int


def survey(scene: Scene, config: TaskConfig) -> dict[str, Kind]:
    """The classes that can be asked about, by name; empty without a walk."""
    clear: dict[int, int] = {}
    shown: dict[int, int] = {}
    for frame, view in enumerate(scene.views[k] for k in scene.walk):
        for s in view.sightings:
            shown.setdefault(s.object_id, frame)
            if s.visibility >= config.min_visibility and s.pixels >= config.min_pixels:
                clear.setdefault(s.object_id, frame)
    names: dict[str, list[int]] = {}
    for thing in scene.objects:
        names.setdefault(thing.name, []).append(thing.id)
    return {
        name: Kind(name, tuple(ids), min(shown[i] for i in ids), min(clear[i] for i in ids))
        for name, ids in sorted(names.items())
        if all(i in clear for i in ids)
    }


def unique(scene: Scene, config: TaskConfig) -> dict[str, int]:
    """Class name -> object id, for classes with exactly one object in the scene, clearly seen."""
    return {name: kind.ids[0] for name, kind in survey(scene, config).items() if len(kind.ids) == 1}


@lru_cache(maxsize=2)
def frames(scene: Scene) -> tuple[Image.Image, ...]:
    """The pictures of the walk, shared by all rows about it (nothing is drawn on them)."""
    return tuple(canvas(scene.views[k]) for k in scene.walk)


def options(rng: np.random.Generator, right: str, wrong: list[str]) -> tuple[list[str], int]:
    """All option texts with the right one in a random place, and that place."""
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
