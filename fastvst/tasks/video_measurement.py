"""Video measurement: the longest side or the height of an object that is the only one of its class, in centimetres."""

from __future__ import annotations

import numpy as np

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene
from fastvst.tasks.common import TaskConfig, pick, rounded
from fastvst.tasks.measurement import TOLERANCE, measure
from fastvst.tasks.video import row, unique

TASK = "video_measurement"

LONGEST = (
    "What is the longest dimension (length, width or height) of the {name}, in centimeters?",
    "How long is the longest side of the {name} in centimeters?",
    "Estimate the greatest of length, width and height of the {name} in centimeters.",
    "In centimeters, how large is the {name} along its longest dimension?",
    "Give the largest dimension of the {name} in centimeters.",
    "Measure the {name} along its longest side. How many centimeters is it?",
    "What is the maximum of length, width and height of the {name}, in centimeters?",
    "State the length of the {name}'s greatest dimension in centimeters.",
)
HEIGHT = (
    "What is the height of the {name} in centimeters?",
    "How tall is the {name} in centimeters?",
    "Estimate the height of the {name} in centimeters.",
    "How many centimeters high is the {name}?",
)


def make(scene: Scene, rng: np.random.Generator, config: TaskConfig, index: str) -> Sample | None:
    """One row about the walk, or None if no class has a single, clearly seen object."""
    known = unique(scene, config)
    if not known:
        return None
    name = pick(rng, sorted(known))
    what = "height" if rng.uniform() < 0.25 else "greatest"
    value = rounded(100 * measure(scene.object(known[name]), what), 0)
    return row(
        scene,
        task=TASK,
        index=index,
        question=pick(rng, HEIGHT if what == "height" else LONGEST).format(name=name),
        reply=str(value),
        answer={"type": "number", "value": value, "unit": "cm", "tolerance": TOLERANCE},
        metadata={"form": what, "objects": [known[name]]},
    )
