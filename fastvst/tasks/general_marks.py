"""Many general questions about the marks of one image, each with several answers in few words.

A single question of `general` costs 25 tokens and teaches one look-up. A list of this module teaches one with every
three tokens: "Name the object at each point." - "red: sofa; blue: floor lamp". The turns of a row tell the same facts
several times, so a trainer asks them side by side (`tools/build_base.py`): in one conversation the later replies could
be copied from the earlier ones. None of these questions is about depth or metres.
"""

from __future__ import annotations

import itertools

import numpy as np

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene
from fastvst.tasks.common import TaskConfig, choose, pick
from fastvst.tasks.general import APART, ORDERS, conversation
from fastvst.tasks.looks import MANY, Look, Mark, Turn, draw_marks

PAIRS_ASKED = 10
SINGLES_ASKED = 4
COMPARISONS = 4
ORDER_LISTS = {
    "farther left": "from left to right",
    "farther right": "from right to left",
    "higher in the image": "from top to bottom",
    "lower in the image": "from bottom to top",
}


def make(scene: Scene, view_index: int, rng: np.random.Generator, config: TaskConfig, index: str) -> Sample | None:
    """A row about an image with up to seven marks, or None if there are fewer than two."""
    view = scene.views[view_index]
    image = view.photograph.copy()
    marks = draw_marks(scene, view, image, rng, config, MANY)
    if len(marks) < 2:
        return None
    look = Look(scene, view, marks)
    turns = [*_lists(look, rng), *_orders(look, rng), *_compared(look, rng), *_pairs(look, rng), *_singles(look, rng)]
    return conversation(scene, [image], choose(rng, turns, len(turns)), "general_marks", index)


def _turn(question: str, reply: str) -> Turn:
    return Turn("marks", question, reply, frozenset(), None)


def _plural(mark: Mark) -> str:
    return "boxes" if mark.shape == "box" else f"{mark.shape}s"


def _lists(look: Look, rng: np.random.Generator) -> list[Turn]:
    """Object, place, part of the image and surface of every mark, by colour; the mark of every object and place."""
    marks = choose(rng, look.marks, len(look.marks))
    shape = marks[0].shape
    turns = []
    named = [m for m in marks if m.name is not None]
    if named:
        question = pick(rng, (f"Name the object at each {shape}.", f"What is at each {shape}?"))
        turns.append(_turn(question, "; ".join(f"{m.colour}: {m.name}" for m in named)))
    names = [m.name for m in named]
    single = [m for m in choose(rng, named, len(named)) if names.count(m.name) == 1]
    if single:
        question = pick(rng, (f"Which {shape} is at each object?", f"Give the {shape} of each object."))
        turns.append(_turn(question, "; ".join(f"{m.name}: {m.colour}" for m in single)))
    marks = choose(rng, marks, len(marks))
    question = pick(rng, (f"Where is each {shape}?", f"Give the pixel of each {shape}."))
    turns.append(_turn(question, "; ".join(f"{m.colour}: {_spot(look, m)}" for m in marks)))
    marks = choose(rng, marks, len(marks))
    question = f"In which part of the image is each {shape}?"
    turns.append(_turn(question, "; ".join(f"{m.colour}: {_part(look, m)}" for m in marks)))
    marks = choose(rng, marks, len(marks))
    question = pick(
        rng, (f"Which {shape} is at each place?", f"What are the colours of the {_plural(marks[0])} by place?")
    )
    turns.append(_turn(question, "; ".join(f"{_spot(look, m)}: {m.colour}" for m in marks)))
    seen = [m for m in marks if m.surface is not None]
    if seen:
        question = f"What colour is the surface in each {shape}?"
        turns.append(_turn(question, "; ".join(f"{m.colour}: {m.surface}" for m in seen)))
    return turns


def _spot(look: Look, mark: Mark) -> str:
    x, y = look.place(mark.at)
    return f"({x}, {y})"


