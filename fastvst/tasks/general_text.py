"""Conversations without images from a grammar of our own: numbers, look-ups, order, opposites, greetings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene
from fastvst.spatial import draw
from fastvst.tasks.common import TaskConfig, article, choose, listed, pick
from fastvst.tasks.looks import CLASSES

TURNS = 10
OPPOSITES = {
    "left": "right",
    "up": "down",
    "large": "small",
    "near": "far",
    "open": "closed",
    "light": "dark",
    "high": "low",
    "forward": "backward",
    "first": "last",
    "yes": "no",
}
PLACES = {
    "bed": "bedroom",
    "sofa": "living room",
    "desk": "office",
    "refrigerator": "kitchen",
    "bathtub": "bathroom",
    "toilet": "bathroom",
    "stove": "kitchen",
    "wardrobe": "bedroom",
}
TALK = (
    ("Hello.", "Hello, how can I help you?"),
    ("Good morning.", "Good morning, how can I help you?"),
    ("Who are you?", "I am a small model that answers questions about images."),
    ("What can you do?", "I can name objects, point to them, count them and compare places in an image."),
    ("Thank you.", "You are welcome."),
    ("Goodbye.", "Goodbye."),
)
Asked = tuple[str, str]


def _colours(rng: np.random.Generator) -> Asked:
    """Look-up: who has which colour."""
    names = choose(rng, CLASSES, int(rng.integers(2, 5)))
    colours = choose(rng, tuple(draw.COLOURS), len(names))
    told = listed([f"the {name} is {colour}" for name, colour in zip(names, colours, strict=True)])
    k = int(rng.integers(len(names)))
    told = told[0].upper() + told[1:]
    if rng.uniform() < 0.5:
        return f"{told}. Which colour is the {names[k]}?", colours[k]
    return f"{told}. Which object is {colours[k]}?", names[k]


def _places(rng: np.random.Generator) -> Asked:
    """Look-up and comparison of coordinates."""
    colours = choose(rng, tuple(draw.COLOURS), 2)
    spots = [(int(7 * rng.integers(1, 24)), int(7 * rng.integers(1, 16))) for _ in colours]
    axis = int(rng.integers(2))
    if abs(spots[0][axis] - spots[1][axis]) < 5:
        return f"Repeat: ({spots[0][0]}, {spots[0][1]}).", f"({spots[0][0]}, {spots[0][1]})"
    told = " and ".join(f"the {c} point is at ({x}, {y})" for c, (x, y) in zip(colours, spots, strict=True))
    told = told[0].upper() + told[1:]
    small = rng.uniform() < 0.5
    word = (("farther left", "farther right"), ("higher", "lower"))[axis][0 if small else 1]
    best = int((spots[1][axis] < spots[0][axis]) == small)
    if rng.uniform() < 0.3:
        return f"{told}. Where is the {colours[0]} point?", f"({spots[0][0]}, {spots[0][1]})"
    return f"{told}. Which point is {word}?", f"{colours[best]} point"


def _numbers(rng: np.random.Generator) -> Asked:
    a = int(rng.integers(1, 200))
    b = int(rng.integers(1, 200))
    b = b if b != a else a + 1
    kind = int(rng.integers(4))
    if kind == 0:
        large = rng.uniform() < 0.5
        return f"Which number is {'larger' if large else 'smaller'}, {a} or {b}?", str(
            max(a, b) if large else min(a, b)
        )
    if kind == 1:
        return f"Is {a} larger than {b}?", "yes" if a > b else "no"
    if kind == 2:
        return f"Which number comes after {a}?", str(a + 1)
    x = int(rng.integers(0, 10))
    y = int(rng.integers(0, 10))
    return f"How much is {x} plus {y}?", str(x + y)


def _units(rng: np.random.Generator) -> Asked:
    """Metres to centimetres, and heights that the text states."""
    if rng.uniform() < 0.5:
        tenths = int(rng.integers(2, 30))
        return f"How many centimeters are {tenths / 10:.1f} meters?", f"{10 * tenths} cm"
    names = choose(rng, CLASSES, 2)
    heights = [int(rng.integers(20, 230)) for _ in names]
    k = int(rng.integers(2))
    told = " ".join(f"The {name} has a height of {h} cm." for name, h in zip(names, heights, strict=True))
    return f"{told} How tall is the {names[k]}?", f"{heights[k]} cm"


def _lists(rng: np.random.Generator) -> Asked:
    names = choose(rng, (*CLASSES, *draw.COLOURS), int(rng.integers(2, 5)))
    words = ", ".join(names)
    kind = int(rng.integers(5))
    if kind == 0:
        return f"Repeat: {words}.", words
    if kind == 1:
        return f"Which word is first: {words}?", names[0]
    if kind == 2:
        return f"Which word is last: {words}?", names[-1]
    if kind == 3:
        return f"How many words are in this list: {words}?", str(len(names))
    word = pick(rng, names) if rng.uniform() < 0.5 else pick(rng, CLASSES)
    return f"Does the list {words} hold the word {word}?", "yes" if word in names else "no"


def _options(rng: np.random.Generator) -> Asked:
    """The letter of an option, and the option of a letter."""
    names = choose(rng, CLASSES, 4)
    options = " ".join(f"{letter}. {name}" for letter, name in zip("ABCD", names, strict=True))
    k = int(rng.integers(4))
    if rng.uniform() < 0.5:
        return f"Which option is {article(names[k])}? {options}", f"{'ABCD'[k]}. {names[k]}"
    return f"What does option {'ABCD'[k]} say? {options}", names[k]


def _words(rng: np.random.Generator) -> Asked:
    kind = rng.uniform()
    if kind < 0.4:
        word = pick(rng, sorted([*OPPOSITES, *OPPOSITES.values()]))
        other = OPPOSITES.get(word) or next(a for a, b in OPPOSITES.items() if b == word)
        return f"What is the opposite of {word}?", other
    if kind < 0.7:
        name = pick(rng, tuple(PLACES))
        return f"In which room is {article(name)} usually?", PLACES[name]
    return pick(rng, TALK)


KINDS: tuple[Callable[[np.random.Generator], Asked], ...] = (
    _colours,
    _colours,
    _places,
    _places,
    _numbers,
    _units,
    _lists,
    _options,
    _words,
)


def make(scene: Scene, view_index: int, rng: np.random.Generator, config: TaskConfig, index: str) -> Sample:
    """A conversation of `TURNS` independent turns; only its random numbers depend on the scene."""
    messages: list[dict[str, Any]] = []
    asked = []
    for _ in range(TURNS):
        question, reply = pick(rng, KINDS)(rng)
        asked.append(question)
        messages.append({"role": "user", "content": [{"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": reply}]})
    return Sample(
        id=f"{scene.name}-text-{index}",
        source="general",
        kind="text",
        messages=messages,
        answer=None,
        metadata={"task": "general_text", "what": asked, **scene.metadata},
    )
