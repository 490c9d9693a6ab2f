"""3D grounding: the box of the one object that a coloured dot, a drawn 2D box or a description refers to.

The 2D box is drawn, not written: the loader resizes rows of this kind to the focal length of the virtual camera, and
pixel numbers in the text would then be wrong.
"""

from __future__ import annotations

import math

import numpy as np

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene, Sighting, View
from fastvst.spatial import draw
from fastvst.spatial.boxes import box_distance, format_boxes
from fastvst.spatial.prompts import detection_prompt
from fastvst.tasks.common import TaskConfig, apart, canvas, fits_another, nameable, pick, sample, usable
from fastvst.tasks.detection_3d import MATCH_IOU

TASK = "grounding_3d"
KIND = "bbox_3d"

PHRASES = (
    "Detect the 3D bounding box of the {what}",
    "Detect the 3D bounding box of the {what}.",
    "Locate the {what} in 3D.",
    "Give the 3D bounding box of the {what}.",
    "Where is the {what}? Answer with its 3D bounding box.",
    "Predict the 3D bounding box of the {what}.",
    "Output the 3D bounding box of the {what} only.",
    "Find the {what} and report its 3D bounding box.",
    "Ground the following object in 3D: the {what}.",
    "I mean the {what}. What is its 3D bounding box?",
    "Return one 3D bounding box, that of the {what}.",
)


def descriptions(scene: Scene, view: View, target: Sighting, config: TaskConfig) -> list[tuple[str, dict]]:
    """Texts that describe exactly one visible object, each with the reason.

    The object is the only one of its class; the leftmost, rightmost, nearest or farthest of its class; or the one of
    its class that is nearest to a unique object.
    """
    name = scene.object(target.object_id).name
    shown = {scene.object(s.object_id).name for s in view.sightings if s.pixels >= config.ghost_pixels}
    if fits_another(name, shown):
        return []
    same = [s for s in view.sightings if scene.object(s.object_id).name == name and s.pixels >= config.ghost_pixels]
    if len(same) == 1:
        return [(name, {"rule": "only"})]
    others = [s for s in same if s is not target]
    if any(s.farthest == math.inf for s in others):  # nobody knows where one of them is
        return []
    found: list[tuple[str, dict]] = []
    middle = {s.object_id: (s.box_2d[0] + s.box_2d[2]) / 2 for s in same}
    centre = dict(zip(middle, scene.boxes_in_view(view, list(middle))[:, 2], strict=True))
    for word, sign in (("leftmost", 1), ("rightmost", -1)):
        gaps = [sign * (s.point[0] - target.point[0]) for s in others]
        gaps += [sign * (middle[s.object_id] - middle[target.object_id]) for s in others]
        if min(gaps) >= 0.1 * view.camera.width:
            found.append((f"{word} {name}", {"rule": word}))
    for word, sign in (("closest", 1), ("farthest", -1)):  # by dots and by whole boxes
        gaps = [s.nearest - target.farthest if sign > 0 else target.nearest - s.farthest for s in others]
        gaps += [sign * (centre[s.object_id] - centre[target.object_id]) for s in others]
        if min(gaps) >= max(config.depth_gap, config.depth_ratio * max(s.depth for s in same)):
            found.append((f"{name} {word} {'to' if sign > 0 else 'from'} the camera", {"rule": word}))
    for anchor in nameable(scene, view, config):
        if scene.object(anchor.object_id).name == name:
            continue
        box = scene.object(anchor.object_id).box
        gap = box_distance(scene.object(target.object_id).box, box)
        nearest = min(box_distance(scene.object(s.object_id).box, box) for s in others)
        if nearest - gap >= max(config.distance_gap, config.distance_ratio * nearest):
            title = scene.object(anchor.object_id).name
            found.append((f"{name} nearest to the {title}", {"rule": "near", "anchor": anchor.object_id}))
    return found


def make(scene: Scene, view_index: int, rng: np.random.Generator, config: TaskConfig, index: str) -> Sample | None:
    """One row about one object of one view, or None."""
    view = scene.views[view_index]
    pool = usable(view, config)
    if not pool:
        return None
    target = pick(rng, pool)
    image = view.photograph
    name = scene.object(target.object_id).name
    form = pick(rng, ("words", "words", "point", "box"))
    why: dict = {}
    if form == "words":
        known = descriptions(scene, view, target, config)
        if not known:
            return None
        what, why = pick(rng, known)
    elif form == "point":
        if any(s is not target and not apart(s.point, target.point, 2 * draw.radius_of(image.size)) for s in pool):
            return None
        colour = pick(rng, tuple(draw.COLOURS))
        image = canvas(view)
        draw.dot(image, target.point, colour)
        what = f"{name} ({colour} point)"
    else:
        colour = pick(rng, tuple(draw.COLOURS))
        image = canvas(view)
        draw.box_2d(image, target.box_2d, colour)
        what = f"{name} ({colour} box)"
    box = scene.boxes_in_view(view, [target.object_id])
    c = view.camera
    prompt = detection_prompt(pick(rng, PHRASES).format(what=what), c.width, c.height, c.fx, c.fy, c.cx, c.cy)
    value = [{"bbox_3d": [round(float(x), 4) for x in box[0]], "label": name}]
    return sample(
        scene,
        task=TASK,
        kind=KIND,
        index=index,
        images=[image],
        turns=[(prompt, format_boxes(box, [name]))],
        answer={"type": "boxes", "value": value, "unit": "m, degrees", "tolerance": MATCH_IOU},
        metadata={
            "form": form,
            "view": view_index,
            "objects": [target.object_id],
            "referring": what,
            "why": why,
            "point": list(target.point),
            "box_2d": list(target.box_2d),
            "intrinsics": [c.fx, c.fy, c.cx, c.cy],
        },
    )
