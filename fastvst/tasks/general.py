"""General questions about images, which are none of VST's nineteen tasks: names, colours, places in the image, counts.

The base model of the tiny preset learns from conversations of them (`tools/build_base.py`), and the benchmark
`fastvst evaluate general` asks them one by one. No question is about depth, metres, 3D boxes, the camera, or the same
point in two images. All coordinates are pixels of `SIZE`, to which a row asks the loader to resize its images.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene, View
from fastvst.spatial import draw
from fastvst.tasks.common import TaskConfig, apart, article, choose, listed, nameable, pick, usable
from fastvst.tasks.looks import CLASSES, NEAR_ENOUGH, SIZE, Look, Turn, draw_marks, sides, surface_at

APART = 14.0  # pixels of SIZE between two places whose order is asked
MOST_TURNS = 14  # of a conversation about one image
# Most turns of a skill in a conversation: without a limit half of them would ask whether there is something.
MOST_OF = {"yes or no": 2, "counting": 1, "colour": 2, "caption": 1, "pointing": 4, "name": 4}
FIRST = ("order", "list", "which image", "mark of")  # drawn earlier: they need that no turn told a place or a name


# ---------------------------------------------------------------------------------------------------------------------
# Turns about one image


def _choice(value: str, candidates: Iterable[str]) -> dict[str, Any]:
    return {"type": "choice", "value": value, "candidates": list(candidates)}


def _text(value: str) -> dict[str, Any]:
    return {"type": "text", "value": value}


def _spot(place: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    """A place as a reply, and its checkable form."""
    return f"({place[0]}, {place[1]})", {"type": "point", "value": list(place), "tolerance": NEAR_ENOUGH}


def _yes_no(skill: str, question: str, true: bool, fact: str) -> Turn:
    reply = "yes" if true else "no"
    return Turn(skill, question, reply, frozenset({fact}), _choice(reply, ("yes", "no")))


def _of_marks(look: Look, rng: np.random.Generator) -> list[Turn]:
    """Name, place, surface and presence of every mark."""
    turns = []
    for mark in look.marks:
        title = f"{mark.title}{look.where}"
        word = "in" if mark.shape == "box" else "at"
        name = look.fact("name", mark.title)
        place = look.fact("place", mark.title)
        if mark.name is not None:
            asked = pick(rng, ("What is {w} the {t}?", "What object is {w} the {t}?", "Name the object {w} the {t}."))
            turns.append(Turn("name", asked.format(w=word, t=title), mark.name, frozenset({name}), _text(mark.name)))
            other = pick(rng, [c for c in CLASSES if c != mark.name])
            shown = mark.name if rng.uniform() < 0.5 else other
            question = f"Is the object {word} the {title} {article(shown)}?"
            turns.append(_yes_no("yes or no", question, shown == mark.name, name))
        if mark.surface is not None:
            question = pick(rng, ("What colour is the surface in the {t}?", "Which colour does the {t} surround?"))
            facts = frozenset({look.fact("surface", mark.title)})
            turns.append(Turn("colour", question.format(t=title), mark.surface, facts, _text(mark.surface)))
        reply, answer = _spot(look.place(mark.at))
        asked = pick(rng, ("Where is the {t}?", "Give the pixel of the {t}.", "Point to the {t}."))
        if mark.shape == "box":
            asked = "Where is the centre of the {t}?"
        turns.append(Turn("pointing", asked.format(t=title), reply, frozenset({place}), answer))
        if len(look.marks) > 1:
            titles = [m.title for m in look.marks]
            question = f"Which {mark.shape}{look.where} is at {reply}?"
            turns.append(Turn("mark at", question, mark.title, frozenset({place}), _choice(mark.title, titles)))
            if mark.name is not None and [m.name for m in look.marks].count(mark.name) == 1:
                facts = frozenset(look.fact("name", m.title) for m in look.marks)
                question = f"Which {mark.shape}{look.where} marks {article(mark.name)}?"
                turns.append(Turn("mark of", question, mark.title, facts, _choice(mark.title, titles)))
    return turns


ORDERS = (  # word, axis, sign: the smaller of sign * coordinate is the answer
    ("farther left", 0, 1),
    ("farther right", 0, -1),
    ("higher in the image", 1, 1),
    ("lower in the image", 1, -1),
)
COMPARE = (
    "Which {s}{w} is {o}, the {a} or the {b}?",
    "Which is {o}{w}: the {a} or the {b}?",
    "The {a} or the {b}: which is {o}{w}?",
    "Of the {a} and the {b}, which one is {o}{w}?",
)


def _of_pairs(look: Look, rng: np.random.Generator) -> list[Turn]:
    """Which of two marks is farther left, higher, larger in the image; all marks from left to right."""
    turns = []
    for one, two in itertools.combinations(look.marks, 2):
        a, b = (one, two) if rng.uniform() < 0.5 else (two, one)
        titles = [a.title, b.title]
        for word, axis, sign in choose(rng, ORDERS, 2):
            gap = sign * (look.place(a.at)[axis] - look.place(b.at)[axis])
            if abs(gap) < APART:
                continue
            best = a.title if gap < 0 else b.title
            facts = frozenset(look.fact("place", m.title) for m in (a, b))
            question = pick(rng, COMPARE).format(s=a.shape, w=look.where, o=word, a=a.title, b=b.title)
            turns.append(Turn("order", question, best, facts, _choice(best, titles)))
        if a.box is not None and b.box is not None:
            areas = [float(np.prod(sides(m.box))) for m in (a, b) if m.box is not None]
            large = rng.uniform() < 0.5
            if max(areas) > 1.4 * min(areas):
                best = titles[int((areas[1] > areas[0]) == large)]
                question = pick(rng, COMPARE).format(
                    s="box",
                    w=look.where,
                    o="larger in the image" if large else "smaller in the image",
                    a=titles[0],
                    b=titles[1],
                )
                facts = frozenset({look.fact("size", a.title), look.fact("size", b.title)})
                turns.append(Turn("order", question, best, facts, _choice(best, titles)))
    if len(look.marks) > 2:
        marks = sorted(look.marks, key=lambda m: m.at[0])
        if min(b.at[0] - a.at[0] for a, b in itertools.pairwise(marks)) > 2 * APART:
            reply = ", ".join(m.colour for m in marks)
            plural = {"box": "boxes"}.get(marks[0].shape, f"{marks[0].shape}s")
            facts = frozenset(look.fact("place", m.title) for m in marks)
            question = f"List the colours of the {plural}{look.where} from left to right."
            turns.append(Turn("list", question, reply, facts, _text(reply)))
    return turns


def _of_drawing(look: Look, rng: np.random.Generator) -> list[Turn]:
    """How many marks there are, and whether there is one of a colour."""
    if not look.marks:
        return []
    shape = look.marks[0].shape
    shown = {m.colour for m in look.marks}
    colour = pick(rng, tuple(draw.COLOURS)) if rng.uniform() < 0.3 else pick(rng, tuple(sorted(shown)))
    plural = {"box": "boxes"}.get(shape, f"{shape}s")
    where = look.where or " in the image"
    count = Turn(
        "counting",
        f"How many {plural} are drawn{where}?",
        str(len(look.marks)),
        frozenset({look.fact("marks")}),
        _text(str(len(look.marks))),
    )
    there = _yes_no(
        "yes or no", f"Is there {article(f'{colour} {shape}')}{where}?", colour in shown, look.fact("drawn", colour)
    )
    return [count, there]


def _of_objects(look: Look, rng: np.random.Generator, config: TaskConfig) -> list[Turn]:
    """Pointing to objects, the object at a pixel, presence, number, the room and the caption."""
    scene = look.scene
    view = look.view
    turns = []
    alone = nameable(scene, view, config)
    marked = {m.name for m in look.marks}
    for s in choose(rng, alone, 4):
        name = scene.object(s.object_id).name
        reply, answer = _spot(look.place(s.point))
        fact = frozenset({look.fact("object", name)})
        asked = pick(rng, ("Point to the {n}{w}.", "Where is the {n}{w}?", "Give a pixel on the {n}{w}."))
        turns.append(Turn("pointing", asked.format(n=name, w=look.where), reply, fact, answer))
        if name not in marked:
            question = pick(rng, ("What is at {p}{w}?", "Name the object at {p}{w}."))
            turns.append(Turn("name", question.format(p=reply, w=look.where), name, fact, _text(name)))
    where = look.where or " in the image"
    shown = [scene.object(s.object_id).name for s in view.sightings if s.pixels >= config.ghost_pixels]
    sure = sorted({scene.object(s.object_id).name for s in usable(view, config)} & set(shown))
    absent = [c for c in CLASSES if not any(n.endswith(c) or c.endswith(n) for n in shown)]
    for name in [*choose(rng, sure, 2), *choose(rng, absent, 2)]:
        asked = pick(rng, ("Is there {a}{w}?", "Does one see {a}{w}?"))
        question = asked.format(a=article(name), w=where)
        turns.append(_yes_no("yes or no", question, name in sure, look.fact("object", name)))
    clear = [scene.object(s.object_id).name for s in usable(view, config)]
    for name in choose(rng, sure, 2):
        if clear.count(name) == shown.count(name) and not any(n != name and n.endswith(name) for n in shown):
            fact = frozenset({look.fact("object", name)})
            question = f"How many objects{look.where} are called {name}?"
            turns.append(Turn("counting", question, str(clear.count(name)), fact, _text(str(clear.count(name)))))
    for _ in range(3):
        at = (float(rng.uniform(8, view.camera.width - 8)), float(rng.uniform(8, view.camera.height - 8)))
        surface = surface_at(view, at)
        if surface is not None and all(apart(at, m.at, 30) for m in look.marks):
            spot = _spot(look.place(at))[0]
            question = f"What colour is the surface at {spot}{look.where}?"
            turns.append(Turn("colour", question, surface, frozenset({look.fact("surface", spot)}), _text(surface)))
    turns += _of_room(look, rng, config)
    return turns


def _of_room(look: Look, rng: np.random.Generator, config: TaskConfig) -> list[Turn]:
    """The kind of the room, and the objects from left to right."""
    turns = []
    if "kind" in look.scene.metadata and not look.where:
        kind = str(look.scene.metadata["kind"])
        question = pick(rng, ("Which room is this?", "What kind of room is shown?"))
        turns.append(Turn("name", question, kind, frozenset({"room"}), _text(kind)))
    seen = sorted(usable(look.view, config), key=lambda s: -s.pixels)[:5]
    names = [look.scene.object(s.object_id).name for s in sorted(seen, key=lambda s: s.point[0])]
    names = [name for k, name in enumerate(names) if name not in names[:k]]
    if names:
        reply = f"There is {listed([article(name) for name in names])}."
        question = pick(rng, ("Describe image{w}.", "What does image{w} show?"))
        question = question.format(w=look.where.removeprefix(" in image")) if look.where else "Describe the image."
        facts = frozenset(look.fact("object", name) for name in names)
        turns.append(Turn("caption", question, reply, facts, None))
    return turns


def _of_image(look: Look, rng: np.random.Generator, config: TaskConfig) -> list[Turn]:
    return [*_of_marks(look, rng), *_of_pairs(look, rng), *_of_drawing(look, rng), *_of_objects(look, rng, config)]


# ---------------------------------------------------------------------------------------------------------------------
# Turns about two images


def _of_both(looks: Sequence[Look], rng: np.random.Generator, config: TaskConfig) -> list[Turn]:
    """Which image shows an object or a mark, and where it is farther left, higher or larger."""
    turns = []
    shown = []
    for look in looks:
        seen = {look.scene.object(s.object_id).name for s in look.view.sightings if s.pixels >= config.ghost_pixels}
        sure = {look.scene.object(s.object_id).name: s for s in nameable(look.scene, look.view, config)}
        shown.append((seen, sure))
    (seen_1, sure_1), (seen_2, sure_2) = shown
    answers = ["the first image", "the second image"]
    only = [(n, 0) for n in sorted(sure_1) if n not in seen_2] + [(n, 1) for n in sorted(sure_2) if n not in seen_1]
    for name, image in choose(rng, only, 2):
        facts = frozenset({f"object {name}{look.where}" for look in looks})
        question = f"Which image shows {article(name)}?"
        turns.append(Turn("which image", question, answers[image], facts, _choice(answers[image], answers)))
    places = [
        (
            f"the {name}",
            f"object {name}",
            [look.place(sure[name].point) for look, (_, sure) in zip(looks, shown, strict=True)],
        )
        for name in sorted(sure_1.keys() & sure_2.keys())
    ]
    marks = [{m.title: m for m in look.marks} for look in looks]
    for title in sorted(marks[0].keys() & marks[1].keys()):
        both = [look.place(found[title].at) for look, found in zip(looks, marks, strict=True)]
        places.append((f"the {title}", f"place {title}", both))
    for title, fact, (first, second) in choose(rng, places, 4):
        word, axis, sign = pick(rng, ORDERS)
        gap = sign * (first[axis] - second[axis])
        if abs(gap) >= APART / 2:
            best = answers[int(gap > 0)]
            facts = frozenset({f"{fact} {look.where}" for look in looks})
            asked = pick(rng, ("In which image is {t} {o}?", "Is {t} {o} in the first image or in the second image?"))
            question = asked.format(t=title, o=word.replace(" in the image", ""))
            turns.append(Turn("which image", question, best, facts, _choice(best, answers)))
    return turns


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def _talk(turns: Sequence[Turn], rng: np.random.Generator, most: int) -> list[Turn]:
    """Up to `most` turns in random order, none of which tells what another told, with at most `MOST_OF` of a skill."""
    rank = [float(rng.uniform()) * (0.25 if turn.skill in FIRST else 1.0) for turn in turns]
    told: set[str] = set()
    kept: list[Turn] = []
    for _, turn in sorted(zip(rank, turns, strict=True), key=lambda one: one[0]):
        often = sum(other.skill == turn.skill for other in kept)
        if len(kept) < most and often < MOST_OF.get(turn.skill, most) and not turn.facts & told:
            kept.append(turn)
            told |= turn.facts
    return choose(rng, kept, len(kept))


def conversation(scene: Scene, images: Sequence[Image.Image], turns: Sequence[Turn], task: str, index: str) -> Sample:
    """A row of these turns, with the images before the first; one turn alone keeps its checkable answer."""
    wanted = {"resized_width": SIZE[0], "resized_height": SIZE[1]}
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(turns):
        media = [{"type": "image", "image": image, **wanted} for image in images] if number == 0 else []
        messages.append({"role": "user", "content": [*media, {"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.reply}]})
    return Sample(
        id=f"{scene.name}-{task}-{index}",
        source="general",
        kind="general",
        messages=messages,
        answer=turns[0].answer if len(turns) == 1 else None,
        metadata={"task": task, "scene": scene.name, "what": [turn.question for turn in turns], **scene.metadata},
    )


def _one_image(
    scene: Scene, view: View, rng: np.random.Generator, config: TaskConfig
) -> tuple[Image.Image, list[Turn]]:
    image = view.photograph.copy()
    marks = draw_marks(scene, view, image, rng, config) if rng.uniform() < 0.9 else ()
    return image, _of_image(Look(scene, view, marks), rng, config)


def make(scene: Scene, view_index: int, rng: np.random.Generator, config: TaskConfig, index: str) -> Sample | None:
    """A conversation about one image, or None if there is nothing to ask."""
    image, turns = _one_image(scene, scene.views[view_index], rng, config)
    kept = _talk(turns, rng, MOST_TURNS)
    return conversation(scene, [image], kept, "general", index) if kept else None


def make_question(
    scene: Scene, view_index: int, rng: np.random.Generator, config: TaskConfig, index: str
) -> Sample | None:
    """One checkable question about one image; every skill that the image offers is asked equally often."""
    image, turns = _one_image(scene, scene.views[view_index], rng, config)
    return _question(scene, [image], turns, rng, index)


def _question(
    scene: Scene, images: list[Image.Image], turns: list[Turn], rng: np.random.Generator, index: str
) -> Sample | None:
    checkable = [turn for turn in turns if turn.answer is not None]
    if not checkable:
        return None
    skill = pick(rng, sorted({turn.skill for turn in checkable}))
    turn = pick(rng, [turn for turn in checkable if turn.skill == skill])
    row = conversation(scene, images, [turn], "general_question", index)
    row.metadata["form"] = skill
    return row


def _two_images(
    scene: Scene, pair: tuple[int, int, str], rng: np.random.Generator, config: TaskConfig
) -> tuple[list[Image.Image], list[Turn]]:
    """Two views and the turns about them; in an eighth of the rows both images are the same."""
    same = rng.uniform() < 0.125
    images = []
    looks = []
    for number, k in enumerate(pair[:2] if not same else (pair[0], pair[0])):
        view = scene.views[k]
        image = view.photograph.copy()
        marks = draw_marks(scene, view, image, rng, config) if rng.uniform() < 0.6 and not same else ()
        images.append(image)
        looks.append(Look(scene, view, marks, f" in image {number + 1}"))
    alike = _yes_no("yes or no", "Are the two images the same?", same, "same")
    if same:
        return images, [alike, *_of_objects(looks[0], rng, config)]
    turns = [alike] if rng.uniform() < 0.125 else []
    return images, [*turns, *_of_both(looks, rng, config), *(t for look in looks for t in _of_image(look, rng, config))]


def make_pair(
    scene: Scene, pair: tuple[int, int, str], rng: np.random.Generator, config: TaskConfig, index: str
) -> Sample | None:
    """A conversation about two images, or None."""
    images, turns = _two_images(scene, pair, rng, config)
    kept = _talk(turns, rng, MOST_TURNS)
    return conversation(scene, images, kept, "general_pair", index) if kept else None


def make_pair_question(
    scene: Scene, pair: tuple[int, int, str], rng: np.random.Generator, config: TaskConfig, index: str
) -> Sample | None:
    """One checkable question about two images, or None."""
    images, turns = _two_images(scene, pair, rng, config)
    both = [turn for turn in turns if turn.skill == "which image"]
    return _question(scene, images, both or turns, rng, index)
