"""Video scene caption: the room, the camera's path, the order in which classes appear, and counts."""

from __future__ import annotations

import numpy as np

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene
from fastvst.spatial.floor import area
from fastvst.tasks.common import TaskConfig, article, listed, pick
from fastvst.tasks.facts import Statement, answer_of
from fastvst.tasks.video import Kind, row, survey
from fastvst.tasks.video_order import chain
from fastvst.tasks.video_other import total_turn, travelled

TASK = "video_caption"

PHRASES = (
    "Describe the room that the video shows and the order in which things come into view.",
    "Write a caption of this video: the room, the camera's way, the objects.",
    "Give a spatial summary of the video.",
    "What does this walk through the room show? Mention sizes and numbers.",
    "Describe the scene of the video in a few sentences.",
    "Tell me what the camera passes on its way and how large the room is.",
    "Summarise the layout that the video shows.",
    "Please describe this room tour.",
    "Caption the video with the room's size and what appears when.",
    "Describe the surroundings that these frames show.",
)
ROOM = (
    "The room has a floor of about {d:.1f} square meters.",
    "The video shows a room of about {d:.1f} square meters.",
)
WAY = ("The camera travels {d:.1f} meters while it turns to the {way}.",)
COUNT = ("There are {n} {name}(s) in the room.", "In all, {n} {name}(s) can be counted.")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def longest_chain(kinds: list[Kind], fps: float) -> list[Kind]:
    """Longest list of classes that clearly appear one after the other; greedy, from the first class."""
    found: list[Kind] = []
    for kind in sorted(kinds, key=lambda k: (k.sure, k.first)):
        if not found or chain([found[-1], kind], fps):
            found.append(kind)
    return found


def make(scene: Scene, rng: np.random.Generator, config: TaskConfig, index: str) -> Sample | None:
    """One row about the walk, or None if fewer than three classes appear at clearly different times."""
    kinds = list(survey(scene, config).values())
    order = longest_chain(kinds, scene.fps)[:6]
    if len(order) < 3:
        return None
    statements: list[Statement] = []
    if scene.polygon is not None:
        size = area(scene.polygon)
        statements.append(Statement(pick(rng, ROOM).format(d=size), {"says": "area", "value": round(size, 1)}))
    turn = total_turn(scene)
    length = travelled(scene)
    if abs(turn) >= 60 and length >= 0.5:
        way = "right" if turn > 0 else "left"
        fact = {"says": "way", "value": round(length, 1), "words": [way]}
        statements.append(Statement(pick(rng, WAY).format(d=length, way=way), fact))
    names = [kind.name for kind in order]
    text = f"First {article(names[0])} comes into view, then {listed([article(name) for name in names[1:]])}."
    statements.append(Statement(text, {"says": "order", "titles": names, "first": [kind.first for kind in order]}))
    several = [kind for kind in kinds if 1 < len(kind.ids) < len(WORDS)]
    for kind in several[:3]:
        fact = {"says": "count", "titles": [kind.name], "objects": list(kind.ids)}
        statements.append(Statement(pick(rng, COUNT).format(n=WORDS[len(kind.ids)], name=kind.name), fact))
    return row(
        scene,
        task=TASK,
        index=index,
        question=pick(rng, PHRASES),
        reply=" ".join(s.text for s in statements),
        answer=answer_of(statements),
        metadata={"form": "tour"},
        suffix="",
    )
