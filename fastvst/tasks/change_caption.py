"""Scene caption of two images: what each shows and where, how the camera moved, what appeared and what disappeared."""

from __future__ import annotations

import numpy as np

from fastvst.data.sample import Sample
from fastvst.scenes.scene import Scene, View
from fastvst.tasks.camera_motion import relative
from fastvst.tasks.common import TaskConfig, article, choose, listed, nameable, pick, prose, sample
from fastvst.tasks.facts import Statement, answer_of
from fastvst.tasks.scene_caption import third

TASK = "change_caption"
KIND = "caption-multi-view"

PHRASES = (
    "Describe the features of these two frames.",
    "Describe what each of the two images shows and how the view changes.",
    "Compare the two views: what is in each, and how did the camera move between them?",
    "Write a caption for each image and say what changed from the first to the second.",
    "Explain the layout in both pictures and the change of viewpoint.",
    "What do the two frames have in common, and what differs?",
    "Give a description of image 1, of image 2 and of the camera's change.",
    "Describe both views of this room and the camera motion between them.",
    "How does the scene look from the two viewpoints?",
    "Please describe these two images of one room and relate them to each other.",
)
SHOWS = (
    "Image {k} shows {things}.",
    "In image {k} there are {things}.",
    "The {nth} view contains {things}.",
    "Looking at image {k}, I see {things}.",
)
PLACE = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
BOTH = ("Both views show {things}.", "{things} can be seen in both images.", "Common to the two images: {things}.")
GONE = ("No longer in view in image 2: {things}.", "From image 1 to image 2, {things} left the view.")
NEW = ("New in image 2: {things}.", "Image 2 adds {things}.")
SHIFT = ("Between the two images the camera moved {way}.", "The second picture was taken after moving {way}.")
TURN = ("The camera turned to the {way}.", "From the first to the second image the view swings to the {way}.")


def placed(scene: Scene, view: View, config: TaskConfig, rng: np.random.Generator, most: int = 4) -> list[list]:
    """[name, id, side] of clearly seen objects, the only ones of their class, in a clear third of the image."""
    found = []
    for s in nameable(scene, view, config):
        side = third(view, s.point)
        if side is not None and third(view, ((s.box_2d[0] + s.box_2d[2]) / 2, 0.0)) == side:
            found.append([scene.object(s.object_id).name, s.object_id, side])
    return choose(rng, found, most)


def movement(first: View, second: View) -> list[Statement]:
    """How the camera moved, in the first camera's frame: the horizontal part of the shift, then the turn."""
    shift, pan, _ = relative(first.camera, second.camera)
    across = float(shift[0])
    ahead = float(shift[2])
    words = []
    doubtful = False
    for value, (low, high), other in ((across, ("left", "right"), ahead), (ahead, ("backward", "forward"), across)):
        if abs(value) >= 0.3 and abs(value) >= 0.5 * abs(other):
            words.append(high if value > 0 else low)
        elif abs(value) >= 0.25 and abs(value) >= 0.4 * abs(other):
            doubtful = True  # neither small enough to leave out nor large enough to name
    found = []
    if words and not doubtful:
        found.append(Statement(SHIFT[0].format(way=listed(words)), {"says": "shift", "words": words}))
    if 15 <= abs(pan) <= 165:
        way = "right" if pan > 0 else "left"
        found.append(Statement(TURN[0].format(way=way), {"says": "turn", "words": [way]}))
    return found


def make(
    scene: Scene, pair: tuple[int, int, str], rng: np.random.Generator, config: TaskConfig, index: str
) -> Sample | None:
    """One row about a pair of views from different places, or None."""
    if pair[2] == "motion":
        return None
    views = [scene.views[k] for k in pair[:2]]
    statements: list[Statement] = []
    for k, view in enumerate(views):
        things = placed(scene, view, config, rng)
        if not things:
            return None
        text = listed([f"{article(name)} {PLACE[side]}" for name, _, side in things])
        fact = {"says": "placed", "titles": [t[0] for t in things], "image": k, "things": things}
        nth = ("first", "second")[k]
        statements.append(Statement(pick(rng, SHOWS).format(k=k + 1, nth=nth, things=text), fact))
    move = movement(*views)
    if not move:
        return None
    clear = [{s.object_id: scene.object(s.object_id).name for s in nameable(scene, view, config)} for view in views]
    shown = [{scene.object(s.object_id).name for s in view.sightings} for view in views]
    both = sorted(set(clear[0]) & set(clear[1]))
    gone = sorted(i for i, name in clear[0].items() if name not in shown[1])
    new = sorted(i for i, name in clear[1].items() if name not in shown[0])
    change = []
    for says, bank, ids in (("both", BOTH, both), ("gone", GONE, gone), ("new", NEW, new)):
        ids = choose(rng, ids, 4)
        if ids:
            names = [scene.object(i).name for i in ids]
            words = listed([f"the {prose(name)}" for name in names])
            text = pick(rng, bank).format(things=words)
            change.append(Statement(text[0].upper() + text[1:], {"says": says, "titles": names, "objects": ids}))
    statements = [*statements, *move, *change]
    return sample(
        scene,
        task=TASK,
        kind=KIND,
        index=index,
        images=[view.photograph for view in views],
        turns=[(pick(rng, PHRASES), " ".join(s.text for s in statements))],
        answer=answer_of(statements),
        metadata={"form": "prose", "views": list(pair[:2])},
    )