def _part(look: Look, mark: Mark) -> str:
    """One of nine parts of the image, such as "top left" and "middle centre"."""
    size = look.view.camera
    row = int(3 * min(mark.at[1] / size.height, 0.99))
    column = int(3 * min(mark.at[0] / size.width, 0.99))
    return f"{('top', 'middle', 'bottom')[row]} {('left', 'centre', 'right')[column]}"


def _ordered(look: Look, axis: int, sign: int) -> list[Mark]:
    """The marks by their columns (axis 0) or rows (1), the largest first if the sign is -1."""
    return sorted(look.marks, key=lambda mark: sign * look.place(mark.at)[axis])


def _first(look: Look, one: Mark, two: Mark, axis: int, sign: int) -> Mark | None:
    """The mark that comes first in this order, None if they are not clearly apart."""
    gap = sign * (look.place(one.at)[axis] - look.place(two.at)[axis])
    return None if abs(gap) < APART else one if gap < 0 else two


def _orders(look: Look, rng: np.random.Generator) -> list[Turn]:
    """The marks in order of their columns and rows, where all are clearly apart."""
    turns = []
    for word, axis, sign in ORDERS:
        marks = _ordered(look, axis, sign)
        if all(_first(look, one, two, axis, sign) for one, two in itertools.pairwise(marks)):
            asked = pick(rng, ("List the {p} {o}.", "Name the colours of the {p} {o}."))
            question = asked.format(p=_plural(marks[0]), o=ORDER_LISTS[word])
            turns.append(_turn(question, ", ".join(m.colour for m in marks)))
    return turns


def _compared(look: Look, rng: np.random.Generator) -> list[Turn]:
    """Two marks in all directions in which they are clearly apart, and the mark at each end of all marks.

    The reply repeats the word of the direction just before the colour: a small model learns this comparison first.
    """
    turns = []
    for one, two in choose(rng, tuple(itertools.permutations(look.marks, 2)), COMPARISONS):
        found = []
        for word, axis, sign in choose(rng, ORDERS, len(ORDERS)):
            best = _first(look, one, two, axis, sign)
            if best is not None:
                found.append(f"{word.removesuffix(' in the image')}: {best.colour}")
        if found:
            turns.append(_turn(f"Compare {one.colour} and {two.colour}.", "; ".join(found)))
    ends = []
    for word, axis, sign in choose(rng, ORDERS, len(ORDERS)):
        end, next_to_it = _ordered(look, axis, sign)[:2]
        best = _first(look, end, next_to_it, axis, sign)
        if best is not None:
            ends.append(f"{word.removesuffix(' in the image')}: {best.colour}")
    if ends:
        turns.append(_turn(f"Which {_plural(look.marks[0])} are at the ends?", "; ".join(ends)))
    return turns


def _pairs(look: Look, rng: np.random.Generator) -> list[Turn]:
    """Which of two marks is farther left, right, higher or lower, in few words."""
    turns = []
    for one, two in choose(rng, tuple(itertools.permutations(look.marks, 2)), PAIRS_ASKED):
        word, axis, sign = pick(rng, ORDERS)
        best = _first(look, one, two, axis, sign)
        if best is not None:
            word = word.removesuffix(" in the image")
            asked = pick(rng, ("Which is {o}, {a} or {b}?", "Of {a} and {b}, which is {o}?"))
            question = asked.format(o=word, a=one.colour, b=two.colour)
            turns.append(_turn(question, best.colour))
    return turns


def _singles(look: Look, rng: np.random.Generator) -> list[Turn]:
    """The object, the place or the part of the image of one mark, in few words."""
    turns = []
    for mark in choose(rng, look.marks, SINGLES_ASKED):
        if mark.name is not None and rng.uniform() < 0.5:
            asked = pick(rng, ("What is at {c}?", "The {t} marks which object?"))
            turns.append(_turn(asked.format(c=mark.colour, t=mark.title), mark.name))
        elif rng.uniform() < 0.4:
            turns.append(_turn(f"Where is {mark.colour}?", _spot(look, mark)))
        else:
            turns.append(_turn(f"Which part shows {mark.colour}?", _part(look, mark)))
    return turns
