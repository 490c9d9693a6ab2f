"""Camera motion: how the camera moved or turned from the first frame to the second, in the first camera's frame."""

from __future__ import annotations

import math

import numpy as np

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene
from fastvst.spatial.camera import Camera
from fastvst.tasks.common import TaskConfig, choice, choose, mcq, pick, sample

TASK = "camera_motion"
KIND = "multi_image"
WORDS = (("left", "right"), ("up", "down"), ("backward", "forward"))  # camera axes X, Y, Z: negative, positive

SHIFT = (
    "In which direction did the camera move from the first image to the second?",
    "How did the camera move between the two images?",
    "The two images were taken one after the other. Which way did the camera move?",
    "From image 1 to image 2, where did the camera move?",
    "What is the direction of the camera's translation from the first frame to the second?",
    "Relative to the first image, in which direction is the camera of the second image?",
    "Which way did the photographer step between the first and the second image?",
    "Describe the camera movement from image 1 to image 2 in a few words.",
    "Starting from the first view, how was the camera shifted to get the second view?",
    "Name the direction in which the camera travelled from frame 1 to frame 2.",
)
TURN = (
    "In which direction did the camera turn from the first image to the second?",
    "How was the camera rotated between the two images?",
    "The camera turned on the spot after the first image. Which way?",
    "Which way did the camera rotate from image 1 to image 2?",
    "Did the camera pan left or right, or tilt up or down, between the two images?",
)
OPTIONS = ("{question} Options: {options}", "{question} {options}", "{question} Choose from: {options}")
# Share of the single shifts that become a row. A camera has more free space above and ahead than behind: without this
# "up" is 30 % of the shifts and "backward" 9 %.
KEPT = {"up": 0.4, "forward": 0.55, "down": 0.65, "right": 0.75}


def relative(first: Camera, second: Camera) -> tuple[np.ndarray, float, float]:
    """Motion from the first camera to the second, in the first camera's frame.

    Returns:
        shift (3,) in metres; pan (positive to the right) and tilt (positive upwards) of the second camera's viewing
        direction, in degrees.
    """
    shift = first.rotation @ (second.position - first.position)
    ahead = first.rotation @ second.rotation[2]
    pan = math.degrees(math.atan2(ahead[0], ahead[2]))
    tilt = math.degrees(math.atan2(-ahead[1], math.hypot(ahead[0], ahead[2])))
    return shift, pan, tilt


def shift_words(shift: np.ndarray, config: TaskConfig) -> list[str] | None:
    """One or two of the six words in the order left/right, up/down, forward/backward; None for borderline cases.

    A component counts from half of the largest one. A component between a quarter and a half is ambiguous: rejected.
    """
    size = np.abs(shift)
    largest = float(size.max())
    if largest < config.min_shift:
        return None
    part = size / largest
    if ((part > 0.25) & (part < 0.5)).any() or (part >= 0.5).sum() == 3:
        return None
    return [WORDS[k][int(shift[k] > 0)] for k in range(3) if part[k] >= 0.5]


def turn_word(pan: float, tilt: float, config: TaskConfig) -> str | None:
    """left, right, up or down, if one angle is large enough and at least four times the other."""
    if max(abs(pan), abs(tilt)) < config.min_turn or min(abs(pan), abs(tilt)) * 4 > max(abs(pan), abs(tilt)):
        return None
    return ("right" if pan > 0 else "left") if abs(pan) > abs(tilt) else ("up" if tilt > 0 else "down")


def make(
    scene: Scene, pair: tuple[int, int, str], rng: np.random.Generator, config: TaskConfig, index: str
) -> Sample | None:
    """One row about a "motion" pair, or None if the motion has no clear name."""
    if pair[2] != "motion":
        return None
    first = scene.views[pair[0]]
    second = scene.views[pair[1]]
    shift, pan, tilt = relative(first.camera, second.camera)
    turned = max(abs(pan), abs(tilt))
    candidates: list[str]
    bank: tuple[str, ...]
    if float(np.linalg.norm(shift)) < 0.05:
        word = turn_word(pan, tilt, config)
        candidates = ["left", "right", "up", "down"]
        text = word
        bank = TURN
    else:
        words = shift_words(shift, config) if turned < 4 else None
        text = None if words is None else " and ".join(words)
        candidates = [w for two in WORDS for w in two]
        bank = SHIFT
    if text is None or (bank is SHIFT and rng.uniform() >= KEPT.get(text, 1.0)):
        return None
    question = pick(rng, bank)
    two_axes = " and " in text
    if two_axes or rng.uniform() >= config.easy:
        pool = candidates if bank is TURN else _all_shifts()
        wrong = choose(rng, [c for c in pool if c != text and (bank is TURN or (" and " in c) == two_axes)], 3)
        options, reply, candidates = mcq(rng, text, wrong)
        question = pick(rng, OPTIONS).format(question=question, options=options)
        form = "choice"
    else:
        reply = text
        form = "free"
    return sample(
        scene,
        task=TASK,
        kind=KIND,
        index=index,
        images=[first.photograph, second.photograph],
        turns=[(question, reply)],
        answer=choice(text, candidates, lettered=form == "choice"),
        metadata={
            "form": form,
            "mode": "turn" if bank is TURN else "shift",
            "views": list(pair[:2]),
            "shift": [float(x) for x in shift],
            "pan": pan,
            "tilt": tilt,
        },
    )


def _all_shifts() -> list[str]:
    """The six single directions and the twelve pairs of different axes."""
    singles = [w for two in WORDS for w in two]
    pairs = [f"{a} and {b}" for i in range(3) for j in range(i + 1, 3) for a in WORDS[i] for b in WORDS[j]]
    return singles + pairs
