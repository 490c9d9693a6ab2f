"""3D detection: all objects of one or several named classes as nine-number boxes in the camera frame."""

from __future__ import annotations

import numpy as np

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene, View
from fastvst.spatial.boxes import format_boxes
from fastvst.spatial.prompts import detection_prompt
from fastvst.tasks.common import TaskConfig, choose, nameable_classes, pick, sample

TASK = "detection_3d"
KIND = "bbox_3d"
MAX_BOXES = 30
MATCH_IOU = 0.25  # the overlap at which VST's reward counts a box as found

ONE_CLASS = ("Detect the 3D bounding boxes of {names}",)
PHRASES = (
    "Detect the 3D bounding boxes of {names}",
    "Detect the 3D bounding boxes of {names}.",
    "Detect the 3D bounding box of the {names}.",
    "Find all {names} and give their 3D bounding boxes.",
    "Locate every {names} in 3D.",
    "Output the 3D bounding boxes of {names}.",
    "Where are the {names}? Answer with 3D bounding boxes.",
    "Predict the 3D boxes of {names} in this image.",
    "Give the 3D bounding boxes of all {names}.",
    "Please detect {names} and report each 3D bounding box.",
)


def askable(scene: Scene, view: View, config: TaskConfig) -> dict[str, list[int]]:
    """Class name -> object ids, for classes of which every visible instance is clearly visible.

    A class whose name describes an object of another visible class is left out: its list of boxes would be ambiguous.
    """
    groups: dict[str, list[int]] = {}
    unclear: set[str] = set()
    for s in view.sightings:
        name = scene.object(s.object_id).name
        if s.visibility >= config.min_visibility and s.pixels >= config.min_pixels:
            groups.setdefault(name, []).append(s.object_id)
        elif s.pixels >= config.ghost_pixels:
            unclear.add(name)
    return nameable_classes(groups, unclear)


def within_limit(names: list[str], groups: dict[str, list[int]]) -> list[str]:
    """The first of these classes whose objects are at most `MAX_BOXES` together: a list that is cut is not "all"."""
    kept: list[str] = []
    for name in names:
        if sum(len(groups[k]) for k in [*kept, name]) <= MAX_BOXES:
            kept.append(name)
    return kept


def make(scene: Scene, view_index: int, rng: np.random.Generator, config: TaskConfig, index: str) -> Sample | None:
    """One row about one view: one class in the plain form, otherwise one to five; boxes are sorted, nearest first."""
    view = scene.views[view_index]
    groups = askable(scene, view, config)
    if not groups:
        return None
    easy = bool(rng.uniform() < config.easy)
    names = choose(rng, sorted(groups), 1 if easy else int(rng.integers(1, 6)))
    names = within_limit(names, groups)
    if not names:
        return None
    ids = [i for name in names for i in groups[name]]
    boxes = scene.boxes_in_view(view, ids)
    order = np.argsort(boxes[:, 2], kind="stable")
    boxes = boxes[order]
    ids = [ids[int(k)] for k in order]
    labels = [scene.object(i).name for i in ids]
    question = pick(rng, ONE_CLASS if easy else PHRASES).format(names=", ".join(names))
    c = view.camera
    prompt = detection_prompt(question, c.width, c.height, c.fx, c.fy, c.cx, c.cy)
    value = [
        {"bbox_3d": [round(float(x), 4) for x in box], "label": label} for box, label in zip(boxes, labels, strict=True)
    ]
    return sample(
        scene,
        task=TASK,
        kind=KIND,
        index=index,
        images=[view.photograph],
        turns=[(prompt, format_boxes(boxes, labels))],
        answer={"type": "boxes", "value": value, "unit": "m, degrees", "tolerance": MATCH_IOU},
        metadata={
            "form": "one_class" if easy else "several",
            "view": view_index,
            "objects": ids,
            "classes": names,
            "intrinsics": [c.fx, c.fy, c.cx, c.cy],
        },
    )
