"""Camera-camera relation: position and viewing direction of the other camera, on a clock face or a compass."""

from __future__ import annotations

import numpy as np

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene
from fastvst.tasks.angles import COMPASS, HOURS, clear_direction, clockwise, heading, sector
from fastvst.tasks.common import TaskConfig, choice, distractors, mcq, pick, sample

TASK = "camera_camera"
KIND = "multi_image"
# What can be asked about each kind of pair. "overlap" and "walk" pairs are missing: there, most turns are 30 to 75
# degrees, and "the given direction, one step on" is right in 45 % of the rows.
MODES: dict[str, tuple[str, ...]] = {
    "turn": ("clock", "compass"),
    "place": ("position",),
    "wide": ("clock", "compass", "position"),
}

CLOCK = (
    "If the camera of image {b} points at {given}, where does the camera of image {a} point?",
    "On a clock face seen from above, the camera of image {b} points at {given}. At what hour does the camera of image "
    "{a} point?",
    "Let the viewing direction of image {b} be {given} on a clock laid on the floor. What is that of image {a}?",
    "Image {b} was taken facing {given}. Toward which hour was image {a} taken?",
    "The photographer of image {b} looked toward {given}. Toward which hour did the photographer of image {a} look?",
    "Take {given} as the direction in which camera {b} looks. In which direction does camera {a} look, as an hour?",
    "Imagine a clock on the floor. Camera {b} faces {given}; what does camera {a} face?",
    "With camera {b} pointing at {given}, which hour does camera {a} point at?",
)
COMPASS_TURN = (
    "The camera of image {b} faces {given}. Which direction does the camera of image {a} face?",
    "Image {b} was taken looking {given}. In which compass direction was image {a} taken?",
    "If camera {b} looks {given}, where does camera {a} look?",
    "Suppose that image {b} looks toward the {given}. Toward which direction does image {a} look?",
    "Let the viewing direction of image {b} be {given}. What is the viewing direction of image {a}?",
)
POSITION = (
    "You stand where image {b} was taken and look the way it looks, which is 12 o'clock. At what hour is the camera of "
    "image {a}?",
    "For the camera of image {b}, straight ahead is 12 o'clock. In which direction is the position of camera {a}?",
    "From the viewpoint of image {b}, with 12 o'clock straight ahead and 3 o'clock to the right, where was image {a} "
    "taken?",
    "Camera {b} looks toward 12 o'clock. At which hour, seen from camera {b}, does camera {a} stand?",
    "If the photographer of image {b} faces 12 o'clock, at which hour did the photographer of image {a} stand?",
)
OPTIONS = ("{question} Options: {options}", "{question} {options}", "{question} Choose from: {options}")


def make(
    scene: Scene, pair: tuple[int, int, str], rng: np.random.Generator, config: TaskConfig, index: str
) -> Sample | None:
    """One row about the poses of a pair of views, or None where the direction is near the border of its sector.

    Of a rendered room only the pairs are used in which every turn or every place is equally frequent.
    """
    if pair[2] not in MODES:
        return None
    form = pick(rng, MODES[pair[2]])
    views = list(pair[:2])
    if rng.uniform() < 0.5:
        views.reverse()
    asked = int(rng.integers(2))
    if pair[2] == "place":  # only the direction from the first camera to the second is equally frequent
        asked = views.index(pair[1])
    target, base = (scene.views[views[k]].camera for k in (asked, 1 - asked))
    words = COMPASS if form == "compass" else HOURS
    if form == "position":
        if not clear_direction(base.position[:2], target.position[:2]):
            return None
        angle = clockwise(heading(base), target.position[:2] - base.position[:2])
        given = 0
        bank: tuple[str, ...] = POSITION
    else:
        angle = clockwise(heading(base), heading(target))
        given = int(rng.integers(len(words)))
        bank = CLOCK if form == "clock" else COMPASS_TURN
    turned = sector(angle, len(words))
    if turned is None:
        return None
    right = words[(given + turned) % len(words)]
    question = pick(rng, bank).format(a=asked + 1, b=2 - asked, given=words[given])
    free = bool(rng.uniform() < config.easy)
    reply = right
    options = list(words)
    if not free:
        line, reply, options = mcq(rng, right, distractors(rng, right, words, 3))
        question = pick(rng, OPTIONS).format(question=question, options=line)
    return sample(
        scene,
        task=TASK,
        kind=KIND,
        index=index,
        images=[scene.views[k].photograph for k in views],
        turns=[(question, reply)],
        answer=choice(right, options, lettered=not free),
        metadata={
            "form": "free" if free else "choice",
            "mode": form,
            "views": views,
            "asked": asked,
            "given": words[given],
            "angle": angle,
        },
    )
