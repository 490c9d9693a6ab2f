"""Video counting: how many objects of a class the room has, for classes with more than one."""

from __future__ import annotations

import zlib

import numpy as np

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene
from fastvst.tasks.common import TaskConfig, choose, pick, plural
from fastvst.tasks.video import Kind, options, row, survey

TASK = "video_counting"

PHRASES = (
    "How many {name}(s) are in this room?",
    "How many {name}(s) does the video show in all?",
    "Count the {name}(s) in this room.",
    "What is the number of {name}(s) in this room?",
    "How many different {name}(s) appear in the video?",
    "Over the whole video, how many {name}(s) can you count?",
    "Tell me how many {name}(s) this room has.",
    "Give the number of {name}(s) in the room.",
    "Walking through this room, how many {name}(s) do you pass in total?",
    "In total, how many {name}(s) are there? Count each only once.",
)
# Share of the classes with this many objects that are asked about. Without it "2" would be right in 78 % of the rows.
KEPT = {2: 0.2, 3: 0.45}


def kept(scene: Scene, kind: Kind) -> bool:
    """Whether a class is asked about at all: always the same answer, so that more attempts ask no more of the pairs."""
    return zlib.crc32(f"{scene.name} {kind.name}".encode()) / 2**32 < KEPT.get(len(kind.ids), 1.0)


def make(scene: Scene, rng: np.random.Generator, config: TaskConfig, index: str) -> Sample | None:
    """One row about the walk, or None if no class has two or more objects, all clearly seen."""
    several = [
        kind
        for kind in survey(scene, config).values()
        if len(kind.ids) > 1 and not plural(kind.name) and kept(scene, kind)
    ]
    if not several:
        return None
    kind = pick(rng, several)
    count = len(kind.ids)
    choices = None
    if rng.uniform() >= config.easy:
        near = [n for n in range(max(1, count - 3), count + 4) if n != count]
        choices, _ = options(rng, str(count), [str(n) for n in choose(rng, near, 3)])
    return row(
        scene,
        task=TASK,
        index=index,
        question=pick(rng, PHRASES).format(name=kind.name),
        reply=str(count),
        choices=choices,
        answer={"type": "number", "value": count, "unit": "", "tolerance": 0.0},
        metadata={"form": "free" if choices is None else "choice", "name": kind.name, "objects": list(kind.ids)},
    )
