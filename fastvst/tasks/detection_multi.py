"""3D detection across two views: boxes of all objects of a class that either image shows, in the frame of camera 1."""

from __future__ import annotations

import numpy as np

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene
from fastvst.spatial.boxes import format_boxes
from fastvst.spatial.prompts import multi_detection_prompt
from fastvst.tasks.common import TaskConfig, choose, nameable_classes, pick, sample
from fastvst.tasks.detection_3d import MATCH_IOU, within_limit

TASK = "detection_multi"
KIND = "bbox_3d"

PHRASES = (
    "Detect the 3D bounding boxes of {names}",
    "Detect the 3D bounding boxes of {names} in both images.",
    "Detect the 3D bounding box of the {names} seen in the two images.",
    "Find all {names} that either image shows and give their 3D bounding boxes.",
    "Locate every {names} of the two views in 3D.",
    "Output the 3D bounding boxes of {names}, each object once.",
    "Where are the {names}? Answer with 3D bounding boxes in the first camera's frame.",
    "Predict the 3D boxes of {names} from the two views.",
    "Give the 3D bounding boxes of all {names} in image 1 and image 2.",
    "Please detect {names} in the two pictures and report each 3D bounding box once.",
)


def askable(scene: Scene, pair: tuple[int, int, str], config: TaskConfig) -> dict[str, list[int]]:
    """Class name -> object ids, for classes of which every visible instance is clear in one of the two images."""
    clear: set[int] = set()
    shown: set[int] = set()
    for k in pair[:2]:
        for s in scene.views[k].sightings:
            if s.visibility >= config.min_visibility and s.pixels >= config.min_pixels:
                clear.add(s.object_id)
            if s.pixels >= config.ghost_pixels:
                shown.add(s.object_id)
    groups: dict[str, list[int]] = {}
    for object_id in sorted(clear):
        groups.setdefault(scene.object(object_id).name, []).append(object_id)
    unclear = {scene.object(i).name for i in shown - clear}
    return nameable_classes(groups, unclear)


def make(
    scene: Scene, pair: tuple[int, int, str], rng: np.random.Generator, config: TaskConfig, index: str
) -> Sample | None:
    """One row about one to five classes; boxes nearest to camera 1 first (by distance: some lie behind it)."""
    if pair[2] == "motion":
        return None
    groups = askable(scene, pair, config)
    if not groups:
        return None
    easy = bool(rng.uniform() < config.easy)
    names = choose(rng, sorted(groups), 1 if easy else int(rng.integers(1, 6)))
    names = within_limit(names, groups)
    if not names:
        return None
    ids = [i for name in names for i in groups[name]]
    boxes = scene.boxes_in_view(scene.views[pair[0]], ids)
    order = np.argsort(np.linalg.norm(boxes[:, :3], axis=1), kind="stable")
    boxes = boxes[order]
    ids = [ids[int(k)] for k in order]
    labels = [scene.object(i).name for i in ids]
    cameras = [scene.views[k].camera for k in pair[:2]]
    question = pick(rng, PHRASES[:1] if easy else PHRASES).format(names=", ".join(names))
    value = [
        {"bbox_3d": [round(float(x), 4) for x in box], "label": label} for box, label in zip(boxes, labels, strict=True)
    ]
    return sample(
        scene,
        task=TASK,
        kind=KIND,
        index=index,
        images=[scene.views[k].photograph for k in pair[:2]],
        turns=[(multi_detection_prompt(question, cameras), format_boxes(boxes, labels))],
        answer={"type": "boxes", "value": value, "unit": "m, degrees", "tolerance": MATCH_IOU},
        metadata={
            "form": "one_class" if easy else "several",
            "views": list(pair[:2]),
            "objects": ids,
            "classes": names,
            "intrinsics": [cameras[0].fx, cameras[0].fy, cameras[0].cx, cameras[0].cy],
        },
    )
