"""Spatio-temporal: in which order objects appear for the first time."""

from __future__ import annotations

import math

import numpy as np

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene
from fastvst.tasks.common import TaskConfig, choose, pick
from fastvst.tasks.video import Kind, options, row, survey

TASK = "video_order"
SECONDS = 1.0  # between the clear appearance of one class and the first pixel of the next (VLM-3R's rule)

ORDER = (
    "What will be the first-time appearance order of the following categories in the video: {names}?",
    "In which order do these come into view for the first time: {names}?",
    "Sort {names} by when they first appear in the video.",
    "List {names} in the order of their first appearance.",
    "As the video goes on, in what order are {names} seen for the first time?",
    "Order the following by their first appearance in the video: {names}.",
    "Which comes into view first, second and so on: {names}?",
    "Put {names} in the order in which the camera first shows them.",
    "Give the order in which {names} show up first.",
)
FIRST = (
    "Which of these comes into view first: {names}?",
    "Of {names}, which one does the video show first?",
    "Which appears earliest in the video: {names}?",
    "What does the camera see first: {names}?",
)


def chain(kinds: list[Kind], fps: float) -> bool:
    """Whether the classes, sorted by `first`, appear clearly one after the other."""
    step = math.ceil(SECONDS * fps - 1e-9)
    return all(b.first - a.sure >= step for a, b in zip(kinds, kinds[1:], strict=False))


def make(scene: Scene, rng: np.random.Generator, config: TaskConfig, index: str) -> Sample | None:
    """One row about the walk, or None if no three classes appear at clearly different times."""
    known = list(survey(scene, config).values())
    first_only = bool(rng.uniform() < 0.25)
    found: list[Kind] = []
    for count in (4, 3):
        for _ in range(40 if len(known) >= count else 0):
            group = sorted(choose(rng, known, count), key=lambda kind: kind.first)
            if chain(group, scene.fps):
                found = group
                break
        if found:
            break
    else:
        return None
    ranked = [kind.name for kind in found]
    shown = choose(rng, ranked, len(ranked))
    metadata = {"form": "first" if first_only else "order", "order": ranked, "first": [k.first for k in found]}
    if first_only:
        choices = shown
        question = pick(rng, FIRST).format(names=", ".join(shown))
        reply = ranked[0]
        choices, _ = options(rng, reply, [name for name in shown if name != reply])
    else:
        question = pick(rng, ORDER).format(names=", ".join(shown))
        reply = ", ".join(ranked)
        wrong: list[str] = []
        while len(wrong) < 3:
            other = ", ".join(choose(rng, ranked, len(ranked)))
            if other != reply and other not in wrong:
                wrong.append(other)
        choices, _ = options(rng, reply, wrong)
    free = bool(rng.uniform() < config.easy / 2)
    return row(
        scene,
        task=TASK,
        index=index,
        question=question,
        reply=reply,
        choices=None if free else choices,
        answer={"type": "text", "value": reply, "candidates": shown},
        metadata=metadata,
    )
